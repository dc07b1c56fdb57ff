"""Three launches that the multi-process tests share; each starts once a test session, when a test first asks for it.

    pair_a   2 ranks: the reference (ZeRO-3, increments 1-3), offload; unbroken and stopped runs
    pair_b   2 ranks: ZeRO-2, sharded LoRA tensors; the stopped runs continue; state round trips
    single   1 rank, without the launcher: ZeRO-3, ZeRO-2; a run stopped on 2 ranks continues; state round trips

A launch costs about 15 seconds before its first step, hence many cases in one process.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.helpers import make_task, save_backbone, stream_dict

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
FORKED = ROOT / "tests" / "forked.py"
LIMIT = 240  # seconds a launch may take: about one in fifty hangs without a message
STEPS, BATCH, ROWS, CLIPPING = 5, 8, 37, 1.2  # the last global batch has 5 rows: one rank runs a spare pass
STOP_AFTER = 3
LABELS = {"no": " no", "mixed": " neither", "yes": " positive"}  # 3, 5 and 1 tokens
GAME = 0.5  # weight of the adversary
RATES = {"gate": 2e-3, "discriminator": 0.6}  # the LoRA experts take training.learning_rate
# odd sizes: a LoRA pair, and a component's total, do not divide by two ranks
RANK, ALPHA, FFN_WIDTH, OUTPUTS, WEIGHT_DECAY = 3, 12.0, 91, 3, 0.01
FRESH, PROTOTYPE, GOES_ON = 1, 2, 3  # increments, see learning.TASKS


class LaunchFailed(AssertionError):
    """A launch ended badly; its output's end is the message."""


@dataclass
class Case:
    """What one case left: a note of every rank, tensors by increment."""

    folder: Path

    @property
    def notes(self) -> list[dict[str, Any]]:
        """The note of each rank, in rank order."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("rank*.json"))]

    def increment(self, number: int, rank: int = 0) -> dict[str, Any]:
        """One rank's note of one increment."""
        return self.notes[rank]["increments"][str(number)]

    def tensors(self, number: int, kind: str) -> dict[str, Any]:
        """Full tensors of one increment: kind is start, gradient or final."""
        found = load_file(self.folder / f"{number}.safetensors")
        prefix = f"{kind}/"
        return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}

    @property
    def records(self) -> dict[str, dict[str, dict[str, str]]]:
        """{increment: {"bundle" | "state": {name: bank digest}}}."""
        return json.loads((self.folder / "records.json").read_text())


