"""What the preflight concludes from numbers: clocks, majorities, memory. No host is needed."""

from types import SimpleNamespace

import pytest

from pipeline.placement.clocks import offset_of
from pipeline.preflight import host
from pipeline.preflight.collectives import Measured
from pipeline.preflight.findings import Findings
from pipeline.preflight.judge import judge_addresses, judge_clocks, judge_collectives, judge_memory
from pipeline.preflight.network import backend_address
from pipeline.preflight.sizes import Sizes


@pytest.mark.parametrize("ahead", [-3.0, 0.0, 0.25])
def test_clock_offset_lies_within_the_half_width_whatever_way_is_the_slower_one(ahead):
    # our clock is `ahead`; the way there takes 1, 4, 2 ms and the way back 5, 1, 9 ms
    trips, now = [], 1000.0
    for there, back in ((0.001, 0.005), (0.004, 0.001), (0.002, 0.009)):
        trips.append((now + ahead, now + there, now + there + back + ahead))
        now += 1.0
    offset = offset_of(trips)
    assert offset.half_width == pytest.approx(0.0025), "the fastest trip counts"
    assert abs(offset.seconds - ahead) <= offset.half_width
    assert offset.seconds == pytest.approx(ahead - 0.0015)


def test_only_a_clock_that_is_surely_off_is_red():
    found = Findings(["a", "b", "c"])
    judge_clocks(found, [None, {"seconds": 1.5, "half_width": 0.6}, {"seconds": -2.0, "half_width": 0.6}])
    assert len(found.red) == 1 and found.red[0].startswith("clock: c: its clock is -2.0 s")


def test_the_host_that_differs_from_most_is_named_even_where_it_is_rank_0s():
    found = Findings(["a", "b", "c"])
    assert not found.equal("torch", ["1", "2", "2"], ["1", "2", "2"], "install it")
    assert found.red == ["torch: a: 1, but 2 on b, c; install it"]


def test_of_two_hosts_the_other_one_is_named():
    found = Findings(["a", "b"])
    found.equal("torch", ["1", "2"], ["1", "2"], "install it")
    assert found.red == ["torch: b: 2, but 1 on a; install it"]


def test_memory_counts_all_ranks_of_a_host_against_nine_tenths_of_what_is_free():
    def fact(free):
        return {"device": {"count": None, "free": free}}

    sizes = Sizes(memory=4_000_000_000, gradients=1, gathered=1, token_copies=0, expert_parallel=1, element_bytes=2)
    found = Findings(["a", "b"])
    judge_memory(found, [fact(8_900_000_000), fact(8_800_000_000)], [2, 2], sizes)  # 2 x 4 GB = 0.9 x 8.89 GB
    assert [line[:10] for line in found.red] == ["memory: b:"]


def test_a_loopback_address_is_red_between_hosts_and_right_on_one():
    def own(address):
        return {"gloo": {"address": address, "chosen_by": "host name", "problem": None}}

    found = Findings(["a", "b"])
    assert not judge_addresses(found, [own("10.0.0.1"), own("127.0.1.1")], "gloo")
    (line,) = found.red
    assert line.startswith("gloo address: b: ") and "set GLOO_SOCKET_IFNAME" in line
    assert judge_addresses(Findings(["a"]), [own("127.0.0.1")], "gloo")


def test_wrong_sums_name_the_host_and_the_rank():
    found = Findings(["a", "b"])
    good, bad = (Measured("all-reduce", 1000, 0.001, right, "") for right in (True, False))
    judge_collectives(found, [[good], [good], [good], [bad]], [0, 0, 1, 1])
    (line,) = found.red
    assert line.startswith("all-reduce 1.0 kB (): b: wrong values arrived at rank 3")


def test_an_interface_that_is_not_there_is_named_with_those_that_are(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    problem = backend_address("gloo", "127.0.0.1").problem
    assert "GLOO_SOCKET_IFNAME=eth77" in problem and "lo" in problem.partition("it has")[2]


def test_memory_that_a_container_holds_for_files_counts_as_free(tmp_path, monkeypatch):
    gib = 2**30
    for name, text in {
        "memory.max": f"{2 * gib}",
        "memory.current": f"{int(1.75 * gib)}",
        "memory.stat": f"anon {gib // 4}\nfile {int(1.5 * gib)}\ninactive_file {gib}\nactive_file {gib // 2}\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * gib))
    assert host.free_memory() == int(1.75 * gib)
    (tmp_path / "memory.max").write_text("max")
    assert host.free_memory() == 8 * gib
