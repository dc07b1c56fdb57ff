"""What is done to a work_dir besides learning: an earlier champion restored, a task retired, unreachable files removed.

The caller holds the work_dir's lock (lock.py). A change is published as an entry of the chain (tracking/manifest.py);
nothing that stands there is rewritten. Removing files comes after it: a job killed in between has removed too little,
and the same command, or `gc`, goes on.
"""

import json
import shutil
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from data_contracts.credentials import shown
from data_contracts.errors import UserError
from pipeline.config import TrackingConfig
from pipeline.experts.bank import Bank
from pipeline.files import canonical_json, write_atomic, writing
from pipeline.lock import user_name
from pipeline.store.published import Store, reached_objects
from pipeline.tracking.chain import (
    INCREMENTS,
    clean_left_overs,
    digests_of,
    left_overs,
    load_chain,
    publish,
    remove_paths,
)
from pipeline.tracking.history import History
from pipeline.tracking.manifest import ROUTER, RUN, Change, Entry, Manifest
from pipeline.tracking.withdrawal import remove_withdrawn, withdrawn_names, withdrawn_paths


@dataclass(frozen=True)
class Changed:
    """A change that stands, and what was said and removed on the way."""

    change: Change
    notes: list[str]
    removed: list[str]  # below the work_dir


def restore(work_dir: Path, number: int, store: Store | None = None) -> Changed:
    """Make the champion again what it was after entry `number`: bundles, method state and router.

    Tasks retired since stay withdrawn. Raises UserError where that entry was rejected, changes nothing, or was served
    with files that are withdrawn or damaged.
    """
    chain = opened(work_dir)
    history = History.of(chain)
    entry = next((entry for entry in chain if entry.increment == number), None)
    if entry is None:
        raise UserError(f"{work_dir} has no increment {number}; it has 1 to {history.length}")
    if entry.verdict == "rejected":
        raise UserError(f"increment {number} was rejected and never was the champion; name a promoted one")
    change = Change(increment=history.length + 1, parent=history.head_sha256, verdict="restored", to=number)
    after = History.of([change, *chain])
    if (after.bundles, after.state) == (history.bundles, history.state):
        raise UserError(f"the champion is as it was after increment {number}; there is nothing to restore")
    for task, bundle in after.bundles.items():
        history.refuse_withdrawn(bundle, f"increment {number} cannot be restored: it serves task '{task}' with")
    bank = Bank(work_dir / "bank")
    for table in (after.bundles, after.state):
        for sha in {sha for roles in table.values() for sha in roles.values()}:
            bank.verify(sha)
    then = History.of([entry for entry in chain if entry.increment <= number])
    notes = [
        f"task {task} stays withdrawn (increment {history.retired[task]})"
        for task in then.bundles
        if task not in after.bundles
    ]
    if gone := [task for task in history.bundles if task not in after.bundles]:
        notes.append(f"not served any more: {', '.join(gone)}; a stream that names them learns them again")
    _publish(work_dir, change, store)
    return Changed(change, notes, [])


def retire(work_dir: Path, task: str, store: Store | None = None) -> Changed:
    """Withdraw a task: its bundle and state leave the champion, and what its increments put into the bank, every router
    that has seen its rows, its predictions, quarantine and prepared shards are removed.

    Retired already: removes what is still there. Raises UserError for an unknown task, and where another task is served
    with an expert that this one's increments made.
    """
    chain = opened(work_dir)
    history = History.of(chain)
    increments = [entry for entry in chain if isinstance(entry, Manifest)]
    ours = [manifest for manifest in increments if manifest.task == task]
    if not ours:
        known = ", ".join(sorted({manifest.task for manifest in increments})) or "none yet"
        raise UserError(f"task '{task}' was never learned in {work_dir}; there are: {known}")
    if max(manifest.increment for manifest in ours) < history.retired.get(task, 0):
        change = next(c for c in reversed(history.changes) if c.task == task)
        removed = _remove_withdrawn(work_dir, chain, store)
        return Changed(change, ["was retired before; what was left of it is removed"], removed)
    others = {sha for manifest in increments if manifest.task != task for sha in own_digests(manifest)}
    routers = routers_of(work_dir, increments, task) - history.withdrawn.keys()
    made = ({sha for manifest in ours for sha in own_digests(manifest)} - others - history.withdrawn.keys()) | routers
    for other, bundle in history.bundles.items():
        needed = [role for role, sha in sorted(bundle.items()) if sha in made]
        if other != task and needed:
            first = min(manifest.increment for manifest in ours)
            restore = f"restore the champion of before increment {first}, or " if first > 1 else ""
            raise UserError(
                f"task '{task}' cannot be withdrawn: task '{other}' is served with its {' and '.join(needed)}; "
                f"{restore}retire '{other}' first"
            )
    before = {name for entry in history.changes for name in entry.withdrawn_files}
    files = {
        f"{manifest.folder}/{name}": manifest.files[name]
        for manifest in increments
        for name in (f"predictions/{task}.parquet", f"predictions_inferred/{task}.parquet")
        if name in manifest.files and f"{manifest.folder}/{name}" not in before
    }
    data = [*(work_dir / "prepared" / task).iterdir()] if (work_dir / "prepared" / task).is_dir() else []
    data += (work_dir / "quarantine" / task).glob("*.parquet")
    change = Change(
        increment=history.length + 1,
        parent=history.head_sha256,
        verdict="retired",
        task=task,
        withdrawn=tuple(sorted(made)),
        withdrawn_files=files,
        withdrawn_data=tuple(sorted(path.relative_to(work_dir).as_posix() for path in data)),
    )
    notes = []
    first = min(manifest.increment for manifest in ours)
    if later := [entry.task for entry in history.learned.values() if entry.increment > first and entry.task != task]:
        notes.append(
            f"{', '.join(later)} learned after it and may go on from what it left in shared experts; only learning "
            "these again without it takes that out"
        )
    if routers and any(ROUTER in names for names in history.state.values()):
        notes.append("the router has seen its rows and is withdrawn too; the next increment learns one anew")
    _publish(work_dir, change, store)
    return Changed(change, notes, _remove_withdrawn(work_dir, [change, *chain], store))


