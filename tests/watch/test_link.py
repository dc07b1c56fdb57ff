"""Two ends of the watchdogs' link in one process: what passes, what is refused, when the other host counts as lost."""

import hmac
import json
import socket
import time

import pytest

from pipeline.watch.judge import everybody_waits
from pipeline.watch.link import Link

TOKEN = "a token of the tests"
QUIET = {"stop": None, "verdict": None, "waiting": None, "ended": None}


@pytest.fixture
def ends(tmp_path):
    """The links of node1, with rank 0, and of node2, which have heard of each other; and node1's port."""
    record = {"token": TOKEN, "hosts": ["node1 (rank 0)", "node2 (rank 1)"]}
    hub = Link(record | {"own": 0}, tmp_path)
    port = int((tmp_path / "port").read_text())
    spoke = Link(record | {"own": 1, "address": "127.0.0.1", "port": port}, tmp_path)
    pass_on(hub, spoke)
    yield hub, spoke, port
    hub.close(QUIET)
    spoke.close(QUIET)


def pass_on(hub, spoke, hub_says=QUIET, spoke_says=QUIET, seconds=1.0):
    """Let both say and hear for a moment, as if some seconds passed in all."""
    for _ in range(10):
        spoke.tick(seconds / 10, spoke_says)
        hub.tick(seconds / 10, hub_says)
        time.sleep(0.005)


def test_a_verdict_and_a_request_to_stop_reach_the_other_host(ends):
    hub, spoke, _ = ends
    assert (hub.verdict, hub.stop, spoke.verdict, spoke.stop) == (None, None, None, None)
    pass_on(hub, spoke, QUIET | {"stop": "asked"}, QUIET | {"verdict": "rank 1 is gone"})
    assert (hub.verdict, spoke.stop) == ("rank 1 is gone", "asked")


def test_a_host_in_touch_is_no_fault_however_long_it_takes(ends):
    hub, spoke, _ = ends
    pass_on(hub, spoke, seconds=100.0)
    assert hub.fault(10.0, 5.0) is None and spoke.fault(10.0, 5.0) is None


def test_a_host_that_falls_silent_is_a_fault_after_four_fifths_of_the_limit(ends):
    hub, spoke, _ = ends
    for peer in (*hub.peers.values(), *spoke.peers.values()):
        peer.live(7.9 - peer.silent_for)
        assert peer.fault(10.0, 5.0) is None
        peer.live(0.2)
    assert hub.fault(10.0, 5.0) == (
        "host node2 (rank 1) is cut off or gone, last heard 8 s ago; the job ends, the same command continues it"
    )
    assert spoke.fault(10.0, 5.0).startswith("host node1 (rank 0) is cut off")
    assert hub.fault(None, 5.0) is None  # limit_seconds: null


def test_a_host_that_was_never_heard_is_no_fault(tmp_path):
    hub = Link({"token": TOKEN, "hosts": ["node1", "node2"], "own": 0}, tmp_path)
    hub.peers[1].live(1000.0)
    assert hub.fault(10.0, 5.0) is None
    hub.peers[1].says = {"ended": [0]}
    hub.close(QUIET)


def test_a_closed_connection_is_made_again(ends):
    hub, spoke, _ = ends
    hub.peers[1].wire.close()
    pass_on(hub, spoke)
    pass_on(hub, spoke, QUIET, QUIET | {"stop": "again"}, seconds=2.0)
    assert hub.stop == "again"


@pytest.mark.parametrize(("codes", "fault"), [([0, 0], False), ([75], False), ([0, 1], True)])
def test_a_host_that_failed_is_a_fault_after_the_grace_time_and_one_that_is_done_never(ends, codes, fault):
    hub, spoke, _ = ends
    pass_on(hub, spoke, QUIET, QUIET | {"ended": codes})
    spoke.close(QUIET | {"ended": codes})
    hub.tick(3.0, QUIET)
    assert hub.fault(10.0, 5.0) is None
    hub.tick(100.0, QUIET)
    assert (hub.fault(10.0, 5.0) is not None) is fault


def test_who_does_not_know_the_token_is_not_heard(ends):
    hub, _, port = ends
    state = json.dumps(QUIET | {"verdict": "mine", "host": 1}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
        hub.tick(0.1, QUIET)
        nonce = stranger.recv(100).split(b"\n")[0]
        signed = b"\n".join((nonce, b"host", b"0", state))
        stranger.sendall(hmac.new(b"a guess", signed, "sha256").hexdigest().encode() + b" " + state + b"\n")
        for _ in range(5):
            hub.tick(0.1, QUIET)
            time.sleep(0.01)
        assert stranger.recv(100) == b""  # shown the door
    assert hub.verdict is None


def test_a_line_of_another_connection_is_not_taken_again(ends):
    hub, _, port = ends
    state = json.dumps(QUIET | {"verdict": "replayed", "host": 1}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=5) as first:
        hub.tick(0.1, QUIET)
        nonce = first.recv(100).split(b"\n")[0]
    line = hmac.new(TOKEN.encode(), b"\n".join((nonce, b"host", b"0", state)), "sha256").hexdigest().encode()
    with socket.create_connection(("127.0.0.1", port), timeout=5) as second:
        hub.tick(0.1, QUIET)
        second.recv(100)
        second.sendall(line + b" " + state + b"\n")
        for _ in range(5):
            hub.tick(0.1, QUIET)
            time.sleep(0.01)
    assert hub.verdict is None


def test_of_ranks_that_all_wait_the_one_silent_for_longest_is_named(ends):
    hub, spoke, _ = ends
    rank = {"name": "rank 0 (host node1, process 7)", "at": "barrier", "seen": "last seen: a step", "silent_for": 9.0}
    assert hub.all_waiting([rank]) is None
    pass_on(hub, spoke, QUIET, QUIET | {"waiting": [rank | {"name": "rank 1 (host node2)", "silent_for": 12.0}]})
    everyone = hub.all_waiting([rank])
    assert len(everyone) == 2
    assert everybody_waits(everyone).line.startswith("rank 1 (host node2) has stood still, as all ranks of all hosts")
    assert spoke.all_waiting([rank]) is None  # rank 0's host judges
