"""The hash chain of increments and the transaction that publishes one.

    <work_dir>/increments/0001-<task>/manifest.json   each names its parent's sha256
    <work_dir>/champion.json                          the head's sha256 and the table of all bundles (champion.py)

The head is the newest entry, an increment promoted or rejected or a change (manifest.py); the table is the fold of the
chain. Until champion.json is replaced, as the last act of publishing, the old champion stands whole; an increment
folder that the head does not reach is what a killed publish left over.
"""

import os
import re
import shutil
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from data_contracts.errors import UserError
from pipeline.experts.bank import Bank
from pipeline.files import date_apart, fsync_dir, make_durable, sha256_bytes, sha256_file, write_atomic, writing
from pipeline.tracking.champion import CHAMPION, Champion, Current, Draft, Served, read_champion
from pipeline.tracking.history import History
from pipeline.tracking.manifest import MANIFEST, RUN, Entry, Manifest, parse_manifest

if TYPE_CHECKING:
    from pipeline.store.published import Store

INCREMENTS = "increments"
_NAME = r"[a-z][a-z0-9_]{0,62}"
_FOLDER = re.compile(rf"(\d{{4,}})-({_NAME}|restored\.[1-9]\d*|retired\.{_NAME})")


def load_chain(work_dir: Path | str) -> list[Entry]:
    """All entries from the head back to the first; empty when nothing was published.

    Every manifest is re-hashed against the digest that names it, and champion.json against the fold of the chain.
    Raises UserError naming what differs.
    """
    champion = read_champion(work_dir)
    if champion is None:
        return []
    folders = list(increment_folders(work_dir))
    manifests = [_find(work_dir, folders, champion.head, f"{CHAMPION} names as the head")]
    by_number = {number: list(entries) for number, entries in groupby(folders, key=itemgetter(0))}
    while manifests[-1].parent is not None:
        child = manifests[-1]
        candidates = by_number.get(child.increment - 1, [])
        manifests.append(_find(work_dir, candidates, child.parent, f"increment {child.increment} names as its parent"))
    folded = fold(manifests)
    if folded != champion:
        differences = "; ".join(champion_differences(champion, folded))
        raise UserError(f"{Path(work_dir) / CHAMPION}: {differences}; restore it from a backup")
    return manifests


def fold(manifests: Iterable[Entry]) -> Champion | None:
    """The champion that a chain of manifests, in any order, leads to; None for no manifest."""
    return champion_of(History.of(manifests))


def champion_of(history: History) -> Champion | None:
    """The champion that a history leads to; None for an empty one."""
    if history.head is None:
        return None
    promoted = history.promoted.increment if history.promoted else 0
    return Champion(head=history.head.sha256, increment=promoted, bundles=history.bundles, state=history.state)


def champion_differences(found: Champion, expected: Champion) -> list[str]:
    """One sentence for each field and each role in which a champion file differs from the fold of its chain."""
    differences = []
    for field in ("head", "increment"):
        if getattr(found, field) != getattr(expected, field):
            differences.append(f"{field} is {getattr(found, field)}, the chain says {getattr(expected, field)}")
    for field in ("bundles", "state"):
        ours, chains = _flat(getattr(found, field)), _flat(getattr(expected, field))
        differences += [
            f"{field} {name} is {ours.get(name)}, the chain says {chains.get(name)}"
            for name in sorted(ours.keys() | chains.keys())
            if ours.get(name) != chains.get(name)
        ]
    return differences


@contextmanager
def drafted(work_dir: Path | str, entry: Entry) -> Iterator[Draft]:
    """champion.json as `entry` will leave it, written beside the one that is served: a block that makes the entry's
    other files and publishes it. The digests in `entry.files` and with them its own may still be wanting.
    """
    work_dir = Path(work_dir)
    with writing(work_dir):
        before = Served.at_first(work_dir)
        if isinstance(entry, Manifest):
            current = Current.take(work_dir)
            current.advance(entry)
        else:
            current = Current(fold([entry, *load_chain(work_dir)]))
        with current.drafted(work_dir, before, entry) as draft:
            yield draft


def publish(
    work_dir: Path | str,
    staged_dir: Path | str,
    manifest: Entry,
    store: "Store | None" = None,
    withdrawn: Collection[str] = (),
    draft: Draft | None = None,
) -> None:
    """Publish an entry of the chain: a change, or an increment whose files stand in `staged_dir` and whose tensors are
    in the bank.

    `staged_dir` lies below <work_dir>/inflight. Everything is verified and made durable first; then the folder is
    renamed into the chain; then champion.json is replaced. A kill at any moment leaves the old champion or the new
    one, whole. Publishing the head again changes nothing. manifest.json is written here, run.json may stand beside
    it. With a `store`, the entry is published there before the folder is renamed here. `withdrawn` holds bank digests
    and names below increments/ that need not be there, since a later entry withdraws them. Where the increment was
    `drafted`, champion.json is on the disk already but for the head.

    Raises UserError when a staged file or bank file is missing, altered or not named by the manifest, or when the
    manifest does not follow the head, here or in the store, or the disk or the store refuses to take it.
    """
    work_dir = Path(work_dir)
    if draft is not None and manifest.model_copy(update={"files": draft.entry.files}) != draft.entry:
        raise ValueError(f"the draft was made for another entry than {manifest.folder}")
    with writing(work_dir):
        served = draft.before.now(work_dir) if draft is not None else read_champion(work_dir)
        if served is not None and served.head == manifest.sha256:
            return
        with drafted(work_dir, manifest) if draft is None else nullcontext(draft) as draft:
            _publish(work_dir, Path(staged_dir), manifest, served, draft, store, withdrawn)


