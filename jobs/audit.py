"""Re-verify everything a work_dir has published: chain, files, bank, champion, MLflow and, where it publishes into one,
its store. Names what differs.

    python jobs/audit.py --work-dir W [--tracking-uri U] [--store-sizes]

Exit 0 when all agrees, 1 when something differs or MLflow was not told all of it yet, 2 when nothing is there.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_contracts.credentials import refuse_password
from data_contracts.errors import UserError
from pipeline.store.published import open_store
from pipeline.store.reconcile import store_of
from pipeline.tracking.audit import audit, read_links
from pipeline.tracking.audit_mlflow import unreachable
from pipeline.tracking.finding import Finding
from pipeline.tracking.registry import open_registry


def main(arguments: list[str] | None = None) -> int:
    """Run the audit; returns the exit code."""
    parser = argparse.ArgumentParser(description="Re-verify everything a work_dir has published.")
    parser.add_argument("--work-dir", required=True, type=Path, help="the stream's work_dir")
    parser.add_argument("--tracking-uri", help="MLflow's address; default: the database in the work_dir")
    parser.add_argument("--store-sizes", action="store_true", help="compare the sizes of the store's objects alone")
    options = parser.parse_args(arguments)
    try:
        refuse_password(options.tracking_uri, "--tracking-uri")
        findings = collect(options.work_dir, options.tracking_uri, not options.store_sizes)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    show(findings)
    return 0 if all(finding.ok for finding in findings) else 1


def collect(work_dir: Path, tracking_uri: str | None, contents: bool = True) -> list[Finding]:
    """All findings; that MLflow or the store cannot be opened is one of them."""
    store, unopened = None, []
    try:
        store = open_store(uri) if (uri := store_of(work_dir)) else None
    except UserError as error:
        unopened = [Finding("store", False, str(error))]
    manifests = [link.manifest for link in read_links(work_dir) if link.manifest]
    try:
        registry = open_registry(work_dir, manifests, tracking_uri)
    except Exception as error:  # what is on disk is audited whatever becomes of MLflow
        return [*audit(work_dir, None, store, contents), *unopened, unreachable(error)]
    return [*audit(work_dir, registry, store, contents), *unopened]


def show(findings: list[Finding]) -> None:
    """Print the table, then one line with the verdict."""
    table = Table("", "what", "seen", box=None, pad_edge=False)
    for finding in findings:
        mark = Text("PENDING", "bold yellow") if finding.pending else Text("DIFFERS", "bold red")
        mark = Text("ok", "green") if finding.ok else mark
        table.add_row(mark, Text(finding.name), Text(finding.detail))  # Text: what was found is never read as markup
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    pending = sum(finding.pending for finding in findings)
    wrong = sum(not finding.ok for finding in findings) - pending
    verdict = [f"{wrong} differ"] * bool(wrong) + [f"{pending} not yet delivered to MLflow"] * bool(pending)
    console.print(f"{len(findings)} checked, {', '.join(verdict) or 'all agree'}")


if __name__ == "__main__":
    sys.exit(main())
