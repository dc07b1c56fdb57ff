"""The preflight on hosts that are network namespaces of this machine, each with its own copy of everything.

Two and three hosts, one rank each. What is wrong is made wrong for real.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests import forked
from tests.helpers import make_stream, make_task, save_backbone

SOON = 2  # seconds that ranks wait for those that never come


def namespaces() -> str:
    """Why there can be no hosts here; empty where there can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "needs root and iproute2"
    made = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, check=False)
    return "" if made.returncode == 0 else "the kernel gives no network namespaces"


pytestmark = pytest.mark.skipif(bool(namespaces()), reason=namespaces() or "hosts can be made")


class Driver:
    """Three hosts, and launches on them; everything is imported once."""

    def __init__(self, folder) -> None:
        command = [sys.executable, "-m", "tests.preflight.driver", "3", str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=forked.ROOT, **pipes)
        assert self.process.stdout.readline() == "ready\n"

    def launch(self, *ranks, **asked):
        """One rank for each (host, arguments) or (host, arguments, path); host None is not started."""
        named = [dict(zip(("host", "arguments", "path"), rank, strict=False)) for rank in ranks]
        self.process.stdin.write(json.dumps({"ranks": named, **asked}) + "\n")
        self.process.stdin.flush()
        outcomes = json.loads(self.process.stdout.readline())
        assert "Traceback" not in "".join(outcome["output"] for outcome in outcomes), outcomes
        return outcomes

    def end(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(30) == 0


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    made = Driver(tmp_path_factory.mktemp("launches"))
    yield made
    made.end()


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """Arguments of a good run, and (wrong backbone, wrong data, a library of another version) to put in their place."""
    folder = tmp_path_factory.mktemp("stream")
    save_backbone(folder / "backbone")
    task = make_task(folder / "data", "reviews")
    made = make_stream(folder / "stream.yaml", folder / "work", folder / "backbone", folder / "data", [task])
    save_backbone(folder / "other_backbone", seed=1)
    make_task(folder / "other_data", "reviews")
    with open(folder / "other_data" / "reviews" / "test.parquet", "r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))  # one bit of one file
    metadata = folder / "libraries" / "pyarrow-24.0.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pyarrow\nVersion: 24.0.0\n")
    good = ["--stream", str(made), "--timeout", "20"]
    return good, {
        "backbone": ["--set", f"backbone.path={folder / 'other_backbone'}"],
        "data": [f"--set=data_roots=[{folder / 'other_data'}]", f"--set=tasks=[{folder / 'other_data/reviews.yaml'}]"],
        "library": [str(folder / "libraries")],
        "work_dir": folder / "work",
    }


def red(outcome) -> list[str]:
    """The red lines of a rank's output."""
    return [line.removeprefix("RED  ") for line in outcome["output"].splitlines() if line.startswith("RED  ")]


def row(outcome, name) -> str:
    """The line of the table that begins with a name."""
    return next(line for line in outcome["output"].splitlines() if line.startswith(name))


def test_two_good_hosts_pass_with_every_check_in_one_table(driver, tmp_path):
    from tests.moe_helpers import save_moe_backbone

    backbone = save_moe_backbone(tmp_path / "backbone", "hunyuan_v1_moe")
    task = make_task(tmp_path / "data", "reviews")
    settings = {"deepspeed": str(forked.ROOT / "deepspeed_configs" / "zero3_ep2.json")}
    stream = make_stream(tmp_path / "s.yaml", tmp_path / "work", backbone, tmp_path / "data", [task], **settings)
    good = ["--stream", str(stream), "--timeout", "20"]
    first, second = driver.launch((0, good), (1, good))
    assert (first["code"], second["code"]) == (0, 0), first["output"] + second["output"]
    assert red(first) == [] and "all is well" in first["output"] and "RED" not in second["output"]
    assert "10.78.0.1" in row(first, "gloo address") and "10.78.0.2" in row(first, "gloo address")
    assert row(first, "TCP to others").count("1 of 1") == 2
    assert "shared" in row(first, "work_dir")
    for name in ("all-reduce", "all-gather", "all-to-all"):
        assert row(first, name).count("GB/s") == 2, name
    assert "expert-parallel 2" in row(first, "all-to-all")
    assert not (tmp_path / "work").exists() and not list(tmp_path.glob(".preflight*")), "a check leaves nothing behind"


def test_another_backbone_library_or_data_file_of_a_host_is_named_in_red(driver, stream):
    good, wrong = stream
    outcomes = driver.launch(
        (0, good), (1, [*good, *wrong["backbone"]], wrong["library"]), (2, [*good, *wrong["data"]])
    )
    assert [outcome["code"] for outcome in outcomes] == [1, 1, 1]
    library, backbone, data = red(outcomes[0])
    assert library.startswith("pyarrow: host1: 24.0.0, but 25") and "install the same pyarrow" in library
    assert backbone.startswith("backbone: host1: ") and "copy it again" in backbone
    assert data.startswith("data reviews: host2: reviews/test.parquet is not as on host0"), data
    assert "GB/s" in row(outcomes[0], "all-to-all"), "what does not hinder the groups does not keep them untried"


def test_a_blocked_way_between_two_hosts_names_the_pair_and_forms_no_group(driver, stream):
    good = [*stream[0], "--timeout", str(SOON + 1)]
    outcomes = driver.launch((0, good), (1, good), (2, good), block=[[1, 2]])
    assert [outcome["code"] for outcome in outcomes] == [1, 1, 1]
    lines = red(outcomes[0])
    assert any("host2: no connection to host1: no answer in" in line for line in lines), lines
    assert not any("host0" in line for line in lines), "host 0 reaches both"
    assert "not tried" in row(outcomes[0], "collectives") and max(o["seconds"] for o in outcomes) < 20


def test_a_host_that_does_not_come_or_cannot_reach_the_port_is_named_within_the_limit(driver, stream):
    good = [*stream[0], "--timeout", str(SOON)]
    first, absent, third = driver.launch((0, good), (None, good), (2, good), block=[[0, 2]])
    assert (first["code"], absent["code"], third["code"]) == (1, None, 1)
    (line,) = red(first)
    assert line.startswith("ranks 1, 2 (nodes 1, 2 of the host list, from 0) did not come to 10.78.0.1:29500")
    assert "there are 1 of 3, from host0" in line
    (line,) = red(third)
    assert line.startswith("host2: 10.78.0.1:29500 (MASTER_ADDR, MASTER_PORT) not reached") and "firewall" in line
    assert max(first["seconds"], third["seconds"]) < SOON + 8


def test_a_host_without_the_backbone_and_a_degree_that_does_not_fit_end_before_any_group(driver, stream, tmp_path):
    good, _ = stream
    first, second = driver.launch((0, good), (1, [*good, "--set", f"backbone.path={tmp_path}"]))
    assert (first["code"], second["code"]) == (1, 1) and "not tried" in row(first, "collectives")
    (line,) = red(first)
    assert line.startswith("backbone: host1: ") and "is not a folder with a config.json" in line
    file = forked.ROOT / "deepspeed_configs" / "zero3_ep2.json"
    first, second = driver.launch(*((host, [*good, "--set", f"deepspeed={file}"]) for host in (0, 1)))
    (line,) = red(first)
    assert line.startswith("expert-parallel: host0: ") and "has no routed experts" in line
    assert max(first["seconds"], second["seconds"]) < 15


def test_a_stranger_at_the_port_is_told_by_both_sides(driver, stream):
    good = [*stream[0], "--timeout", str(SOON)]
    first, second = driver.launch((0, good), (1, good), taken=True)
    assert (first["code"], second["code"]) == (1, 1)
    assert "port 29500 of 10.78.0.1 is taken by another process" in red(first)[0]
    assert "what listens at 10.78.0.1:29500 is not this job's rendezvous" in red(second)[0]


def test_a_job_at_work_in_the_work_dir_is_named(driver, stream):
    from pipeline.lock import WorkLock

    good, wrong = stream
    wrong["work_dir"].mkdir(exist_ok=True)
    with WorkLock(wrong["work_dir"], ["a", "job"]) as lock:
        lock.acquire()
        (outcome,) = driver.launch((0, good))
    assert outcome["code"] == 1
    (line,) = red(outcome)
    assert line.startswith("work_dir: host0: ") and "another job is at work there" in line and "a job" in line
    (outcome,) = driver.launch((0, good))
    assert outcome["code"] == 0, outcome["output"]


def test_a_broken_stream_file_is_a_sentence_and_exit_2(driver, tmp_path):
    (tmp_path / "broken.yaml").write_text("stream: [", encoding="utf-8")
    (outcome,) = driver.launch((0, ["--stream", str(tmp_path / "broken.yaml")]))
    assert outcome["code"] == 2 and "not valid YAML" in outcome["output"]
