"""Collectives that are timed stay what they were: for the caller, and for the watchdog that asks who waits."""

import threading
from types import SimpleNamespace

import pytest
from deepspeed.comm import comm

from pipeline.spans.collectives import TimedWork, timed_collectives
from pipeline.watch.rank import where


class Backend:
    """Collectives as DeepSpeed's backend has them: one returns nothing, one a handle, one raises."""

    def all_reduce(self, tensor):
        return None

    def all_gather_into_tensor(self, tensor):
        return SimpleNamespace(wait=lambda: "done", is_completed=lambda: True)

    def all_to_all_single(self, tensor):
        raise RuntimeError("a peer is gone")


def test_calls_and_waits_are_told_and_errors_and_handles_pass_through(monkeypatch):
    backend, told = Backend(), []
    monkeypatch.setattr(comm, "cdb", backend)
    with timed_collectives(lambda kind, begin, seconds: told.append(kind)):
        assert backend.all_reduce(1) is None
        handle = backend.all_gather_into_tensor(1)
        assert handle.is_completed() and handle.wait() == "done"
        with pytest.raises(RuntimeError, match="a peer is gone"):
            backend.all_to_all_single(1)
    assert told == ["reduce", "gather", "gather", "all_to_all"]
    assert vars(backend) == {}, "nothing is left on the backend"
    backend.all_reduce(1)
    assert len(told) == 4


def test_a_rank_that_waits_for_a_timed_collective_is_seen_as_waiting_for_ranks():
    held = threading.Lock()
    held.acquire()
    work = TimedWork(SimpleNamespace(wait=held.acquire), "gather", lambda kind, begin, seconds: None)
    thread = threading.Thread(target=work.wait, daemon=True)
    before = where(threading.get_ident())["waits"]
    thread.start()
    thread.join(0.1)
    assert (before, where(threading.get_ident())["waits"]) == ("", "ranks")
    held.release()
    thread.join()
