"""The fault harness: break runs of three increments, continue them, compare them with the unbroken run to the bit.

    python -m tests.faults.driver [--short | --setting NAME]... [--seed N] [--keep FOLDER] [--out FILE]

Everything is imported once; each launch is forked from here. Ends with exit 1 where a row was lost or repeated, a
champion was torn, an end differed or a process did not end by itself.
"""

import argparse
import json
import resource
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.faults import elastic, plans
from tests.faults.launch import import_everything
from tests.faults.runs import Broken, Unbroken, broken_run, unbroken_run
from tests.faults.streams import SETTINGS, Inputs
from tests.faults.watch import Fault

Plan = Callable[[Unbroken, int], list[Fault]]
LONG: dict[str, tuple[Plan, ...]] = {
    "dense-fp32": (
        lambda unbroken, seed: plans.publish_sweep(unbroken, 2, seed),
        lambda unbroken, seed: plans.at_edges(unbroken, 6, seed),
    ),
    "dense-bf16": (
        plans.at_edges_of_all_stages,
        lambda unbroken, seed: plans.by_the_clock(unbroken, 5, seed),
    ),
    "routed-fp32": (
        plans.at_edges_of_all_stages,
        lambda unbroken, seed: plans.by_the_clock(unbroken, 5, seed),
    ),
    "routed-bf16": (
        lambda unbroken, seed: plans.publish_sweep(unbroken, 3, seed, every=3),
        lambda unbroken, seed: plans.at_edges(unbroken, 8, seed),
    ),
}


def short(unbroken: Unbroken, seed: int) -> list[Fault]:
    """A handful: in a save, in a bank's file, inside publish before the rename of the folder and of the champion."""
    chosen = []
    for increment, place, contains, how in (
        (1, "state 3 file", "os.rename", "rank"),
        (2, "bank file", "os.rename", "ranks"),
        (2, "publish file", "os.rename /inflight", "group"),
        (3, "publish file", "os.rename /.champion", "ranks"),
    ):
        chosen.append(
            next(
                plans.at(point, how)
                for point in unbroken.points
                if (point["increment"], point["place"]) == (increment, place) and contains in point["detail"]
            )
        )
    return chosen


def main(arguments: list[str] | None = None) -> int:
    """Run the harness; the exit code."""
    parser = argparse.ArgumentParser(description="Kill runs, continue them, compare them with unbroken ones.")
    parser.add_argument("--short", action="store_true", help="one setting and a handful of kills")
    parser.add_argument("--setting", action="append", choices=sorted(LONG), help="of the long version, only this one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder that takes work_dirs and logs (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="file that takes all results as JSON")
    options = parser.parse_args(arguments)
    import_everything()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        inputs = Inputs(folder / "inputs")
        inputs.folder.mkdir(parents=True)
        inputs.make()
        wanted = {"routed-fp32": (short,)} if options.short else {name: LONG[name] for name in options.setting or LONG}
        runs, references = [], {}
        for name, of_setting in wanted.items():
            unbroken = references[name] = unbroken_run(inputs, SETTINGS[name], folder / name / "unbroken")
            for number, plan in enumerate(of_setting):
                faults = plan(unbroken, options.seed + number)
                runs.append(broken_run(inputs, unbroken, faults, folder / name / f"broken-{number}"))
                print(line_of(runs[-1]), flush=True)
        plan = [one for one in (elastic.SHORT if options.short else elastic.LONG) if one.setting in references]
        worlds = [elastic.continue_elsewhere(inputs, references[one.setting], one, folder / "worlds") for one in plan]
    print(report(runs), elastic.report(worlds), cpu_used(), sep="\n\n", flush=True)
    if options.out:
        results = {"runs": [asdict(run) for run in runs], "worlds": [asdict(world) for world in worlds]}
        options.out.write_text(json.dumps(results))
    return int(any(bad(run) for run in runs) or any(world.problems for world in worlds))


def bad(run: Broken) -> bool:
    """Whether a run did not end as the unbroken one."""
    torn = any(strike.torn or strike.left for strike in run.strikes)
    return bool(run.differing or run.lost or run.repeated or run.end or torn)


def line_of(run: Broken) -> str:
    """A run in a line, with what is wrong below it."""
    text = f"{run.setting.name}: {len(run.strikes)} kills, {run.not_reached} not reached"
    problems = [f"differs: {name}" for name in run.differing] + ([run.end] if run.end else [])
    problems += [f"{strike.point['place']}: {problem}" for strike in run.strikes for problem in strike.torn]
    problems += [f"{strike.point['place']}: ranks {strike.left} did not end" for strike in run.strikes if strike.left]
    return "\n  ".join([text, *problems])


def report(runs: list[Broken]) -> str:
    """The table of where kills fell, and the sums."""
    rows: dict[str, dict[str, Any]] = {}
    for run in runs:
        for strike in run.strikes:
            kind = "random moment" if strike.timed else plans.kind_of(strike.point["place"])
            row = rows.setdefault(kind, {"kills": 0, "rank": 0, "ranks": 0, "group": 0, "torn": 0, "seconds": 0.0})
            row["kills"] += 1
            row[strike.how] += 1
            row["torn"] += bool(strike.torn)
            row["seconds"] = max(row["seconds"], strike.seconds_to_end)
    head = ("where", "kills", "one rank", "all ranks", "whole group", "torn", "longest to job end, s")
    body = [
        (kind, row["kills"], row["rank"], row["ranks"], row["group"], row["torn"], f"{row['seconds']:.1f}")
        for kind, row in sorted(rows.items(), key=lambda item: -item[1]["kills"])
    ]
    sums = {name: sum(row[name] for row in rows.values()) for name in ("kills", "rank", "ranks", "group", "torn")}
    body.append(("all", *sums.values(), f"{max((row['seconds'] for row in rows.values()), default=0):.1f}"))
    return "\n".join(
        [
            plans.table([head, *body]),
            f"{len(runs)} runs on {', '.join(dict.fromkeys(run.setting.name for run in runs))}; rows lost "
            f"{sum(run.lost for run in runs)}, repeated {sum(run.repeated for run in runs)}; torn {sums['torn']}; "
            f"ends that differ from the unbroken run {sum(bool(run.differing or run.end) for run in runs)}",
        ]
    )


def cpu_used() -> str:
    """CPU seconds of this process and all it started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return f"CPU {sum(one.ru_utime + one.ru_stime for one in used):.0f} s"


if __name__ == "__main__":
    sys.exit(main())
