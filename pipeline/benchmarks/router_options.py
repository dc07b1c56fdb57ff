"""The command line of `jobs/benchmark.py router`."""

import argparse
from pathlib import Path

from pipeline.config import RouterConfig


def add_router_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `router`; defaults are those of a stream's router."""
    add, default = parser.add_argument, RouterConfig()
    add("--backbone", required=True, metavar="B", help="folder of a backbone")
    add("--data", required=True, metavar="FOLDER", help="folder with one folder a task: <split>.parquet, column text")
    add("--out", required=True, metavar="F", type=Path, help="JSON report")
    add("--tasks", required=True, nargs="+", metavar="TASK", help="in the order they arrive; at least two")
    add("--layers", nargs="+", type=int, default=[default.layers], metavar="N", help="depths to choose from")
    add("--regularisation", nargs="+", type=float, default=[default.regularisation], metavar="X", help="to choose from")
    add("--features", type=int, default=default.features, metavar="N", help="random features (%(default)s)")
    add("--max-tokens", type=int, default=default.max_tokens, metavar="N", help="of a text (%(default)s)")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the backbone (%(default)s)")
    add("--seed", type=int, default=17, metavar="N", help="of the rows drawn (%(default)s)")
    for split, rows in (("train", 400), ("validation", 200), ("test", 500)):
        add(f"--{split}-rows", type=int, default=rows, metavar="N", help=f"{split} texts of a task (%(default)s)")
