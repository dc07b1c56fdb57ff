"""The audit's half in the store: its pointer, and every object that the chain leads to, against the manifests."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_contracts.errors import UserError
from pipeline.store.published import Store, reached_objects
from pipeline.tracking.chain import INCREMENTS
from pipeline.tracking.champion import CHAMPION, Champion
from pipeline.tracking.finding import Finding
from pipeline.tracking.history import History
from pipeline.tracking.manifest import Entry
from pipeline.tracking.withdrawal import withdrawn_names


def store_findings(
    work_dir: Path, chain: Sequence[Entry], champion: Champion | None, store: Store, contents: bool = True
) -> Iterator[Finding]:
    """The store against a work_dir's readable manifests and champion; without `contents` its objects are not read, and
    their sizes alone compared. That it cannot be reached is one more finding.
    """
    try:
        yield from _compare(work_dir, chain, champion, store, contents)
    except UserError as error:
        yield Finding("store", False, str(error))


def _compare(
    work_dir: Path, chain: Sequence[Entry], champion: Champion | None, store: Store, contents: bool
) -> Iterator[Finding]:
    pointer = store.pointer()
    where = f"store {CHAMPION}"
    if champion is None or pointer.head != champion.head:
        ours = champion.head[:12] if champion else "nothing"
        detail = f"leads to {(pointer.head or 'nothing')[:12]}, the work_dir to {ours}"
        yield Finding(where, False, f"{detail}; the next launch, or jobs/bank.py sync, brings them into step")
    elif pointer.champion != champion:
        yield Finding(where, False, f"names this head and other bundles than the work_dir's {CHAMPION}")
    else:
        yield Finding(where, True, f"{store.uri} leads to {champion.head[:12]} as here")
    if pointer.sweeping:
        yield Finding(where, False, f"marked by a job that removes objects: {dict(pointer.sweeping)}")
    known = {entry.sha256: entry for entry in chain}
    newer, common = store.after(known, pointer.head)
    entries = [*newer, *(entry for entry in chain if common and entry.increment <= known[common].increment)]
    yield from _objects(work_dir, entries, store, contents)


def _objects(work_dir: Path, entries: Sequence[Entry], store: Store, contents: bool) -> Iterator[Finding]:
    gone = withdrawn_names(History.of(entries))
    reached = reached_objects(work_dir, entries, gone)
    sizes = store.names()
    damaged = 0
    for name, source in sorted(reached.items()):
        problem = None
        if name not in sizes:
            problem = "is missing; jobs/bank.py sync stores it again from a work_dir that has it"
        elif source is None:  # run.json: outside the chain, no digest names it
            continue
        elif contents:
            problem = _altered(store, name, source.sha256)
        elif source.path.is_file() and source.path.stat().st_size != sizes[name]:
            problem = f"has {sizes[name]} bytes, here it has {source.path.stat().st_size}"
        if problem:
            damaged += 1
            yield Finding(f"store {name}", False, problem)
    once = reached_objects(work_dir, entries).keys() - reached.keys()
    for name in sorted(once & sizes.keys()):
        damaged += 1
        yield Finding(f"store {name}", False, "was withdrawn and is still there; jobs/bank.py gc --delete removes it")
    spare = len(sizes.keys() - reached.keys() - once)
    if not damaged:
        detail = f"{len(reached)} objects, {'digests' if contents else 'sizes alone'} agree"
        detail += f"; {spare} more belong to no increment (jobs/bank.py gc names them)" if spare else ""
        yield Finding(f"store bank and {INCREMENTS}", True, detail)


def _altered(store: Store, name: str, sha: str) -> str | None:
    try:
        for _ in store.verified(name, sha):
            pass
    except UserError as error:
        return str(error)
    return None
