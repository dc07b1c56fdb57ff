"""A disk that refuses: full, read-only, failing. Each refusal is one sentence, the champion stands, nothing is left."""

import builtins
import errno
import os
import shutil
import subprocess

import pytest
import torch

from data_contracts.errors import UserError
from pipeline.experts.bank import Bank
from pipeline.files import write_atomic, writing
from pipeline.tracking.audit import audit
from pipeline.tracking.chain import clean_left_overs, fold, load_chain, publish
from pipeline.tracking.champion import read_champion
from pipeline.training.inflight import Progressed, load_inflight, save_inflight
from pipeline.upkeep import restore, retire

ERRORS = {
    errno.ENOSPC: "No space left on device; free some space",
    errno.EROFS: "Read-only file system; make it writable",
    errno.EIO: "Input/output error; check the path and the disk",
}
CALLS = ("fsync", "replace", "rename", "mkdir")


class Refusing:
    """The system calls by which files are published, of which the `nth` below a folder fails."""

    def __init__(self, monkeypatch, folder, nth, code):
        self.folder, self.nth, self.code, self.count, self.renamed = folder, nth, code, 0, []
        self.monkeypatch = monkeypatch

    def __enter__(self):
        for name in CALLS:
            self.monkeypatch.setattr(os, name, self.wrapped(name, getattr(os, name)))
        self.monkeypatch.setattr(builtins, "open", self.wrapped("open", open))
        return self

    def __exit__(self, *_):
        self.monkeypatch.undo()

    def wrapped(self, name, real):
        def call(first, *arguments, **options):
            mode = (arguments[0] if arguments else options.get("mode", "r")) if name == "open" else "w"
            path = os.readlink(f"/proc/self/fd/{first}") if name == "fsync" else str(first)
            idle = name == "mkdir" and os.path.isdir(path)  # the disk is not asked for what is there
            if "w" in str(mode) and path.startswith(str(self.folder)) and not idle:
                self.count += 1
                if self.count == self.nth:
                    raise OSError(self.code, os.strerror(self.code), path)
            return real(first, *arguments, **options)

        return call


