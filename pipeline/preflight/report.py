"""The table and the red lines, for a person."""

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.preflight.findings import Findings

MOST_COLUMNS = 8  # hosts that are shown: rank 0's, the red ones, then the others in order


def print_report(found: Findings) -> None:
    """Print all on the standard output; red lines at the end."""
    red = set().union(*(row.red for row in found.rows)) if found.rows else set()
    order = sorted(range(len(found.hosts)), key=lambda host: (host != 0, host not in red, host))
    shown = sorted(order[:MOST_COLUMNS])
    table = Table(box=None, pad_edge=False)
    table.add_column("check", no_wrap=True)
    for host in shown:
        table.add_column(found.hosts[host])
    for row in found.rows:
        style = "bold red" if row.red else ""
        cells = [Text(row.cells[host], "bold red" if host in row.red else "") for host in shown]
        table.add_row(Text(row.name, style), *cells)  # Text: what was found is never read as markup
    console = Console(width=None if sys.stdout.isatty() else 80 + 46 * len(shown))
    if found.rows:
        console.print(table)
    if hidden := len(found.hosts) - len(shown):
        alike = "" if red - set(shown) else ", none of them red"
        console.print(f"{hidden} more hosts are not shown{alike}")
    for line in found.red:
        console.print(Text("RED  " + line, "bold red"), soft_wrap=True)
    verdict = f"preflight: {len(found.red)} red" if found.red else "preflight: all is well"
    if found.rows:
        number = len(found.hosts)
        verdict += f" ({len(found.rows)} checks on {number} host{'s' * (number > 1)})"
    console.print(verdict, soft_wrap=True)
    sys.stdout.flush()
