"""Learn every task of a stream that is not learned yet: `deepspeed jobs/continual.py --stream FILE [--set k=v]...`.

Exit codes: 0 done, 2 refused or given up with a sentence on what to mend (a contract, a full disk, a loss that is no
number), 3 rejected by the gate, 75 stopped on request with the state saved, 1 any other failure. The work_dir's
`finished.json` says the same, since a launcher can exit 0 after its own death.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_contracts.errors import UserError
from pipeline.startup import imports_without_collections
from pipeline.training.stop import EXIT_STOPPED, StopFlag, StoppedOnRequest
from pipeline.watch.rank import watched

DEVICE_FREE_STAGES = ("validate", "prepare")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line of the job."""
    parser = argparse.ArgumentParser(description="Learn the tasks of a stream one after another.")
    parser.add_argument("--stream", required=True, help="stream file, see jobs/streams/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. training.epochs=2"
    )
    parser.add_argument("--until", metavar="TASK", help="stop after this task of the stream")
    parser.add_argument("--stages", help="run only 'validate' or 'validate,prepare', without a device")
    parser.add_argument("--break-lock", action="store_true", help="take over what a job of another machine left locked")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    options = parse(arguments)
    stop = StopFlag()
    stop.listen()
    try:
        with imports_without_collections():  # they cost seconds: signals and arguments come first
            from pipeline.config import load_stream

            try:
                config = load_stream(options.stream, options.set)
            except UserError as error:
                if not options.stages:
                    refuse_on_all_hosts(error)
                raise
            from pipeline.continual import prepare_only, run_stream

        if options.stages:
            return prepare_only(config, device_free_stages(options.stages), options.break_lock)
        return run_stream(config, options.until, stop, options.break_lock)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the ranks of a host see the same mistake
            print(f"continual: {error}", file=sys.stderr)
        return 2
    except StoppedOnRequest as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"continual: {stopped}", file=sys.stderr)
        return EXIT_STOPPED


def refuse_on_all_hosts(error: UserError) -> None:
    """Raise a mistake on the ranks of other hosts too, which wait for this one's."""
    from pipeline.hosts.launcher import several_hosts

    if several_hosts():
        from pipeline.hosts.meeting import refused_together

        with refused_together():
            raise error


def device_free_stages(text: str) -> list[str]:
    """The names in `--stages`. Raises UserError for others than those that need no device."""
    stages = text.split(",")
    if tuple(stages) not in (DEVICE_FREE_STAGES[:1], DEVICE_FREE_STAGES):
        raise UserError(f"--stages {text}: choose 'validate' or 'validate,prepare'")
    return stages


if __name__ == "__main__":
    sys.exit(watched(main))
