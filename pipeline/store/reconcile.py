"""A work_dir and its store brought into step, as a job that writes begins.

Published work moves in the store first, so a work_dir is usually in step, or behind after a kill or another machine's
turn: what it lacks is fetched, verified and published here too, entry by entry. It is ahead where a store is named for
the first time: what the store lacks is stored, and its pointer follows. Where both have gone on by themselves, nothing
is decided for the user.

    <work_dir>/store.json   {"uri"} of the store that this work_dir publishes into
"""

import json
import shutil
from collections.abc import Container
from pathlib import Path

from data_contracts.errors import UserError
from pipeline.experts.bank import Bank
from pipeline.files import atomic_file, canonical_json, write_atomic, writing
from pipeline.store.published import MARKER, REPAIR, Pointer, Store, Upload, objects_of, open_store
from pipeline.tracking.chain import INCREMENTS, fold, load_chain, publish
from pipeline.tracking.champion import CHAMPION, Champion, read_champion
from pipeline.tracking.history import History
from pipeline.tracking.manifest import RUN, Entry
from pipeline.tracking.sharing import identity
from pipeline.tracking.withdrawal import remove_withdrawn, withdrawn_names
from pipeline.watch import rank as watch


def store_of(work_dir: Path) -> str | None:
    """The URI of the store that a work_dir publishes into; None where it stands alone."""
    path = work_dir / MARKER
    try:
        return json.loads(path.read_text(encoding="utf-8"))["uri"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}: cannot be read ({error}); write {{"uri": ...}} into it, or remove it') from error


def open_in_step(work_dir: Path, uri: str | None) -> list[str]:
    """Bring a work_dir, whose lock the caller holds, into step with the store at `uri`; says what was done.

    Raises UserError where the two have gone on apart, where the store cannot be used, and where none is named though
    the work_dir publishes into one.
    """
    bound = store_of(work_dir)
    if uri is None:
        if bound is not None:
            raise UserError(
                f"{work_dir} publishes into {bound} and the stream names no store; set store.uri, or remove "
                f"{work_dir / MARKER} to go on without it"
            )
        return []
    store = _named(work_dir, uri)
    store.check_conditions()
    store.refuse_sweeping(store.pointer())
    return bring_into_step(work_dir, store)


def open_bound(work_dir: Path, uri: str | None = None) -> tuple[Store | None, list[str]]:
    """The store that a work_dir, whose lock the caller holds, publishes into, or is to from now on (`uri`), the two in
    step, and what was done for that; None where it stands alone. Raises UserError as `open_in_step` does.
    """
    uri = uri or store_of(work_dir)
    if uri is None:
        return None, []
    store = _named(work_dir, uri)
    return store, bring_into_step(work_dir, store)


def _named(work_dir: Path, uri: str) -> Store:
    store = open_store(uri)
    if Path(store.uri).is_relative_to(work_dir):
        raise UserError(f"store.uri {uri}: lies in the work_dir {work_dir}; name a folder of its own")
    return store


def bring_into_step(work_dir: Path, store: Store) -> list[str]:
    """`open_in_step` with an open store; needs no right to write into it where the work_dir is behind."""
    pointer, ours = store.pointer(), read_champion(work_dir)
    said = []
    if pointer.head != (ours.head if ours else None):
        chain = load_chain(work_dir)
        known = {entry.sha256: entry.increment for entry in chain}
        missing, common = store.after(known, pointer.head)
        if missing and common == (ours.head if ours else None):
            _check_champion(store, pointer, fold([*missing, *chain]))
            if not chain:
                identity(work_dir)  # before there are increments, by which a work_dir from before ids is known
            fetch(work_dir, store, missing, chain)
            said.append(f"{store.uri}: took over {_numbers(missing)}")
        elif not missing:
            ahead = chain[: len(chain) - known.get(common, 0)]
            push(work_dir, store, ahead, chain, common)
            said.append(f"{store.uri}: stored {_numbers(ahead)}")
        else:
            raise UserError(
                f"{work_dir} and {store.uri} have gone on apart: here increment {chain[0].increment} "
                f"({ours.head[:12]}) is the newest, there increment {missing[0].increment} ({pointer.head[:12]}); go "
                "on in an empty work_dir, which is filled from the store, or name another store"
            )
    else:
        _check_champion(store, pointer, ours)
        said += [f"{name}: was withdrawn, removed" for name in remove_withdrawn(work_dir, load_chain(work_dir))]
    if store_of(work_dir) != store.uri:
        with writing(work_dir):
            write_atomic(work_dir / MARKER, canonical_json({"uri": store.uri}).encode())
    return said


def _check_champion(store: Store, pointer: Pointer, expected: Champion | None) -> None:
    if pointer.champion != expected:
        raise UserError(f"{store.uri}/{CHAMPION}: was altered, its chain leads to another champion; {REPAIR}")


def fetch(work_dir: Path, store: Store, missing: list[Entry], chain: list[Entry]) -> None:
    """Publish in a work_dir the entries, newest first, that follow its chain in the store; a kill leaves some."""
    gone = withdrawn_names(History.of([*missing, *chain]))
    bank = Bank(work_dir / "bank")
    for entry in reversed(missing):
        watch.report(f"fetching increment {entry.increment} from {store.uri}")
        staged = work_dir / "inflight" / f"publish-{entry.increment}"
        with writing(work_dir):
            shutil.rmtree(staged, ignore_errors=True)
            for name, source in objects_of(entry, work_dir, staged, gone).items():
                if name.startswith("bank/"):
                    if not bank.has(source.sha256):
                        bank.take(source.sha256, store.verified(name, source.sha256))
                    continue
                with atomic_file(source.path) as file:
                    file.writelines(store.verified(name, source.sha256))
            if run := store.objects.read(f"{INCREMENTS}/{entry.sha256}/{RUN}"):
                write_atomic(staged / RUN, run[0])
        publish(work_dir, staged, entry, withdrawn=gone)
    remove_withdrawn(work_dir, [*missing, *chain])


def push(work_dir: Path, store: Store, ahead: list[Entry], chain: list[Entry], common: str | None) -> None:
    """Store the entries `ahead`, newest first, of a work_dir's chain and move the pointer from the head `common`."""
    champion = read_champion(work_dir)
    store.move(sources(work_dir, ahead, withdrawn_names(History.of(chain))), common, champion)


def complete(work_dir: Path, store: Store) -> int:
    """Store again what a store, in step with a work_dir, has lost; the number of objects."""
    chain = load_chain(work_dir)
    there, number = store.names(), 0
    for objects, _, _ in sources(work_dir, chain, withdrawn_names(History.of(chain))):
        lost = {name: source for name, source in objects.items() if name not in there}
        if lost:
            store.upload(lost)
            number += len(lost)
    for entry in chain:
        run, name = work_dir / INCREMENTS / entry.folder / RUN, f"{INCREMENTS}/{entry.sha256}/{RUN}"
        if name not in there and run.is_file() and store.objects.create(name, [run.read_bytes()]):
            number += 1
    return number


def sources(work_dir: Path, entries: list[Entry], gone: Container[str]) -> list[Upload]:
    """Of each entry, oldest first, what `Store.move` asks for, as it stands in a work_dir."""
    found = []
    for entry in reversed(entries):
        folder = work_dir / INCREMENTS / entry.folder
        found.append((objects_of(entry, work_dir, folder, gone), entry.sha256, folder / RUN))
    return found


def _numbers(entries: list[Entry]) -> str:
    """Entries, newest first, in words."""
    first, last = entries[-1].increment, entries[0].increment
    return f"increment {first}" if first == last else f"increments {first} to {last}"
