"""Streams learned over hosts, compared with one host; hosts, ranks and connections broken on the way.

    python -m tests.cluster.driver [--short] [--only NAME]... [--out FILE] [--keep FOLDER]

Ends with exit 1 where something is not as promised in docs/CLUSTER.md; prints what was measured as tables.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.cluster import failures
from tests.cluster.cluster import Cluster, cluster, missing
from tests.cluster.launch import End, launch
from tests.faults.launch import import_everything
from tests.faults.runs import published
from tests.faults.streams import SETTINGS, Inputs


@dataclass(frozen=True)
class Run:
    """A stream over hosts that must end as on one host, bit for bit."""

    setting: str
    hosts: int
    storage: str  # shared | own: where the work_dir is
    how: str = "forked"
    until: str = "second"
    strike: str = ""

    @property
    def name(self) -> str:
        return f"{self.setting} on {self.hosts} hosts, {self.storage} work_dir, {self.how}" + (
            f", {self.strike}" if self.strike else ""
        )


SHORT = [Run("routed-fp32", 2, "own", until="first")]
LONG = [
    Run("dense-fp32", 2, "shared", "deepspeed", strike="sshd listener killed"),
    Run("dense-fp32", 2, "own", "torchrun"),
    Run("routed-bf16", 2, "shared", "srun"),
    Run("routed-bf16", 2, "own", "deepspeed"),
    Run("dense-bf16", 3, "shared"),
    Run("dense-bf16", 3, "own"),
    Run("routed-fp32", 3, "shared"),
    Run("routed-fp32", 3, "own"),
]


@dataclass
class Found:
    """What a run came to."""

    name: str
    codes: list[int | str | None]
    seconds: list[float]
    differing: list[str]  # files that are not those of one host
    files: int = 0
    problem: str = ""
    left: list[str] = field(default_factory=list)


class Runs:
    """Runs of one cluster, and the same streams on one of its hosts to compare with."""

    def __init__(self, made: Cluster, folder: Path, short: bool = False, inputs: Path | None = None) -> None:
        self.cluster, self.folder, self.short = made, folder, short
        self.inputs = Inputs(made.shared / "inputs")
        if inputs is None:
            self.inputs.make()
        else:
            shutil.copytree(inputs, self.inputs.folder)
        self._alone: dict[tuple, dict[str, str]] = {}
        self.number = 0

    def stream(self, setting: str, hosts: int, storage: str) -> tuple[list[object], Path]:
        """Arguments of the job, and the work_dir as this machine sees it. Batches divide over 3 ranks as over 2."""
        self.number += 1
        name = f"{self.number}-{setting}"
        stream, work_dir = self.inputs.stream(SETTINGS[setting], self.cluster.shared / name)
        arguments: list[object] = ["--stream", stream]
        if storage == "own":
            arguments += ["--set", f"work_dir=/tmp/{name}"]
            work_dir = self.cluster[0].disk / "tmp" / name
            work_dir.mkdir()
            shutil.copy(self.inputs.folder / "empty.db", work_dir / "mlflow.db")
        if hosts == 3:
            arguments += ["--set", "training.batch_size=6"]
            if setting.startswith("routed"):
                self._six_experts()
                arguments += ["--set", f"backbone.path={self.inputs.folder / 'six'}"]
                arguments += ["--set", f"deepspeed={self.inputs.placement(3)}"]
        return arguments, work_dir

    def _six_experts(self) -> None:
        from tests.moe_helpers import save_moe_backbone

        if not (self.inputs.folder / "six").is_dir():
            save_moe_backbone(self.inputs.folder / "six", "hunyuan_v1_moe", num_experts=6, intermediate_size=23)

    def alone(self, run: Run) -> dict[str, str]:
        """The files that as many ranks on one host publish."""
        key = (run.setting, run.hosts, run.until)
        if key not in self._alone:
            arguments, work_dir = self.stream(run.setting, run.hosts, "shared")
            logs = self.folder / f"alone-{self.number}"
            (end,) = launch(self.cluster, [*arguments, "--until", run.until], logs, hosts=(0,), per_host=run.hosts)
            assert end.code == 0, end.text
            self._alone[key] = published(work_dir)
        return self._alone[key]

    def compare(self, run: Run) -> Found:
        """Run it and compare."""
        expected = self.alone(run)
        arguments, work_dir = self.stream(run.setting, run.hosts, run.storage)
        strike = failures.no_new_connections(self.cluster) if run.strike else None
        ends = launch(
            self.cluster,
            [*arguments, "--until", run.until],
            self.folder / f"run-{self.number}",
            hosts=range(run.hosts),
            how=run.how,
            strike=strike,
        )
        if run.strike:
            failures.sshd_again(self.cluster)
        files = published(work_dir)
        names = sorted(files.keys() | expected.keys())
        found = Found(run.name, [end.code for end in ends], [round(end.seconds, 1) for end in ends], [], len(files))
        found.differing = [name for name in names if files.get(name) != expected.get(name)]
        found.left = [line for end in ends for line in end.left]
        found.problem = self._problem(run, ends, found, work_dir)
        if run.storage == "own" and not self.short and not found.problem:
            found.problem = self._evaluated_again(run, arguments)
        return found

    def _evaluated_again(self, run: Run, arguments: list[object]) -> str:
        """What is wrong with a row of R that the same hosts measure again; "" where nothing is."""
        again = ["--work-dir", str(arguments[3]).removeprefix("work_dir=")]
        logs = self.folder / f"evaluate-{self.number}"
        ends = launch(self.cluster, again, logs, hosts=range(run.hosts), script="jobs/evaluate.py")
        cells = [line.split()[-2:] for line in ends[0].text.splitlines() if line.startswith("  ")]
        same = bool(cells) and all(now == recorded for now, recorded in cells)
        return "" if same and not any(end.code for end in ends) else "\n".join(end.text[-2000:] for end in ends)

    def _problem(self, run: Run, ends: list[End], found: Found, work_dir: Path) -> str:
        codes = [code for code in found.codes if code is not None]
        if any(codes) or found.left:
            return "\n".join(f"{end.code}: {end.text[-3000:]}" for end in ends)
        if found.differing or not found.files:
            return f"files differ: {found.differing}"
        if run.storage == "own":
            caches = [host.disk / "home" / ".cache" / "perennial" for host in self.cluster.hosts[1 : run.hosts]]
            if not all(any(cache.glob("prepared/*/*/meta.json")) for cache in caches):
                return "a host without the work_dir has no prepared rows of its own"
            if left := [str(path) for cache in caches for path in cache.glob("copies-*")]:
                return f"copies left: {left}"
            inside = [host.disk / "tmp" / work_dir.name for host in self.cluster.hosts[1 : run.hosts]]
            if any(path.exists() for path in inside):
                return "a host without the work_dir has one now"
        return ""


def main() -> int:
    """Run what was asked for; the exit code."""
    parser = argparse.ArgumentParser(description="Streams over hosts, whole and broken.")
    parser.add_argument("--short", action="store_true", help="what the suite runs")
    parser.add_argument("--only", action="append", default=[], metavar="WORDS", help="runs with this in their name")
    parser.add_argument("--out", type=Path, help="what was found, as JSON")
    parser.add_argument("--keep", type=Path, help="a folder for the logs of every launch")
    options = parser.parse_args()
    if reason := missing():
        print(f"cluster: {reason}", file=sys.stderr)
        return 2
    os.environ["OMP_NUM_THREADS"] = "1"
    import_everything()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.keep or temporary).resolve()
        wanted = lambda name: not options.only or any(words in name for words in options.only)  # noqa: E731
        with cluster(Path(temporary).resolve() / "cluster", 2 if options.short else 3) as made:
            runs = Runs(made, folder / "runs", options.short)
            whole = [runs.compare(run) for run in (SHORT if options.short else LONG) if wanted(run.name)]
            differences = failures.differences(runs) if wanted("differences") else []
            kept = Path(temporary) / "inputs"
            shutil.copytree(runs.inputs.folder, kept)
        broken = failures.play(folder, kept, options.short, wanted)
    found = {"runs": [asdict(run) for run in whole], "differences": differences, "failures": broken}
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    print_tables(found)
    return int(any(part["problem"] for parts in found.values() for part in parts))


def print_tables(found: dict[str, list[dict]]) -> None:
    """What was found, as Markdown."""
    print("\n| run | exit codes | files | differ from one host |\n|---|---|---|---|")
    for run in found["runs"]:
        codes = ", ".join(str(code) for code in run["codes"] if code is not None)
        print(f"| {run['name']} | {codes} | {run['files']} | {len(run['differing'])} |")
    print("\n| what happens | exit code | last rank's end, s | last process's end, s | named | continued |")
    print("|---|---|---|---|---|---|")
    for event in found["failures"]:
        ranks, seconds = (
            ", ".join(f"{host} {second:.1f}" for host, second in event[key].items()) for key in ("ranks", "seconds")
        )
        print(f"| {event['name']} | {event['code']} | {ranks} | {seconds} | {event['named']} | {event['continued']} |")
    print("\n| a host has | exit codes | told |\n|---|---|---|")
    for event in found["differences"]:
        print(f"| {event['name']} | {event['codes']} | {event['told']} |")
    for part in (part for parts in found.values() for part in parts if part["problem"]):
        print(f"\nPROBLEM {part['name']}: {part['problem']}")


if __name__ == "__main__":
    sys.exit(main())
