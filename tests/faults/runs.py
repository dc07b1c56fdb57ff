"""Runs that are broken on purpose, continued with the same command to the end, and compared with the unbroken one."""

import contextlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_contracts.errors import UserError
from tests.faults.launch import Outcome, launch
from tests.faults.streams import EPOCHS, TASKS, Inputs, Setting
from tests.faults.watch import Fault
from tests.jobs.many import digests


@dataclass(frozen=True)
class Unbroken:
    """A run to the end without a fault: what every broken one must end with."""

    setting: Setting
    outcome: Outcome
    files: dict[str, str]  # sha256 by name, as `published`
    champions: list[str]  # sha256 of champion.json after each increment

    @property
    def points(self) -> list[dict[str, Any]]:
        """Everything its ranks passed, in the order of time."""
        events = [event for rank in self.outcome.events for event in rank if event["kind"] == "point"]
        return sorted(events, key=lambda event: event["at"])


@dataclass
class Strike:
    """One fault, where it fell and what the disk held afterwards."""

    how: str
    timed: bool
    point: dict[str, Any]
    code: int | str
    seconds_to_end: float
    published: int  # increments that stood
    torn: list[str]  # what was not whole
    left: list[int]  # ranks that did not end by themselves


@dataclass
class Broken:
    """A run with its faults, and how its end differs from the unbroken one's."""

    setting: Setting
    strikes: list[Strike] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    lost: int = 0  # rows consumed too seldom in what the published experts came from
    repeated: int = 0  # too often
    not_reached: int = 0  # faults that never came
    end: str = ""  # what was wrong with the last launch or the audit; empty where nothing was


def unbroken_run(inputs: Inputs, setting: Setting, folder: Path) -> Unbroken:
    """Learn the stream without a fault."""
    stream, work_dir = inputs.stream(setting, folder)
    outcome = launch(["--stream", stream], 2, work_dir, folder / "launch-1")
    if outcome.code != 0:
        raise AssertionError(f"the unbroken run of {setting.name} ended with {outcome.code}:\n{outcome.text}")
    champions = [event["sha256"] for event in outcome.events[0] if event["kind"] == "champion"]
    lost, repeated = account([outcome], inputs)
    assert (lost, repeated, len(champions)) == (0, 0, len(TASKS)), (lost, repeated, champions)
    return Unbroken(setting, outcome, published(work_dir), champions)


def broken_run(inputs: Inputs, unbroken: Unbroken, faults: Iterable[Fault], folder: Path) -> Broken:
    """Learn the stream; after each fault look at the disk, give the same command again, lastly without a fault."""
    broken = Broken(unbroken.setting)
    stream, work_dir = inputs.stream(unbroken.setting, folder)
    launches: list[Outcome] = []

    def again(fault: Fault | None) -> Outcome:
        launches.append(launch(["--stream", stream], 2, work_dir, folder / f"launch-{len(launches) + 1}", fault))
        return launches[-1]

    coming = list(faults)
    while coming:
        fault = coming.pop(0)
        outcome = again(fault)
        if not outcome.struck or outcome.code == 0:
            broken.not_reached += 1 + len(coming)
            break
        standing, torn = look(work_dir, unbroken)
        timed = fault.seconds is not None
        seconds = outcome.seconds_to_end
        broken.strikes.append(
            Strike(fault.how, timed, outcome.point, outcome.code, seconds, standing, torn, outcome.left)
        )
    if not launches or launches[-1].code != 0:
        again(None)
    if launches[-1].code != 0:
        broken.end = f"the last launch ended with {launches[-1].code}: {launches[-1].text[-3000:]}"
    found = published(work_dir)
    names = sorted(found.keys() | unbroken.files.keys())
    broken.differing = [name for name in names if found.get(name) != unbroken.files.get(name)]
    broken.lost, broken.repeated = account(launches, inputs)
    broken.differing += [f"rows_consumed of {name}" for name in wrong_counts(work_dir)]
    broken.end = broken.end or audited(work_dir, folder / "audit")
    return broken


def published(work_dir: Path) -> dict[str, str]:
    """sha256 of every file that a repeated run writes again to the bit; of the others (prepared rows, quarantine,
    strays) the name alone. run.json, spans and MLflow's own files are left out.
    """
    sealed = ("bank/", "increments/", "champion.json", "finished.json")
    files = {}
    for name, sha in digests(work_dir).items():
        if not name.startswith(("mlflow.db", "mlartifacts/", "spans/")) and not name.endswith("/run.json"):
            files[name] = sha if name.startswith(sealed) else "there"
    return files


