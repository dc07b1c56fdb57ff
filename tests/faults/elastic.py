"""Increments that are asked to stop on two ranks and go on with other numbers of ranks and expert-parallel sizes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.launch import Outcome, launch
from tests.faults.plans import table
from tests.faults.runs import Unbroken, account, audited, wrong_counts
from tests.faults.streams import SETTINGS, STEPS, TASKS, Inputs
from tests.faults.watch import Fault, Point

LOSS = 1e-4  # most that a loss may differ, fp32 and no dropout


@dataclass(frozen=True)
class Plan:
    """An increment on one number of ranks after another; the last rank is sent SIGTERM in the steps of `stops`."""

    setting: str
    increment: int
    ranks: tuple[int, ...]
    stops: tuple[int, ...]
    damaged: bool = False  # after the first stop the state is damaged, the command given once, and the state mended


@dataclass
class World:
    """What became of a plan."""

    plan: Plan
    codes: list[int | str] = field(default_factory=list)
    begun: list[int] = field(default_factory=list)  # step at which each launch began
    loss_difference: float = 0.0  # largest, over all steps, to the run of two ranks without a stop
    lost: int = 0
    repeated: int = 0
    problems: list[str] = field(default_factory=list)
    refused: str = ""  # how the launch on a damaged state ended, and what it said


SHORT = (Plan("routed-fp32", 1, (2, 1), (2,), damaged=True),)
LONG = (
    Plan("dense-fp32", 2, (2, 1, 4), (1, 2)),
    Plan("dense-fp32", 2, (2, 4), (2,)),
    Plan("routed-fp32", 2, (2, 1, 4), (1, 2)),
    Plan("routed-fp32", 2, (2, 4), (2,)),
    Plan("dense-bf16", 2, (2, 1, 4), (1, 2)),
    Plan("routed-bf16", 2, (2, 1, 4), (1, 2)),
)


def continue_elsewhere(inputs: Inputs, unbroken: Unbroken, plan: Plan, folder: Path) -> World:
    """Run a plan. Experts are shared out over as many ranks as there are, where the backbone has routed ones."""
    setting, world = SETTINGS[plan.setting], World(plan)
    name = f"{plan.setting}-{plan.increment}-{'-'.join(map(str, plan.ranks))}"
    stream, work_dir = inputs.stream(setting, folder / name)
    until = TASKS[plan.increment - 1]
    launches: list[Outcome] = []
    for number, ranks in enumerate(plan.ranks):
        placement = inputs.placement(ranks if setting.expert_parallel > 1 else 1)
        command = ["--stream", stream, "--until", until, "--set", f"deepspeed={placement}"]
        stop = None
        if number < len(plan.stops):
            stop = Fault("stop", Point(ranks - 1, plan.increment, f"step {plan.stops[number]}", 1))
        outcome = launch(command, ranks, work_dir, folder / name / f"launch-{number + 1}", stop)
        if plan.damaged and number == 0:
            state = work_dir / "inflight" / "state.safetensors"
            with flipped(state):
                again = launch(command, ranks, work_dir, folder / name / "damaged")
            world.refused = f"exit {again.code}\n{again.text}"
        launches.append(outcome)
        world.codes.append(outcome.code)
        if outcome.code != (75 if stop else 0) or outcome.left:
            world.problems.append(f"launch on {ranks} ranks ended with {outcome.code}: {outcome.text[-3000:]}")
            return world
    title = f"increment {plan.increment} {until}"
    world.begun = [
        event["step"]
        for outcome in launches
        for event in outcome.events[0]
        if event["kind"] == "begins" and event["title"] == title
    ]
    expected, found = losses([unbroken.outcome], title), losses(launches, title)
    world.loss_difference = max(abs(found[step] - expected[step]) for step in expected) if found else float("nan")
    world.lost, world.repeated = account(launches, inputs, TASKS[: plan.increment])
    if world.begun != [0, *plan.stops] or sorted(found) != list(range(1, STEPS + 1)):
        world.problems.append(f"began at {world.begun}, has losses of steps {sorted(found)}")
    if setting.dtype == "float32" and not setting.dropout and not world.loss_difference <= LOSS:
        world.problems.append(f"a loss differs by {world.loss_difference}")
    if world.lost or world.repeated:
        world.problems.append(f"{world.lost} rows lost, {world.repeated} repeated")
    world.problems += [f"rows_consumed of {increment}" for increment in wrong_counts(work_dir)]
    if said := audited(work_dir, folder / name / "audit"):
        world.problems.append(said)
    return world


@contextmanager
def flipped(path: Path) -> Iterator[None]:
    """A file with one bit of its last byte turned over."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    yield
    assert path.read_bytes()[:-1] == whole[:-1], "the damaged file was changed"
    path.write_bytes(whole)


def losses(launches: Sequence[Outcome], title: str) -> dict[int, float]:
    """The loss of each step of an increment, by number from 1."""
    found = {}
    for outcome in launches:
        current = ""
        for event in outcome.events[0]:
            if event["kind"] == "begins":
                current = event["title"]
            elif event["kind"] == "loss" and current == title:
                found[event["step"]] = event["loss"]
    return found


def report(worlds: Sequence[World]) -> str:
    """The table of the runs, with what is wrong below."""
    rows = [("setting", "increment", "ranks", "began at steps", "exits", "largest loss difference", "lost", "repeated")]
    for world in worlds:
        sizes, begun, codes = (
            " -> ".join(map(str, numbers)) for numbers in (world.plan.ranks, world.begun, world.codes)
        )
        difference = f"{world.loss_difference:.1e}"
        rows.append(
            (world.plan.setting, world.plan.increment, sizes, begun, codes, difference, world.lost, world.repeated)
        )
    return "\n".join([table(rows), *(problem for world in worlds for problem in world.problems)])
