"""champion.json: in canonical JSON, written out anew where it changed, read again where somebody else had it."""

import errno
import json
import os
from pathlib import Path

import pytest

from data_contracts.errors import UserError
from pipeline.tracking import champion as champion_module
from pipeline.tracking.chain import drafted, fold, load_chain, publish
from pipeline.tracking.champion import Current, Served, read_champion


def write(current, work_dir, entry, head):
    with current.drafted(work_dir, Served.at_first(work_dir), entry) as draft:
        draft.settle(head)
        champion = draft.copy()
        draft.take_place()
    return champion


def test_the_champion_file_is_canonical_json_and_only_changed_tasks_are_written_out_anew(
    by_hand, tmp_path, monkeypatch
):
    def as_python_writes_it(champion):
        return json.dumps(champion.model_dump(), sort_keys=True, separators=(",", ":")).encode()

    for manifest, staged in by_hand.increments(tmp_path):
        publish(tmp_path, staged, manifest)
        assert (tmp_path / "champion.json").read_bytes() == as_python_writes_it(read_champion(tmp_path))
    digits = "0123456789abcdef"
    many = {f"t{n:03d}": {"gate": digits[n % 16] * 64} for n in range(300)}
    champion = read_champion(tmp_path).model_copy(update={"bundles": many})
    current = Current(champion.model_copy(update={"bundles": dict(many), "state": dict(champion.state)}))
    assert write(current, tmp_path, manifest, champion.head) == champion
    assert (tmp_path / "champion.json").read_bytes() == as_python_writes_it(champion) == champion.to_bytes()

    written = []
    real = champion_module.canonical_json
    monkeypatch.setattr(champion_module, "canonical_json", lambda value: written.append(value) or real(value))
    new, other = {"gate": "f" * 64}, {"proto": "e" * 64}
    current.advance(manifest.model_copy(update={"task": "t0071", "bundles": {"t007": new, "a": new}, "state": other}))
    current.advance(manifest.model_copy(update={"task": "product_reviews", "bundles": {"z": new}, "state": {}}))
    later = current.copy()
    assert later.bundles == many | {"t007": new, "a": new, "z": new} and later.state == {"t0071": other}
    later = later.model_copy(update={"head": "0" * 64})
    assert write(current, tmp_path, manifest, later.head) == later
    assert (tmp_path / "champion.json").read_bytes() == as_python_writes_it(later)
    assert written.count(new) == 3 and written.count(other) == 1 and len(written) == 3 + 1 + 1


def test_a_champion_that_was_read_stays_as_it_was_when_the_next_one_is_published(by_hand, tmp_path):
    read = []
    for manifest, staged in by_hand.increments(tmp_path):
        publish(tmp_path, staged, manifest)
        read.append((read_champion(tmp_path), (tmp_path / "champion.json").read_bytes()))
    assert all(champion.to_bytes() == data for champion, data in read) and len({data for _, data in read}) == 3


def test_an_increment_is_published_with_the_champion_that_was_drafted_before_its_files_were_made(
    by_hand, tmp_path, monkeypatch
):
    for manifest, staged in by_hand.increments(tmp_path):
        with drafted(tmp_path, manifest.model_copy(update={"files": {}})) as draft:
            with monkeypatch.context() as patched:
                patched.setattr(Current, "drafted", lambda *_: pytest.fail("written a second time"))
                publish(tmp_path, staged, manifest, draft=draft)
            champion = read_champion(tmp_path)
            assert champion.head == manifest.sha256 and champion == fold(load_chain(tmp_path))
            publish(tmp_path, staged, manifest, draft=draft)  # the head again
    assert champion == fold(load_chain(tmp_path)) and list(tmp_path.glob(".*")) == []


def test_a_draft_is_for_its_own_entry_and_for_the_champion_it_followed(by_hand, tmp_path):
    steps = by_hand.increments(tmp_path)
    publish(tmp_path, *next(steps)[::-1])
    manifest, staged = next(steps)
    with drafted(tmp_path, manifest.model_copy(update={"task": "other"})) as draft:
        with pytest.raises(ValueError, match="another entry"):
            publish(tmp_path, staged, manifest, draft=draft)
        assert list(tmp_path.glob(".champion.json.*"))
    assert not list(tmp_path.glob(".champion.json.*"))
    before = read_champion(tmp_path)
    with drafted(tmp_path, manifest) as draft:
        ahead = manifest.model_copy(update={"task": "ahead", "bundles": {}, "files": {}})
        (tmp_path / "inflight/ahead").mkdir()
        publish(tmp_path, tmp_path / "inflight/ahead", ahead)
        with pytest.raises(UserError, match="another run has published meanwhile"):
            publish(tmp_path, staged, manifest, draft=draft)
    assert read_champion(tmp_path).head == ahead.sha256 and before == fold(load_chain(tmp_path)[1:])


def test_after_a_publish_that_failed_the_file_counts_and_not_what_was_to_come(by_hand, tmp_path, monkeypatch):
    steps = by_hand.increments(tmp_path)
    manifest, staged = next(steps)
    publish(tmp_path, staged, manifest)
    before = read_champion(tmp_path)
    manifest, staged = next(steps)
    for name in ("rename", "replace"):
        with monkeypatch.context() as patched, pytest.raises(UserError):
            patched.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
            publish(tmp_path, staged, manifest)
        assert read_champion(tmp_path) == before


def test_the_champion_file_is_read_again_only_where_it_is_not_as_this_process_left_it(by_hand, tmp_path, monkeypatch):
    path, read = tmp_path / "champion.json", Path.read_bytes
    by_hand.publish_all(tmp_path, count=2)
    left, reads = read_champion(tmp_path), []
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.append(self) or read(self))
    assert read_champion(tmp_path) == left and reads == []

    times, other = path.stat(), left.model_copy(update={"head": "0" * 64})
    path.write_bytes(other.to_bytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as large and as old as before
    assert path.stat().st_size == times.st_size
    assert read_champion(tmp_path) == other and reads == [path]

    (tmp_path / "beside").write_bytes(left.to_bytes())
    os.replace(tmp_path / "beside", path)
    assert read_champion(tmp_path) == left and reads == [path, path]


def test_a_folder_whose_times_are_somebody_elses_to_set_is_published_into(by_hand, tmp_path, monkeypatch):
    def refused(path, *_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), path)

    monkeypatch.setattr(os, "utime", refused)
    manifests = by_hand.publish_all(tmp_path, count=3)
    assert load_chain(tmp_path) == manifests[::-1] and read_champion(tmp_path) == fold(manifests)