def look(work_dir: Path, unbroken: Unbroken) -> tuple[int, list[str]]:
    """How many increments stand after a kill, and what of them is not whole.

    The champion must be one of the unbroken run's, to the bit, with its chain, files and experts; no bank file may
    hold anything but what its name says; the finished marker may stand only where all is published.
    """
    from pipeline.tracking.audit import audit
    from pipeline.tracking.chain import load_chain

    torn = []
    path = work_dir / "champion.json"
    sha = sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    if sha is not None and sha not in unbroken.champions:
        return 0, [f"champion.json is none of the unbroken run's: {path.read_text()[:200]}"]
    standing = unbroken.champions.index(sha) + 1 if sha else 0
    try:
        if (length := len(load_chain(work_dir))) != standing:
            torn.append(f"the chain has {length} increments, the champion is that of {standing}")
    except UserError as error:
        torn.append(str(error))
    folders = [path.name for path in sorted((work_dir / "increments").glob("*"))]
    if len(folders) > standing + 1:
        torn.append(f"increments/ holds {folders} after {standing}")
    for name, sha in digests(work_dir).items():
        inside = name.startswith("increments/") and name.split("/")[1] in folders[:standing]
        if inside and not name.endswith("run.json") and unbroken.files.get(name) != sha:
            torn.append(f"{name} is not that of the unbroken run")
        if name.startswith("bank/") and name.endswith(".safetensors") and Path(name).stem != sha:
            torn.append(f"{name} is not what its name says")
    if (work_dir / "finished.json").exists() and standing < len(TASKS):
        torn.append("finished.json stands before the end")
    for finding in audit(work_dir) if standing else []:
        if not finding.ok and not finding.pending and "left over by a killed publish" not in finding.detail:
            torn.append(f"audit: {finding.name}: {finding.detail}")
    return standing, torn


def account(launches: Sequence[Outcome], inputs: Inputs, tasks: Sequence[str] = TASKS) -> tuple[int, int]:
    """Rows that went too seldom, and too often, into what was published: (lost, repeated), over the tasks' increments.

    Counted from what passed through the model on every rank. Steps that the next launch went back behind are taken
    out again, and so are those of which no state was saved before it: they are in nothing that it goes on from.
    """
    steps: dict[str, dict[int, Counter]] = {}  # title -> step -> rows
    saved: dict[str, int] = {}  # title -> steps in the state on disk
    for outcome in launches:
        for event in outcome.events[0]:  # what this launch went back to, before what it did
            if event["kind"] == "begins":
                title, done = event["title"], steps.setdefault(event["title"], {})
                for step in [step for step in done if step >= min(event["step"], saved.get(title, 0))]:
                    del done[step]
        for events in outcome.events:
            title = ""
            for event in events:
                if event["kind"] == "begins":
                    title = event["title"]
                elif event["kind"] == "rows":
                    steps.setdefault(title, {}).setdefault(event["step"], Counter()).update(event["ids"])
                elif (number := saving(event)) is not None:
                    saved[title] = number
    lost = repeated = 0
    for number, task in enumerate(tasks, start=1):
        table = pq.read_table(inputs.folder / "data" / task / "train.parquet", columns=["id"])
        expected = Counter(dict.fromkeys(table["id"].to_pylist(), EPOCHS))
        found = sum(steps.get(f"increment {number} {task}", {}).values(), Counter())
        lost += (expected - found).total()
        repeated += (found - expected).total()
    return lost, repeated


def saving(event: dict[str, Any]) -> int | None:
    """The step whose state takes its place with this event; None for any other event."""
    place = event.get("place", "").split()
    is_save = event["kind"] == "point" and place[::2] == ["state", "file"] and event["detail"].startswith("os.rename")
    return int(place[1]) if is_save else None


def wrong_counts(work_dir: Path) -> list[str]:
    """Increments whose manifest does not count epochs x rows."""
    wrong = []
    for path in sorted((work_dir / "increments").glob("*/manifest.json")):
        manifest = json.loads(path.read_text())
        if manifest["training"]["rows_consumed"] != EPOCHS * manifest["data"]["train"]["kept"]:
            wrong.append(path.parent.name)
    return wrong


def audited(work_dir: Path, out: Path) -> str:
    """What `jobs/audit.py` says, MLflow included, where it is not content. In a process of its own."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            from jobs import audit

            with contextlib.redirect_stdout(io.StringIO()) as said:
                code = audit.main(["--work-dir", str(work_dir)])
            out.write_text(said.getvalue())
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return "" if code == 0 else f"audit ended with {code}: {out.read_text() if out.is_file() else ''}"
