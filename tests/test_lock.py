"""One writer at a time: who holds a work_dir is named, and only a lock nobody can hold any more is taken over."""

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from data_contracts.errors import UserError
from jobs import bank
from pipeline.lock import LOCK, WorkLock, user_name
from pipeline.training.stop import StopFlag


@pytest.fixture
def holder(tmp_path):
    """Process id of another process that holds the lock of tmp_path; killed at the end, if it still runs."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            WorkLock(tmp_path, ["jobs/continual.py", "--stream", "my stream.yaml"]).acquire()
            os.write(told, b"1")
            signal.pause()
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"1"
    yield child
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def left_by(tmp_path, **changes):
    """A lock file that a job left without holding it."""
    holder = {"host": "node-7", "machine": "other", "pid": 1, "since": "2026-01-01T00:00:00", "command": "continual"}
    (tmp_path / LOCK).write_text(json.dumps(holder | changes))


def test_a_second_job_is_refused_by_name_of_the_holder(tmp_path, holder):
    written = json.loads((tmp_path / LOCK).read_text())
    with pytest.raises(UserError) as refused:
        WorkLock(tmp_path).acquire()
    message = str(refused.value)
    for part in (socket.gethostname(), f"process {holder}", written["since"], "--stream 'my stream.yaml'", "stop it"):
        assert part in message
    with pytest.raises(UserError, match=f"process {holder}"):
        WorkLock(tmp_path).acquire(break_lock=True)  # a job that runs is never robbed


def test_bank_jobs_are_refused_while_another_job_works(tmp_path, holder, capsys):
    for action in (["gc"], ["gc", "--delete"], ["restore", "1"], ["retire", "tweets"]):
        assert bank.main(["--work-dir", str(tmp_path), *action]) == 2
        assert f"process {holder}" in capsys.readouterr().err


def test_what_a_killed_job_of_this_machine_left_is_taken_over(tmp_path, holder):
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == holder
    with WorkLock(tmp_path, ["mine"]) as lock:
        lock.acquire()
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_container_of_this_machine_is_no_other_machine(tmp_path):
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    left_by(tmp_path, host="a-container-that-is-gone", machine=boot_id)
    WorkLock(tmp_path).acquire().release()
    assert not (tmp_path / LOCK).exists()


def test_what_another_machine_left_is_refused_until_the_user_says_its_job_is_gone(tmp_path):
    left_by(tmp_path)
    with pytest.raises(UserError, match=r"another machine .*node-7, process 1, since 2026-01-01.*--break-lock"):
        WorkLock(tmp_path).acquire()
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "node-7"
    WorkLock(tmp_path).acquire(break_lock=True).release()
    assert not (tmp_path / LOCK).exists()


def test_a_lock_is_let_go_when_the_job_fails(tmp_path):
    with pytest.raises(KeyError), WorkLock(tmp_path) as lock:
        lock.acquire()
        raise KeyError
    WorkLock(tmp_path).acquire().release()


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b'{"host": "no', b"[1]", b"\xff\xfe"])
def test_a_torn_lock_file_stops_nobody(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    WorkLock(tmp_path).acquire().release()
    assert not (tmp_path / LOCK).exists()


def test_a_file_that_its_holder_took_along_is_not_mistaken_for_the_lock(tmp_path, monkeypatch):
    """Opened before the holder's end, locked after it: such a lock would keep nobody out."""
    first, opened, real = WorkLock(tmp_path).acquire(), [], os.open

    def late(path, *arguments, **options):
        fd = real(path, *arguments, **options)
        if not opened:
            opened.append(fd)
            first.release()
        return fd

    monkeypatch.setattr(os, "open", late)
    second = WorkLock(tmp_path).acquire()
    monkeypatch.undo()
    assert os.stat(tmp_path / LOCK).st_ino == os.fstat(second._fd).st_ino
    with pytest.raises(UserError, match="another job"):
        WorkLock(tmp_path).acquire()
    second.release()


def test_a_folder_that_cannot_be_written_is_said_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"lock\.json"):
        WorkLock(tmp_path / "file").acquire()


def test_who_runs_a_job_is_told_by_number_where_the_number_has_no_name(monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_001)  # as `docker run --user` or a pod may choose
    assert user_name() == "uid 4000001"


def test_a_job_that_leaves_at_once_after_a_stop_takes_its_lock_along(tmp_path):
    lock, stop, said = WorkLock(tmp_path).acquire(), StopFlag(), []
    stop.marker, stop.release = said.append, lock.release
    stop.leave("evaluating")  # the process ends here: another machine goes on without --break-lock
    assert said and not (tmp_path / LOCK).exists()