@dataclass
class Worlds:
    """The assets of all launches below one folder, and the launches done so far."""

    folder: Path
    done: dict[str, LaunchFailed | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.backbone = save_backbone(self.folder / "backbone", intermediate_size=FFN_WIDTH)
        self.data = self.folder / "data"
        rows = {"train": ROWS, "validation": 6, "test": 6}
        self.tasks = [
            make_task(self.data, "first", rows=rows, labels=LABELS),
            make_task(self.data, "second", rows=rows, labels=LABELS, turn=1, seed=1),
        ]
        self.bank = self.folder / "bank"

    def case(self, launch: str, name: str) -> Case:
        """A case's results; starts its launch, and what that needs, on first use. Raises LaunchFailed."""
        if launch != "pair_a":
            self.run("pair_a")
        self.run(launch)
        return Case(self.folder / launch / name)

    def run(self, launch: str) -> None:
        """Start a launch unless it ran; its outcome is remembered."""
        if launch not in self.done:
            try:
                self._start(launch)
                self.done[launch] = None
            except LaunchFailed as failed:
                self.done[launch] = failed
        if self.done[launch] is not None:
            raise LaunchFailed(str(self.done[launch]))

    def _start(self, launch: str) -> None:
        plan = [{**case, "folder": str(self.folder / launch / case["name"])} for case in getattr(self, f"_{launch}")()]
        path = self.folder / f"{launch}.json"
        path.write_text(json.dumps(plan), encoding="utf-8")
        start_ranks(1 if launch == "single" else 2, path, self.folder / f"{launch}.log")

    def stream(self, work: str, stage: int, threshold: int | None = None, **changes: Any) -> dict[str, Any]:
        """A stream whose files are under `work`; `threshold` is ZeRO-3's for persistence (0 shards everything)."""
        shipped = ROOT / "deepspeed_configs" / f"zero{stage}.json"
        deepspeed = shipped
        if threshold is not None:
            raw = json.loads(shipped.read_text())
            raw["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
            deepspeed = self.folder / f"zero{stage}-{threshold}.json"
            deepspeed.write_text(json.dumps(raw), encoding="utf-8")
        method = {
            "lora": {"rank": RANK, "alpha": ALPHA, "dropout": changes.pop("dropout", 0.0)},
            "adversary": {"outputs": OUTPUTS, "weight": GAME},
            "learning_rates": RATES,
        }
        training = {
            "batch_size": BATCH,
            "micro_batch_size": 2,  # two passes a rank on two ranks, four on one
            "warmup_fraction": 0.0,
            "gradient_clipping": CLIPPING,
            "weight_decay": WEIGHT_DECAY,
            "activation_checkpointing": changes.pop("recompute", False),
        }
        dtype = changes.pop("dtype", "float32")
        deepspeed = changes.pop("deepspeed", deepspeed)
        assert not changes, changes
        sections = {"method": method, "training": training, "deepspeed": str(deepspeed)}
        stream = stream_dict(self.folder / "work" / work, self.backbone, self.data, self.tasks, **sections)
        stream["backbone"]["dtype"] = dtype
        return stream

    def _learn(self, name: str, stream: dict[str, Any], **changes: Any) -> dict[str, Any]:
        """A case of kind `learn`; from increment 2 on it starts from the reference's experts."""
        return {
            "kind": "learn",
            "name": name,
            "stream": stream,
            "bank": str(self.bank),
            "increments": [FRESH, PROTOTYPE, GOES_ON],
            "records": str(self.folder / "pair_a" / "zero3" / "records.json"),
            **changes,
        }

    def _pair_a(self) -> Iterator[dict[str, Any]]:
        yield self._learn("zero3", self.stream("reference", 3), records=None, serve=True)
        offload = str(ROOT / "deepspeed_configs" / "zero3_offload.json")
        yield self._learn("zero3-offload", self.stream("offload", 3, deepspeed=offload))
        yield self._learn("zero3-stopped", self.stream("stopped", 3), increments=[PROTOTYPE], stop_after=STOP_AFTER)
        for name, settings in self.rough():
            stream = self.stream(f"unbroken-{name}", **settings)
            yield self._learn(f"{name}-unbroken", stream, increments=[PROTOTYPE])
            stream = self.stream(f"stopped-{name}", **settings)
            yield self._learn(f"{name}-stopped", stream, increments=[PROTOTYPE], stop_after=STOP_AFTER)

    def _pair_b(self) -> Iterator[dict[str, Any]]:
        yield self._learn("zero2", self.stream("zero2", 2), serve=True)
        yield self._learn("zero3-sharded", self.stream("sharded", 3, 0))
        yield self._learn("zero3-recomputed", self.stream("again", 3, 0, recompute=True), increments=[GOES_ON])
        for name, settings in self.rough():
            stream = self.stream(f"stopped-{name}", **settings)
            yield self._learn(f"{name}-continued", stream, increments=[PROTOTYPE])
        yield from self._round_trips()

    def _single(self) -> Iterator[dict[str, Any]]:
        self._copy("stopped", "stopped-on-one")
        self._copy("stopped", "stopped-on-one-zero2")
        yield self._learn("zero3", self.stream("single-zero3", 3), serve=True)
        yield self._learn("zero2", self.stream("single-zero2", 2))
        yield self._learn("zero3-continued", self.stream("stopped-on-one", 3), increments=[PROTOTYPE])
        yield self._learn("zero2-continued", self.stream("stopped-on-one-zero2", 2), increments=[PROTOTYPE])
        yield from self._round_trips()

    def rough(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Settings in which a continued run must still equal an unbroken one to the bit."""
        yield "zero2-bf16-dropout", {"stage": 2, "dtype": "bfloat16", "dropout": 0.2}
        yield "zero3-bf16-dropout", {"stage": 3, "threshold": 0, "dtype": "bfloat16", "dropout": 0.2}

    def _round_trips(self) -> Iterator[dict[str, Any]]:
        for name, settings in ROUND_TRIPS.items():
            stream = self.stream("round-trips", **settings)
            yield {"kind": "round_trips", "name": f"round-trips-{name}", "stream": stream}

    def _copy(self, work: str, other: str) -> None:
        shutil.copytree(self.folder / "work" / work, self.folder / "work" / other)


ROUND_TRIPS: dict[str, dict[str, Any]] = {
    "zero2-fp32": {"stage": 2},
    "zero2-bf16": {"stage": 2, "dtype": "bfloat16"},
    "zero3-fp32": {"stage": 3, "threshold": 0},
    "zero3-bf16-persistent": {"stage": 3, "dtype": "bfloat16"},
}


def start_ranks(ranks: int, plan: Path, log: Path, worker: Path = WORKER, limit: int = LIMIT) -> None:
    """Run a worker; raises LaunchFailed with the log's end. Nothing of it lives on afterwards."""
    command = [sys.executable, str(worker), str(plan)]
    if ranks > 1:
        command = [sys.executable, str(FORKED), str(ranks), str(free_port()), str(worker), str(plan)]
    places = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in places and "SLURM" not in name}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"no code within {limit} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    if code != 0:
        tail = log.read_text(errors="replace")[-6000:]
        raise LaunchFailed(f"{' '.join(command)} ended with {code}:\n{tail}")


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


_session: list[Worlds] = []  # one for all test files: a session fixture of a conftest would not reach both folders


def worlds_of_session(folder: Path) -> Worlds:
    """The session's launches; `folder` is used by the first call."""
    if not _session:
        _session.append(Worlds(folder))
    return _session[0]