def collect_garbage(work_dir: Path, delete: bool, store: Store | None = None, take_over: bool = False) -> list[str]:
    """Names below the work_dir of what no manifest of the chain reaches, removed if `delete`: bank files, half-written
    files, left-overs of a killed publish, and whatever of withdrawn tasks is still there. With a `store`, in step with
    the work_dir, the same of its objects; `take_over` goes on where a job was killed that removed some.
    """
    chain = opened(work_dir, clean=False)
    reached = {sha for entry in chain for sha in digests_of(entry)} - History.of(chain).withdrawn.keys()
    bank = Bank(work_dir / "bank")
    found = {bank.path(sha) for sha in bank.digests() if sha not in reached}
    found |= {*left_overs(work_dir), *(work_dir / "inflight").glob("publish-*"), *withdrawn_paths(work_dir, chain)}
    names = remove_paths(work_dir, found) if delete else sorted(p.relative_to(work_dir).as_posix() for p in found)
    if store is not None:
        kept = reached_objects(work_dir, chain, withdrawn_names(History.of(chain))).keys()
        stray = lambda: sorted(store.names().keys() - kept)  # noqa: E731
        gone = store.sweep(chain[0].sha256, stray, take_over) if delete else stray()
        names += [f"{store.uri}/{name}" for name in gone]
    return names


def _remove_withdrawn(work_dir: Path, chain: list[Entry], store: Store | None) -> list[str]:
    """Remove what retired tasks withdrew, here and in the store; returns the names."""
    names = remove_withdrawn(work_dir, chain)
    if store is not None:
        history = History.of(chain)
        entries = {entry.folder: f"{INCREMENTS}/{entry.sha256}" for entry in chain}
        withdrawn = {f"bank/{sha}.safetensors" for sha in history.withdrawn}
        for name in withdrawn_names(history) - history.withdrawn.keys():
            folder, _, file = name.partition("/")
            withdrawn.add(f"{entries[folder]}/{file}")
        there = lambda: [name for name in withdrawn if store.objects.size(name) is not None]  # noqa: E731
        names += [f"{store.uri}/{name}" for name in store.sweep(chain[0].sha256, there)]
    return names


def opened(work_dir: Path, clean: bool = True) -> list[Entry]:
    """The verified chain of a work_dir, newest first, what a killed job left removed. Raises UserError without one."""
    if clean:
        clean_left_overs(work_dir)
    chain = load_chain(work_dir)
    if not chain:
        raise UserError(f"work_dir {work_dir} has no published increment; run jobs/continual.py first")
    return chain


def own_digests(manifest: Manifest) -> set[str]:
    """The bank files that an increment made."""
    return {*manifest.bank.values(), *manifest.state.values()}


def routers_of(work_dir: Path, increments: list[Manifest], task: str) -> set[str]:
    """Bank digests of the routers, that are still there, which have seen rows of a task."""
    bank = Bank(work_dir / "bank")
    routers = {manifest.bank[ROUTER] for manifest in increments if ROUTER in manifest.bank}
    routers |= {manifest.state[ROUTER] for manifest in increments if ROUTER in manifest.state}
    return {sha for sha in routers if bank.has(sha) and task in bank.metadata(sha).get("tasks", [])}


def _publish(work_dir: Path, change: Change, store: Store | None) -> None:
    """Put a change into the chain. The in-flight state goes: it belongs to an increment after another head."""
    staged = work_dir / "inflight" / f"publish-{change.increment}"
    record = {
        "published": datetime.now(UTC).isoformat(timespec="seconds"),
        "user": user_name(),
        "host": socket.gethostname(),
        "work_dir": str(work_dir),
    }
    with writing(work_dir):
        shutil.rmtree(work_dir / "inflight", ignore_errors=True)
        write_atomic(staged / RUN, canonical_json(record).encode())
        publish(work_dir, staged, change, store)
        shutil.rmtree(work_dir / "inflight", ignore_errors=True)


def tell_mlflow(work_dir: Path) -> list[str]:
    """Tell MLflow of the changes it does not know. That it cannot be reached stops nothing: the outbox keeps them, and
    the next launch delivers them.
    """
    from pipeline.tracking.mlflow_log import Tracker

    history = History.of(opened(work_dir))
    try:
        config = json.loads((work_dir / INCREMENTS / history.newest.folder / RUN).read_text(encoding="utf-8"))["config"]
        tracker = Tracker(work_dir, config["stream"], TrackingConfig.model_validate(config["tracking"]))
        tracker.catch_up(history)
        tracker.close()
    except Exception as error:  # of whatever kind: a server, a database driver and MLflow each raise their own
        reason = shown(" ".join(f"{type(error).__name__} {error}".split()))[:300]
        return [f"MLflow was not told ({reason}); the next run of jobs/continual.py tells it"]
    return []