def _publish(
    work_dir: Path,
    staged_dir: Path,
    manifest: Entry,
    served: Champion | None,
    draft: Draft,
    store: "Store | None",
    withdrawn: Collection[str],
) -> None:
    increments = work_dir / INCREMENTS
    folders = _newest_folders(increments, served)
    head = 0 if served is None else _head(work_dir, folders, served).increment
    if (manifest.increment, manifest.parent) != (head + 1, served.head if served else None):
        raise UserError(
            f"{work_dir}: increment {manifest.increment} does not follow the chain's head, which is increment "
            f"{head}; another run has published meanwhile: start this one again"
        )
    left_over = _left_over_folders(work_dir, served, head, folders)
    draft.settle(manifest.sha256)
    _verify_staged(work_dir, staged_dir, manifest, withdrawn)
    make_durable(staged_dir)
    if store is not None:
        store.publish(work_dir, staged_dir, manifest, served, draft.copy())
    for folder in left_over:
        shutil.rmtree(folder)
    increments.mkdir(exist_ok=True)
    fsync_dir(work_dir)
    os.rename(staged_dir, increments / manifest.folder)
    _remember(increments, manifest)
    fsync_dir(increments)
    draft.take_place()


def _verify_staged(work_dir: Path, staged_dir: Path, manifest: Entry, withdrawn: Collection[str]) -> None:
    """Every bank file and staged file is what the manifest says; manifest.json is written. Raises UserError."""
    bank = Bank(work_dir / "bank")
    for sha in sorted(set(digests_of(manifest)).difference(withdrawn)):
        bank.verify(sha)
    if not (staged_dir / MANIFEST).exists():
        write_atomic(staged_dir / MANIFEST, manifest.to_bytes(), durable=False)  # `make_durable` follows
    gone = {name.partition("/")[2] for name in withdrawn if name.startswith(f"{manifest.folder}/")}
    problems = folder_problems(staged_dir, manifest, gone)
    if problems:
        raise UserError(
            f"{staged_dir}: increment {manifest.increment} is not published: {'; '.join(problems)}; run it again"
        )


def digests_of(manifest: Entry) -> Iterator[str]:
    """Every bank file that an increment names; a change names none that must be there."""
    if isinstance(manifest, Manifest):
        for roles in (*manifest.bundles.values(), manifest.bank, manifest.state):
            yield from roles.values()


def read_published(work_dir: Path | str, folder: str, files: Mapping[str, str], name: str) -> bytes:
    """A file of an increment's folder, verified against the digests its manifest gives. Raises UserError naming it."""
    path = Path(work_dir) / INCREMENTS / folder / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it from a backup") from error
    if sha256_bytes(data) != files.get(name):
        raise UserError(f"{path}: is not the file its manifest names, it was altered; restore it from a backup")
    return data


def folder_problems(folder: Path, manifest: Entry, withdrawn: Container[str] = ()) -> list[str]:
    """One sentence for each file of an entry's folder that is missing, altered, not named by its manifest, or still
    there though `withdrawn`.
    """
    files = manifest.files if isinstance(manifest, Manifest) else {}
    expected = {name: sha for name, sha in files.items() if name not in withdrawn} | {MANIFEST: manifest.sha256}
    problems = []
    for name, sha in sorted(expected.items()):
        path = folder / name
        if path.is_symlink() or not path.is_file():
            problems.append(f"{name} is missing")
            continue
        try:
            found = sha256_file(path)
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
            continue
        if found != sha:
            problems.append(f"{name} was altered: it hashes to {found[:12]}..., the manifest says {sha[:12]}...")
    present = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    for name in sorted(present - expected.keys() - {RUN}):
        here = name in files
        problems.append(f"{name} {'was withdrawn and is still there' if here else 'is not named by the manifest'}")
    return problems


_STRAY = (".*.tmp", "bank/.*.tmp", "inflight/.*.tmp", "quarantine/*/.*.tmp", "prepared/*/.*")


def stray_files(work_dir: Path) -> list[Path]:
    """Files and folders that were being written when a job died; none of them ever gets its name."""
    return sorted(path for pattern in _STRAY for path in work_dir.glob(pattern))


