"""Look after what a work_dir has published, as its one writer.

    python jobs/bank.py --work-dir W restore K       the champion is again what it was after increment K
    python jobs/bank.py --work-dir W retire TASK     withdraw a task with its experts and its data
    python jobs/bank.py --work-dir W gc [--delete]   name, or remove, what no manifest reaches
    python jobs/bank.py --work-dir W sync [URI]      bring it into step with its store, or fill it from the one at URI

Restoring and retiring add an entry to the chain and rewrite nothing. Where the work_dir publishes into a store, each
action brings it into step first and holds for the store too (docs/STORAGE.md). Exit 0, or 2 with one sentence.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_contracts.errors import UserError


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line of the job."""
    parser = argparse.ArgumentParser(description="Restore a champion, retire a task, remove what nothing reaches.")
    parser.add_argument("--work-dir", required=True, help="the stream's work_dir")
    parser.add_argument("--break-lock", action="store_true", help="take over what a job of another machine left locked")
    actions = parser.add_subparsers(dest="action", required=True)
    restore = actions.add_parser("restore", help="make the champion again what it was after an increment")
    restore.add_argument("increment", type=int, metavar="K")
    retire = actions.add_parser("retire", help="withdraw a task with its experts and its data")
    retire.add_argument("task", metavar="TASK")
    collect = actions.add_parser("gc", help="name what no manifest reaches")
    collect.add_argument("--delete", action="store_true", help="and remove it")
    collect.add_argument("--dry-run", action="store_true", help="only name it, which is the default")
    sync = actions.add_parser("sync", help="bring the work_dir into step with its store")
    sync.add_argument("uri", nargs="?", metavar="URI", help="the store, where the work_dir does not name it yet")
    options = parser.parse_args(arguments)
    if options.action == "gc" and options.delete and options.dry_run:
        parser.error("--delete removes, --dry-run does not: give one of them")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the job; exit code 0, or 2 with one sentence."""
    options = parse(arguments)
    try:
        from pipeline.files import writing
        from pipeline.lock import WorkLock

        work_dir = Path(options.work_dir).expanduser().resolve()
        if options.action == "sync" and options.uri:
            with writing(work_dir):
                work_dir.mkdir(parents=True, exist_ok=True)
        if not work_dir.is_dir():
            raise UserError(f"work_dir {work_dir} is not there; name the work_dir of a stream that learned a task")
        with WorkLock(work_dir) as lock:
            lock.acquire(options.break_lock)
            act(work_dir, options)
    except UserError as error:
        print(f"bank: {error}", file=sys.stderr)
        return 2
    return 0


def act(work_dir: Path, options: argparse.Namespace) -> None:
    """What was asked for, and say what was done."""
    from pipeline.store.reconcile import complete, open_bound
    from pipeline.upkeep import collect_garbage, restore, retire, tell_mlflow

    store, said = open_bound(work_dir, getattr(options, "uri", None))
    for line in said:
        print(line)
    if options.action == "sync":
        if store is None:
            raise UserError(f"{work_dir} names no store; give its URI")
        print(f"{store.uri}: in step; {complete(work_dir, store)} objects that it had lost are stored again")
        return
    if options.action == "gc":
        names = collect_garbage(work_dir, options.delete, store, options.break_lock)
        for name in names:
            print(name)
        done = "removed" if options.delete else "would be removed (--delete removes them)"
        print(f"{len(names)} files and folders that nothing reaches {done}" if names else "everything is reached")
        return
    if options.action == "restore":
        changed = restore(work_dir, options.increment, store)
    else:
        changed = retire(work_dir, options.task, store)
    change = changed.change
    what = f"task {change.task} withdrawn" if change.task else f"the champion is as it was after increment {change.to}"
    print(f"increment {change.increment}: {what} ({change.sha256[:12]})")
    for name in changed.removed:
        print(f"  removed {name}")
    for note in [*changed.notes, *tell_mlflow(work_dir)]:
        print(f"  {note}")


if __name__ == "__main__":
    sys.exit(main())
