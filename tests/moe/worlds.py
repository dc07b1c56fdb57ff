"""Launches that the multi-process tests of mixture-of-experts backbones share; each starts when a test first asks.

    pair     2 ranks: the reference (EP 2, ZeRO-3), ZeRO-2, `hy_v3`, skewed routing, a stopped run
    single   1 rank, without the launcher: EP 1, ZeRO-2 and 3, once from the reference's experts and once by itself
    four     4 ranks: EP 4 and EP 2, skewed routing, the stopped run goes on, experts of EP 4 served at EP 1, 2 and 4
    *_long   the other sizes; only `pytest -m long` asks for them

From the second increment on all cases start from the experts that the reference published, unless told otherwise: what
EP 2 learned goes on at EP 1 and EP 4, and each increment is compared by itself.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.batching import row_order
from tests.distributed.worlds import Case, LaunchFailed, start_ranks
from tests.helpers import make_task, stream_dict
from tests.moe_helpers import save_moe_backbone, tiny_moe

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
LIMIT = 420  # seconds a launch may take: four ranks on two cores
RANKS = {"pair": 2, "single": 1, "four": 4}
SEED, STEPS, BATCH, ROWS = 17, 5, 8, 37  # the last global batch has 5 rows: three of four ranks run spare passes
STOP_AFTER = 3
CLIPPING = {"hunyuan": 0.5, "hy": 0.9, "skew": 1.6}  # between the least and the largest norm of a run
LABELS = {"no": " no", "mixed": " neither", "yes": " positive"}  # 3, 5 and 1 tokens
GAME, RATES = 0.5, {"gate": 2e-3, "discriminator": 0.6}
RANK, ALPHA, OUTPUTS, WEIGHT_DECAY = 3, 12.0, 3, 0.01
# odd everywhere: 3 experts a rank at EP 4, and no LoRA tensor divides by two ranks
# of several seeds one whose router margins are above 1e-4 in every token of every batch, and no entry of whose first
# gradients is as small as Adam's epsilon
HUNYUAN = {"num_experts": 12, "top_k": 3, "intermediate_size": 23, "initializer_range": 0.06, "seed": 1}
HY = {"num_experts": 4, "top_k": 3, "moe_intermediate_size": 23, "initializer_range": 0.06, "seed": 9}
SKEW = {**HY, "top_k": 1, "num_hidden_layers": 2, "seed": 3}
FORCED = 1  # the routed expert that every token of the skewed backbone goes to
FRESH, PROTOTYPE, GOES_ON = 1, 2, 3  # increments, see tests.distributed.learning.TASKS
# prompt lengths in the order of learning, four rows a batch: single tokens, and at the end one row for all ranks
SKEWED, SKEW_BATCH = (41, 1, 34, 23, 1, 1, 1, 12, 37, 29, 1, 2, 18, 1, 1, 1, 9), 4


class GivenRows:
    """Rows made by hand, read as the loop reads `pipeline.data.tokens.RowView`."""

    def __init__(self, prompts: Sequence[list[int]], answers: Sequence[list[int]], end: int) -> None:
        self.prompts, self.answers, self.end_of_answer = prompts, answers, end
        self.prompt_lengths = np.array([len(prompt) for prompt in prompts])
        self.answer_lengths = np.array([len(answer) + 1 for answer in answers])
        self.lengths = self.prompt_lengths + self.answer_lengths

    def __len__(self) -> int:
        return len(self.prompts)

    def tokens(self, rows: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
        return [self.prompts[int(row)] for row in rows], [self.answers[int(row)] for row in rows]


@dataclass
class GivenTask:
    """A task of rows made by hand, the same for every split."""

    task: str
    given: GivenRows

    def rows(self, split: str, limit: int | None, seed: int) -> GivenRows:
        return self.given


def skewed_tasks() -> dict[str, GivenTask]:
    """17 rows a task, learned in the order that `SKEWED` says; a row of one token has an empty answer."""
    order = row_order(len(SKEWED), 1, SEED)
    tasks = {}
    for turn, name in enumerate(("first", "second")):
        draw = np.random.default_rng(turn)
        prompts: list[list[int]] = [[] for _ in SKEWED]
        answers: list[list[int]] = [[] for _ in SKEWED]
        for place, length in zip(order, SKEWED, strict=True):
            prompts[place] = draw.integers(2, 300, length).tolist()
            answers[place] = [11, 12] * (3 + length % 5) if length > 1 else []
        tasks[name] = GivenTask(name, GivenRows(prompts, answers, end=0))
    return tasks


@dataclass
class MoeWorlds:
    """The assets of all launches below one folder, and the launches done so far."""

    folder: Path
    done: dict[str, LaunchFailed | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.backbones = {
            "hunyuan": save_moe_backbone(self.folder / "hunyuan", "hunyuan_v1_moe", **HUNYUAN),
            "hy": save_moe_backbone(self.folder / "hy", "hy_v3", **HY),
            "skew": self._skewed_backbone(),
        }
        self.data = self.folder / "data"
        rows = {"train": ROWS, "validation": 6, "test": 6}
        self.tasks = [
            make_task(self.data, "first", rows=rows, labels=LABELS),
            make_task(self.data, "second", rows=rows, labels=LABELS, turn=1, seed=1),
        ]
        self.bank = self.folder / "bank"

    def _skewed_backbone(self) -> Path:
        folder = save_moe_backbone(self.folder / "skew", "hy_v3", **SKEW)
        model = tiny_moe("hy_v3", json.loads((folder / "config.json").read_text())["vocab_size"], **SKEW)
        model.model.layers[1].mlp.e_score_correction_bias[FORCED] = 50.0
        model.save_pretrained(folder)
        return folder

    def case(self, launch: str, name: str) -> Case:
        """A case's results; starts its launch, and those that it needs, on first use. Raises LaunchFailed."""
        for needed in ("pair", launch):
            if needed not in self.done:
                try:
                    self._start(needed)
                    self.done[needed] = None
                except LaunchFailed as failed:
                    self.done[needed] = failed
            if self.done[needed] is not None:
                raise LaunchFailed(str(self.done[needed]))
        return Case(self.folder / launch / name)

    def _start(self, launch: str) -> None:
        plan = [{**case, "folder": str(self.folder / launch / case["name"])} for case in getattr(self, f"_{launch}")()]
        path = self.folder / f"{launch}.json"
        path.write_text(json.dumps(plan), encoding="utf-8")
        start_ranks(RANKS[launch.removesuffix("_long")], path, self.folder / f"{launch}.log", WORKER, LIMIT)

    def stream(
        self, work: str, stage: int, ep: int, backbone: str = "hunyuan", micro: int = 2, recompute: bool = False
    ) -> dict[str, Any]:
        """A stream whose files are under `work`; `micro` rows a pass, one where the routing is skewed."""
        file = self.folder / f"zero{stage}-ep{ep}.json"
        raw = json.loads((ROOT / "deepspeed_configs" / f"zero{stage}.json").read_text())
        file.write_text(json.dumps({**raw, "expert_parallel": {"autoep_size": ep}}), encoding="utf-8")
        batch = SKEW_BATCH if backbone == "skew" else BATCH
        sections = {
            "method": {
                "lora": {"rank": RANK, "alpha": ALPHA, "dropout": 0.0},
                "adversary": {"outputs": OUTPUTS, "weight": GAME},
                "learning_rates": RATES,
            },
            "training": {
                "batch_size": batch,
                "micro_batch_size": 1 if batch == SKEW_BATCH else micro,
                "warmup_fraction": 0.0,
                "gradient_clipping": CLIPPING[backbone],
                "weight_decay": WEIGHT_DECAY,
                "activation_checkpointing": recompute,
            },
            "deepspeed": str(file),
            "seed": SEED,
        }
        return stream_dict(self.folder / "work" / work, self.backbones[backbone], self.data, self.tasks, **sections)

    def records(self, launch: str, name: str) -> str:
        """The file that names the experts a case published."""
        return str(self.folder / launch / name / "records.json")

    def _learn(self, launch: str, name: str, stage: int, ep: int, **changes: Any) -> dict[str, Any]:
        """A case of kind `learn`; from increment 2 on it starts from the experts of `records` (None: its own)."""
        backbone = next((kind for kind in ("hy", "skew") if name.startswith(f"{kind}-")), "hunyuan")
        micro = 1 if launch.startswith("four") else 2
        prefix = "" if backbone == "hunyuan" else f"{backbone}-"
        return {
            "kind": "learn",
            "name": name,
            # at least two passes a rank and step: accumulation
            "stream": self.stream(
                changes.pop("work", f"{launch}-{name}"), stage, ep, backbone, micro, changes.pop("recompute", False)
            ),
            "bank": str(self.bank),
            "increments": [PROTOTYPE, GOES_ON] if backbone == "hunyuan" else [FRESH, PROTOTYPE],
            "records": self.records("pair", f"{prefix}ep2-zero3"),
            "skewed": backbone == "skew",
            **changes,
        }

    def _pair(self) -> Iterator[dict[str, Any]]:
        whole = [FRESH, PROTOTYPE, GOES_ON]
        yield self._learn("pair", "ep2-zero3", 3, 2, increments=whole, records=None, serve=True)
        yield self._learn("pair", "ep2-zero2", 2, 2)
        yield self._learn("pair", "hy-ep2-zero3", 3, 2, records=None)
        # layers are computed again in backward, all-to-all and all
        yield self._learn("pair", "skew-ep2-zero3", 3, 2, records=None, recompute=True)
        yield self._learn("pair", "ep2-stopped", 3, 2, work="stopped", increments=[PROTOTYPE], stop_after=STOP_AFTER)

    def _single(self) -> Iterator[dict[str, Any]]:
        yield self._learn("single", "ep1-zero3", 3, 1)
        yield self._learn("single", "ep1-zero2", 2, 1)
        yield self._learn("single", "ep1-alone", 3, 1, increments=[FRESH, PROTOTYPE], records=None)

    def _four(self) -> Iterator[dict[str, Any]]:
        yield self._learn("four", "ep4-zero3", 3, 4, increments=[FRESH, PROTOTYPE, GOES_ON], serve=True)
        yield self._learn("four", "ep2-zero2", 2, 2)
        yield self._learn("four", "skew-ep4-zero3", 3, 4)
        yield self._learn("four", "ep4-continued", 3, 4, work="stopped", increments=[PROTOTYPE])
        for ep, stage in ((4, 3), (2, 2), (1, 3)):
            yield self._score("four", f"scores-ep{ep}", stage, ep)

    def _score(self, launch: str, name: str, stage: int, ep: int) -> dict[str, Any]:
        """A case of kind `score`: the experts that EP 4 published, served at another size."""
        stream = self.stream(f"{launch}-{name}", stage, ep)
        records = self.records("four", "ep4-zero3")
        return {"kind": "score", "name": name, "stream": stream, "bank": str(self.bank), "records": records}

    def _pair_long(self) -> Iterator[dict[str, Any]]:
        for stage in (2, 3):
            yield self._learn("pair_long", f"ep1-zero{stage}", stage, 1)
        yield self._learn("pair_long", "hy-ep2-zero2", 2, 2)
        yield self._learn("pair_long", "skew-ep2-zero2", 2, 2)

    def _four_long(self) -> Iterator[dict[str, Any]]:
        for ep, stage in ((1, 2), (1, 3), (2, 3), (4, 2)):
            yield self._learn("four_long", f"ep{ep}-zero{stage}", stage, ep)
        yield self._learn("four_long", "hy-ep4-zero3", 3, 4)
        yield self._learn("four_long", "skew-ep2-zero2", 2, 2)
        yield self._learn("four_long", "skew-ep4-zero2", 2, 4)

    def _single_long(self) -> Iterator[dict[str, Any]]:
        yield self._learn("single_long", "hy-ep1-zero3", 3, 1)
        yield self._learn("single_long", "skew-ep1-zero2", 2, 1)
