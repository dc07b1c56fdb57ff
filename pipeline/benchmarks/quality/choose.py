"""The learning rate of each method, chosen by validation on the suite's first order and then kept."""

import json
from collections.abc import Callable
from dataclasses import replace

from pipeline.benchmarks.quality.cells import CHOSEN, Setting, settings_of
from pipeline.benchmarks.quality.options import QualityOptions
from pipeline.benchmarks.quality.run import cells_of, run_cells
from pipeline.benchmarks.quality.suites import SUITES
from pipeline.evaluation import matrix
from pipeline.files import write_atomic

Tries = dict[float, float]  # learning rate -> ACC on validation


def choose(options: QualityOptions, say: Callable[[str], None]) -> dict[str, Tries]:
    """Try the learning rates for every setting that has its own; the tries by setting.

    Writes <out>/<suite>/chosen.json as each setting is done, from which later calls take the rates. The cells are
    ordinary ones: that of the chosen rate is the record's. A setting with `rate_of` is tried only if it is named.
    """
    settings = [one for one in settings_of(options.methods) if one.trains and (options.methods or not one.rate_of)]
    for setting in settings:
        setting.check()
    first = next(iter(SUITES[options.suite].orders))
    single = replace(options, orders=(first,), seeds=options.seeds[:1])
    found: dict[str, Tries] = {}
    for setting in settings:
        found[setting.name] = try_rates(single, setting, say)
        keep(options, setting.name, found[setting.name])
    return found


def try_rates(options: QualityOptions, setting: Setting, say: Callable[[str], None]) -> Tries:
    """ACC on validation by learning rate."""
    cells = [
        cell
        for rate in options.learning_rates
        for cell in cells_of(options, [setting], lambda _options, _setting, rate=rate: rate)
    ]
    records = run_cells(cells, say)
    return {cell.learning_rate: matrix.acc(r["R_validation"]) for cell, r in zip(cells, records, strict=True)}


def best(tries: Tries) -> float:
    """The rate with the highest ACC on validation; the smaller one of equals."""
    return min(tries, key=lambda rate: (-tries[rate], rate))


def keep(options: QualityOptions, name: str, tries: Tries) -> None:
    """Add one setting's choice to chosen.json."""
    path = options.folder / CHOSEN
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known[name] = {
        "learning_rate": best(tries),
        "validation_acc": {f"{rate:g}": round(acc, 6) for rate, acc in sorted(tries.items())},
        "budget": options.budget(),
    }
    write_atomic(path, (json.dumps(known, indent=1, sort_keys=True) + "\n").encode())


def as_table(found: dict[str, Tries]) -> str:
    """ACC on validation by setting and learning rate, and what was chosen."""
    rates = sorted({rate for tries in found.values() for rate in tries})
    lines = [f"| ACC on validation | {' | '.join(f'{rate:g}' for rate in rates)} | chosen |"]
    lines.append("|---|" + "---:|" * (len(rates) + 1))
    for name, tries in found.items():
        cells = [f"{100 * tries[rate]:.1f}" if rate in tries else "-" for rate in rates]
        lines.append(f"| {name} | {' | '.join(cells)} | {best(tries):g} |")
    return "\n".join(lines)
