"""A stream over two hosts, and hosts that differ or are lost. `make proof-hosts` has three hosts, both backbones, every
launcher and every failure.
"""

import json
import subprocess
import sys

import pytest

from tests.cluster.cluster import ROOT, missing

pytestmark = [
    pytest.mark.timeout(600),  # the first test waits for all launches
    pytest.mark.skipif(bool(missing()), reason=missing() or "can be made"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `tests/cluster/driver.py --short` found."""
    out = tmp_path_factory.mktemp("hosts") / "found.json"
    command = [sys.executable, "-m", "tests.cluster.driver", "--short", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=560, check=False)
    assert out.is_file(), done.stdout + done.stderr
    return json.loads(out.read_text())


def test_expert_parallel_over_2_hosts_without_a_common_disk_publishes_what_2_ranks_of_one_host_do(found):
    (run,) = found["runs"]
    assert run["codes"] == [0, 0] and run["files"] > 20
    assert run["differing"] == [] and run["problem"] == ""


def test_another_data_file_on_one_host_is_refused_on_both_before_anything_is_learned(found):
    event = found["differences"][0]
    assert event["name"] == "another data file" and event["codes"] == [2, 2]
    assert "host node2 differs from host node1 in data file second/train.parquet" in event["told"]
    assert event["problem"] == ""


def test_what_one_host_refuses_before_the_hosts_meet_ends_the_other_too(found):
    event = found["differences"][1]
    assert event["name"] == "no stream file" and event["codes"] == [2, 2]
    assert event["told"].startswith("continual: host node2: /tmp/inputs/stream.yaml: cannot read")


def test_a_host_that_is_cut_off_ends_the_job_on_both_within_the_limit_and_the_other_one_goes_on_alone(found):
    (event,) = found["failures"]
    assert event["code"] != 0 and max(event["seconds"].values()) < 16
    assert "host node2 (rank 1) is cut off or gone" in event["named"]
    assert event["continued"] == "on 1: exit 0, 1 continuation" and event["problem"] == ""
