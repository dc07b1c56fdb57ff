"""Onboard a business task: draft a contract from data, check contract and data, export the contract.

python jobs/onboard.py draft --data reviews.csv --task product_reviews --out product_reviews.yaml
python jobs/onboard.py check product_reviews.yaml --backbone demo/backbone
python jobs/onboard.py odcs product_reviews.yaml
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

import yaml

from data_contracts import UserError, load_contract
from data_contracts.draft import draft_contract
from data_contracts.odcs import to_odcs
from pipeline.data.ingest import examine


def main(arguments: list[str] | None = None) -> int:
    """Run one sub-command; returns 0, or 2 after a message on what to mend."""
    parser = argparse.ArgumentParser(description="Onboard a business task.")
    commands = parser.add_subparsers(dest="command", required=True)
    root_help = "folder or URI prefix the data must lie below (repeatable; default: the current folder)"

    check = commands.add_parser("check", help="check contracts and their data, print the verdict")
    check.add_argument("contracts", nargs="+", metavar="CONTRACT")
    check.add_argument("--root", action="append", metavar="DIR", help=root_help)
    check.add_argument("--backbone", metavar="DIR", help="model folder, or its URI, whose tokenizer counts the tokens")

    draft = commands.add_parser("draft", help="draft a contract from a data file")
    draft.add_argument("--data", required=True, metavar="F", help="CSV, JSON-lines or parquet file")
    draft.add_argument("--task", required=True, metavar="NAME")
    draft.add_argument("--out", metavar="F", help="where to write the contract (default: print it)")
    draft.add_argument("--root", action="append", metavar="DIR", help=root_help)

    odcs = commands.add_parser("odcs", help="print a contract in the Open Data Contract Standard")
    odcs.add_argument("contract", metavar="CONTRACT")

    options = parser.parse_args(arguments)
    try:
        if options.command == "check":
            return _check(options.contracts, options.root or ["."], options.backbone)
        if options.command == "draft":
            _draft(options.data, options.task, options.root or ["."], options.out)
        else:
            print(yaml.safe_dump(to_odcs(load_contract(options.contract)), sort_keys=False, allow_unicode=True), end="")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _check(contracts: list[str], roots: list[str], backbone: str | None) -> int:
    """Print every contract's verdict, also after one that failed."""
    tokenizer = None if backbone is None else _tokenizer(backbone)
    failed = False
    for path in contracts:
        try:
            verdict = examine(load_contract(path), roots, tokenizer=tokenizer).verdict
        except UserError as error:
            print(f"{error}\nFAIL: {path} could not be checked.\n")
            failed = True
            continue
        print(verdict.render() + "\n")
        failed = failed or not verdict.passed
    return 2 if failed else 0


def _tokenizer(backbone: str):
    from transformers import AutoTokenizer  # slow to import, and needed for token counts only

    from pipeline.backbones.fetch import local_backbone

    backbone = local_backbone(backbone)
    if not Path(backbone).is_dir():
        raise UserError(f"the backbone {backbone} is not a folder; name the model's folder")
    try:
        return AutoTokenizer.from_pretrained(backbone, use_fast=True, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the backbone {backbone} has no usable tokenizer ({str(error).splitlines()[0]}); "
            "fetch it again or name another"
        ) from None


def _draft(data: str, task: str, roots: list[str], out: str | None) -> None:
    text = draft_contract(data, task, roots)
    if out is None:
        print(text, end="")
        return
    if Path(out).exists():
        raise UserError(f"{out} exists already; name another file or remove it")
    try:
        Path(out).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); make its folder or name another file") from error
    print(f"Wrote {out}. Fill in the lines marked OWNER, then run: python jobs/onboard.py check {out}")


if __name__ == "__main__":
    sys.exit(main())
