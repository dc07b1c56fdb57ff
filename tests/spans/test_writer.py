"""Nothing that a disk does keeps the run waiting: what cannot be written is dropped, counted and said."""

import json
import os
import shutil
import subprocess
import tempfile
import time

import pytest

from pipeline.spans.record import folder_of
from pipeline.spans.writer import LineWriter

SMALL = {"name": "a span", "start": 1.5, "seconds": 0.25}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def longest(writer, number):
    """Seconds of the slowest of so many calls."""
    slowest = 0.0
    for count in range(number):
        begin = time.perf_counter()
        writer.write(SMALL | {"step": count})
        slowest = max(slowest, time.perf_counter() - begin)
    return slowest


def test_every_line_is_in_the_file_in_order(tmp_path):
    writer = LineWriter(lambda: tmp_path / "new" / "rank.jsonl", 10_000_000)
    for count in range(1000):
        writer.write({"n": count})
    writer.close()
    assert [line["n"] for line in lines_of(tmp_path / "new" / "rank.jsonl")] == list(range(1000))


def test_files_stay_within_their_bound_and_keep_the_newest(tmp_path):
    writer = LineWriter(lambda: tmp_path / "rank.jsonl", 20_000)
    for count in range(60):
        writer.write({"n": count, "text": "x" * 1000})
        writer._flush()
    writer.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 20_000 + 2 * 1100
    assert lines_of(tmp_path / "rank.jsonl")[-1]["n"] == 59
    assert lines_of(tmp_path / "rank.1.jsonl")[0]["n"] > 30


def test_a_writer_that_is_stuck_keeps_nobody_waiting(tmp_path, capsys):
    os.mkfifo(tmp_path / "rank.jsonl")  # takes 64 KB and then blocks for ever: nobody reads
    writer = LineWriter(lambda: tmp_path / "rank.jsonl", 10_000_000, most_lines=5000)
    for _ in range(2):
        longest(writer, 4000)
        time.sleep(0.7)  # the thread takes them and stands still
    assert longest(writer, 20_000) < 0.1
    begin = time.perf_counter()
    writer.close(0.5)
    assert time.perf_counter() - begin < 1.0
    assert writer.dropped >= 20_000 - 5000
    assert "lines dropped (the disk does not answer)" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs root to mount a tmpfs")
def test_a_full_disk_is_said_once_and_written_again_when_it_has_room(tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("the kernel mounts no tmpfs here")
    try:
        writer = LineWriter(lambda: disk / "rank.jsonl", 10_000_000)
        (disk / "ballast").write_bytes(b"x" * 40_000)
        assert longest(writer, 3000) < 0.1
        time.sleep(1.2)
        said = capsys.readouterr().err
        assert said.count("cannot be written (No space left on device)") == 1
        assert writer.dropped == 3000
        (disk / "ballast").unlink()
        (disk / "rank.jsonl").write_bytes(b"")
        writer.write(SMALL | {"step": 77})
        writer.close()
        kept = lines_of(disk / "rank.jsonl")
        assert [line["step"] for line in kept if line["name"] == "a span"] == [77]
        assert [line["lines"] for line in kept if line["name"] == "dropped"] == [3000]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_line_cut_by_a_kill_spoils_no_other(tmp_path):
    (tmp_path / "rank.jsonl").write_text('{"name": "step", "sta')
    writer = LineWriter(lambda: tmp_path / "rank.jsonl", 10_000_000)
    writer.write(SMALL)
    writer.close()
    assert json.loads((tmp_path / "rank.jsonl").read_text().splitlines()[1]) == SMALL


def test_a_step_of_hundreds_of_collectives_costs_few_milliseconds(tmp_path):
    from tests.spans.overhead import cost

    assert cost(tmp_path, 10**9, 100) < 5.0, "1 % of a step of half a second; measured: docs/OBSERVABILITY.md"


def test_a_host_without_the_work_dir_writes_into_a_folder_of_the_user_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = folder_of(tmp_path / "elsewhere")
    assert folder.parent == tmp_path and str(os.getuid()) in folder.name and folder.stat().st_mode & 0o077 == 0
    assert folder_of(tmp_path / "elsewhere") == folder, "a second launch finds it"
    folder.rmdir()
    (tmp_path / "theirs").mkdir()
    folder.symlink_to(tmp_path / "theirs")
    writer = LineWriter(lambda: folder_of(tmp_path / "elsewhere") / "rank.jsonl", 10_000_000)
    writer.write(SMALL)
    writer.close()
    assert not any((tmp_path / "theirs").iterdir())
    assert "belongs to somebody else; remove it, or set TMPDIR to your own" in capsys.readouterr().err
