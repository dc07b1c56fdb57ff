"""Check every host before a run, started as the run will be: `deepspeed [--hostfile F] jobs/preflight.py --stream S`.

Exit codes: 0 all is well, 1 something is red (or a host did not come), 2 the stream cannot be read. docs/PREFLIGHT.md
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_contracts.errors import UserError
from pipeline.startup import imports_without_collections


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; returns the exit code."""
    parser = argparse.ArgumentParser(description="Check every host before a run.")
    parser.add_argument("--stream", required=True, help="stream file, as for jobs/continual.py")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, as there")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds that ranks wait for others")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    options = parser.parse_args(arguments)
    if not options.timeout > 0:
        parser.error("--timeout must be above 0 seconds")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what is wrong is said in the report
    try:
        with imports_without_collections():
            from pipeline.config import load_stream

            config = load_stream(options.stream, options.set)
            from pipeline.preflight.run import run_preflight

        return run_preflight(config, options.timeout)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"preflight: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a group that failed would wait for its peers while the interpreter is taken down