def clean_left_overs(work_dir: Path | str) -> list[str]:
    """Remove `left_overs`; returns their names. Raises UserError, removing nothing, as it does."""
    work_dir = Path(work_dir)
    return remove_paths(work_dir, left_overs(work_dir))


def left_overs(work_dir: Path | str) -> list[Path]:
    """What a killed job left: an increment folder after the head, half-written files.

    Raises UserError when the folders beyond the head are not such a left-over: champion.json was then lost or set
    back, and removing them would destroy published work.
    """
    work_dir = Path(work_dir)
    champion = read_champion(work_dir)
    folders = list(increment_folders(work_dir))
    head = 0 if champion is None else _head(work_dir, folders, champion).increment
    return _left_over_folders(work_dir, champion, head, folders) + stray_files(work_dir)


def remove_paths(work_dir: Path, paths: Iterable[Path]) -> list[str]:
    """Remove files and folders; returns their names below the work_dir, sorted. Raises UserError where one stays."""
    paths = sorted(paths)
    with writing(work_dir):
        for path in paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    return [path.relative_to(work_dir).as_posix() for path in paths]


def _left_over_folders(
    work_dir: Path, champion: Champion | None, head: int, folders: list[tuple[int, Path]]
) -> list[Path]:
    """The increment folder beyond the head, if there is one. Raises UserError where it is no killed publish's."""
    beyond = [(number, folder) for number, folder in folders if number > head]
    if len(beyond) > 1 or any(number != head + 1 for number, _ in beyond):
        raise UserError(
            f"{work_dir / CHAMPION}: {'missing' if champion is None else f'its head is increment {head}'}, but "
            f"{INCREMENTS}/ holds {', '.join(folder.name for _, folder in beyond)}; restore {CHAMPION} from a backup, "
            "or move these folders away"
        )
    return [folder for _, folder in beyond]


def increment_folders(work_dir: Path | str, since: int = 0) -> Iterator[tuple[int, Path]]:
    """Number and path of every folder in increments/ that is named like an increment, from number `since` on, in order.

    Older ones cost next to nothing: their names are compared as they stand.
    """
    root = Path(work_dir) / INCREMENTS
    names = os.listdir(root) if root.is_dir() else []
    oldest = f"{since:04d}"
    found = []
    for name in [name for name in names if name >= oldest or "-" not in name[:5]]:
        digits = name.partition("-")[0]
        if digits.isdecimal() and int(digits) >= since:
            found.append((int(digits), name))
    for number, name in sorted(found):
        if _FOLDER.fullmatch(name) and (root / name).is_dir():
            yield number, root / name


# the head that this process published last, its number and folder, by the state that increments/ was left in
_remembered: dict[tuple[int, int, int], tuple[str, int, Path]] = {}


def _state(folder: Path) -> tuple[int, int, int]:
    """Changes with every entry that a folder gets or loses."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _remember(increments: Path, head: Entry) -> None:
    """A process that publishes on need not list increments/ again, which takes longer with every increment there is."""
    _remembered.clear()
    date = date_apart(increments)
    state = _state(increments)
    if state[-1] == date:  # else the file system keeps coarser times
        _remembered[state] = (head.sha256, head.increment, increments / head.folder)


def _newest_folders(increments: Path, champion: Champion | None) -> list[tuple[int, Path]]:
    """As `increment_folders`, from the head or an older one on."""
    if champion is not None and _remembered and increments.is_dir():
        head, number, folder = _remembered.get(_state(increments), ("", 0, increments))
        if head == champion.head:
            return [(number, folder)]
    return list(increment_folders(increments.parent, since=champion.increment if champion else 0))


def _head(work_dir: Path, folders: list[tuple[int, Path]], champion: Champion) -> Entry:
    """The chain's newest manifest, verified, without a walk of the chain. Raises UserError when missing or altered."""
    return _find(work_dir, folders, champion.head, f"{CHAMPION} names as the head")


def _find(work_dir: Path | str, folders: list[tuple[int, Path]], sha: str, who: str) -> Entry:
    """The manifest with digest `sha` among numbered folders, newest first."""
    for number, folder in reversed(folders):
        path = folder / MANIFEST
        try:
            data = path.read_bytes() if path.is_file() else b""
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions and the disk") from error
        if sha256_bytes(data) != sha:
            continue
        manifest = parse_manifest(data, path)
        if (folder.name, number) != (manifest.folder, manifest.increment):
            raise UserError(f"{folder}: this folder holds the manifest of {manifest.folder}; give it that name back")
        return manifest
    where = folders[-1][1] / MANIFEST if folders else Path(work_dir) / INCREMENTS
    raise UserError(f"{where}: the manifest {sha[:12]}... that {who} is missing or altered; restore it from a backup")


def _flat(table: dict[str, dict[str, str]]) -> dict[str, str]:
    """{task: {role: sha}} as {"task role": sha}; a task without roles shows as "task"."""
    return {
        f"{task} {role}".strip(): sha for task, roles in table.items() for role, sha in (roles or {"": "empty"}).items()
    }