def strays(work_dir):
    return [path for path in work_dir.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("code", list(ERRORS), ids=lambda code: errno.errorcode[code])
def test_each_refused_call_of_publishing_leaves_the_champion_whole_and_the_next_run_succeeds(
    by_hand, tmp_path, monkeypatch, code
):
    start = tmp_path / "start"
    steps = by_hand.increments(start)
    publish(start, next(steps)[1], next(by_hand.increments(tmp_path / "same"))[0])
    second, staged = next(steps)
    old, outcomes = read_champion(start), []
    for nth in range(1, 60):
        work_dir = shutil.copytree(start, tmp_path / f"{nth}")
        here = work_dir / staged.relative_to(start)
        message = ""
        with Refusing(monkeypatch, work_dir, nth, code) as refusing:
            try:
                publish(work_dir, here, second)
            except UserError as error:
                message = str(error)
        if refusing.count < nth:
            break
        assert str(work_dir) in message and ERRORS[code] in message and "\n" not in message
        champion = read_champion(work_dir)
        assert champion == fold(load_chain(work_dir)) and champion.head in (old.head, second.sha256)
        outcomes.append(champion == old)
        clean_left_overs(work_dir)
        assert strays(work_dir / "increments") == strays(work_dir / "bank") == [] and not list(work_dir.glob(".*"))
        if champion == old:
            shutil.rmtree(here, ignore_errors=True)
            shutil.copytree(start / staged.relative_to(start), here)
        publish(work_dir, here, second)
        assert read_champion(work_dir).head == second.sha256 and strays(work_dir) == []
        assert all(finding.ok for finding in audit(work_dir))
    assert len(outcomes) > 10
    # the one call after champion.json has its new name makes that name durable: then the new champion stands, whole
    assert outcomes == [True] * (len(outcomes) - 1) + [False]


def restore_first(work_dir):
    restore(work_dir, 1)


def retire_tweets(work_dir):
    retire(work_dir, "tweets")


@pytest.mark.parametrize("action", [restore_first, retire_tweets])
def test_each_refused_call_of_a_change_leaves_the_champion_whole_and_the_next_one_succeeds(
    by_hand, tmp_path, monkeypatch, action
):
    start = tmp_path / "start"
    by_hand.publish_all(start)
    if action is retire_tweets:
        restore(start, 1)  # increment 3 serves reviews with an expert of tweets
    for nth in range(1, 60):
        work_dir = shutil.copytree(start, tmp_path / f"{nth}")
        message = ""
        with Refusing(monkeypatch, work_dir, nth, errno.ENOSPC) as refusing:
            try:
                action(work_dir)
            except UserError as error:
                message = str(error)
        if refusing.count < nth:
            break
        assert "No space left on device" in message
        assert read_champion(work_dir) == fold(load_chain(work_dir))
        if action is retire_tweets or read_champion(work_dir) == read_champion(start):
            action(work_dir)
        assert all(finding.ok for finding in audit(work_dir)) and strays(work_dir) == []
    assert nth > 8 and read_champion(start).increment == (1 if action is retire_tweets else 3)


@pytest.mark.parametrize("streamed", [False, True])
def test_each_refused_call_of_the_bank_leaves_no_file_and_the_next_put_succeeds(tmp_path, monkeypatch, streamed):
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for nth in range(1, 20):
        bank = Bank(tmp_path / str(nth))
        put = lambda bank=bank: bank.put_stream(shapes, tensors.items()) if streamed else bank.put(tensors)  # noqa: E731
        with Refusing(monkeypatch, bank.root, nth, errno.ENOSPC) as refusing:
            try:
                put()
                message = ""
            except UserError as error:
                message = str(error)
        if refusing.count < nth:
            break
        assert str(bank.root) in message and "No space left on device; free some space" in message
        for sha in bank.digests():  # whole, where only its name could not be made durable
            bank.verify(sha)
        assert strays(tmp_path) == []
        assert bank.get(put())["a"].tolist() == [1, 1, 1]
    assert nth == 6  # mkdir, open, fsync, replace, fsync of the folder, and none more


def test_a_refused_save_keeps_the_state_there_was(tmp_path, monkeypatch):
    tensors = {"value/a": torch.ones(3)}
    shapes = {"value/a": (3,)}
    save_inflight(tmp_path, Progressed("key", 3, 0), shapes, tensors.items())
    for nth in range(1, 4):  # open, fsync, replace
        with Refusing(monkeypatch, tmp_path, nth, errno.ENOSPC), pytest.raises(UserError, match="free some space"):
            save_inflight(tmp_path, Progressed("key", 4, 0), shapes, tensors.items())
        assert load_inflight(tmp_path, "key") == Progressed("key", 3, 0)
        assert strays(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 kB, remounted read-only by `mount -o remount,ro`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_said_and_the_job_goes_on_once_there_is_room(by_hand, small_disk):
    steps = by_hand.increments(small_disk)
    for _ in range(2):
        manifest, staged = next(steps)
        publish(small_disk, staged, manifest)
    third, staged = next(steps)
    before = read_champion(small_disk)
    with open(small_disk / "ballast", "wb", buffering=0) as ballast, pytest.raises(OSError, match="No space"):
        while True:
            ballast.write(b"\0" * 4096)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        publish(small_disk, staged, third)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        Bank(small_disk / "bank").put({"big": torch.ones(2000)})
    assert read_champion(small_disk) == before == fold(load_chain(small_disk))
    (small_disk / "ballast").unlink()
    assert strays(small_disk / "bank") == []
    publish(small_disk, staged, third)
    assert read_champion(small_disk).head == third.sha256


def test_a_disk_that_became_read_only_is_said(by_hand, small_disk):
    steps = by_hand.increments(small_disk)
    publish(small_disk, next(steps)[1], next(by_hand.increments(small_disk.parent / "same"))[0])
    second, staged = next(steps)
    before = by_hand.files_of(small_disk)
    remounted = subprocess.run(["mount", "-o", "remount,ro", small_disk], capture_output=True, text=True)
    if remounted.returncode:
        pytest.skip(f"remounting is not permitted here: {remounted.stderr.strip()}")
    with pytest.raises(UserError, match="Read-only file system; make it writable"):
        publish(small_disk, staged, second)
    with pytest.raises(UserError, match="Read-only file system; make it writable"):
        Bank(small_disk / "bank").put({"a": torch.ones(2)})
    assert by_hand.files_of(small_disk) == before


def test_the_first_error_is_told_and_not_that_of_tidying_up(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    with pytest.raises(UserError, match="No space left"), writing(tmp_path):
        write_atomic(tmp_path / "file", b"x")
