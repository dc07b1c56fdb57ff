"""Export what a task is served with: `python jobs/export.py --work-dir W --task T --to DIR [--format peft|native]`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_contracts.errors import UserError


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line of the job."""
    parser = argparse.ArgumentParser(description="Write a task's bundle as a folder of its own (docs/EXPORT.md).")
    parser.add_argument("--work-dir", required=True, help="the stream's work_dir")
    parser.add_argument("--task", required=True, help="a learned task")
    parser.add_argument("--to", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--increment", type=int, help="as served after this increment (default: now)")
    parser.add_argument(
        "--format",
        choices=["peft", "native"],
        default="peft",
        help="peft: an adapter folder, where one LoRA says it all; native: the parts as they are (%(default)s)",
    )
    parser.add_argument("--base-model", metavar="NAME", help="what PEFT shall call the backbone (default: its folder)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the job; exit code 0, or 2 with one sentence."""
    options = parse(arguments)
    try:
        from pipeline.export import export, find_bundle

        found = find_bundle(options.work_dir, options.task, options.increment)
        names = export(found, options.to, options.format, options.base_model)
    except UserError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    print(f"task {found.task} as of increment {found.manifest.increment}: {options.to} holds {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
