"""Whole jobs on backbones with routed experts: every shipped expert-parallel file, every method."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import make_stream
from tests.jobs.launch import ROOT, Case, Done, run_many
from tests.jobs.methods import empty_database
from tests.jobs.streams import LEARNING, TASKS, Inputs
from tests.moe_helpers import save_moe_backbone

LORA = {"rank": 3, "alpha": 6, "dropout": 0.0}
MOE_CL = LEARNING["method"]
# name: (family, DeepSpeed file, method)
ON_TWO_RANKS = {
    "zero3_ep2": ("hunyuan_v1_moe", "zero3_ep2", MOE_CL),
    "zero2_ep2": ("hunyuan_v1_moe", "zero2_ep2", MOE_CL),
    "sequential": ("mixtral", "zero2_ep2", {"name": "sequential", "lora": LORA}),
    **{
        name: ("hunyuan_v1_moe", deepspeed, {"name": name, "lora": LORA} | options)
        for name, deepspeed, options in (
            ("replay", "zero3_ep2", {"share": 0.5}),
            ("multitask", "zero2_ep2", {}),
            ("ewc", "zero2_ep2", {"fisher_rows": 2}),
            ("olora", "zero3_ep2", {}),
            ("mocl", "zero2_ep2", {}),
            ("moses", "zero3_ep2", {}),
        )
    },
    "hunyuan_sequential": ("hunyuan_v1_moe", "zero3_ep2", {"name": "sequential", "lora": LORA}),
    "hunyuan_per_task": ("hunyuan_v1_moe", "zero2_ep2", {"name": "per_task", "lora": LORA}),
    "hunyuan_zero_shot": ("hunyuan_v1_moe", "zero3_ep2", {"name": "zero_shot"}),
    "moses_zero2": ("hunyuan_v1_moe", "zero2_ep2", {"name": "moses", "lora": LORA}),
    "per_task": ("qwen3_moe", "zero3_ep2", {"name": "per_task", "lora": LORA | {"targets": ["experts.*", "v_proj"]}}),
    # ranks route differently: without leaf modules they would wait for each other's weights for ever
    "zero_shot": ("hy_v3", "zero3", {"name": "zero_shot"}),
    "attention_alone": ("hy_v3", "zero3_ep2", {"name": "sequential", "lora": LORA | {"targets": ["q_proj", "o_proj"]}}),
}
ON_FOUR_RANKS = {
    "zero3_ep4": ("hunyuan_v1_moe", "zero3_ep4", MOE_CL),
    "zero2_ep4": ("hunyuan_v1_moe", "zero2_ep4", MOE_CL),
}
ROUTER = {"layers": 2, "features": 48}  # of zero3_ep2
# every method on the Hunyuan family; the other families learn one
TWO_TASKS = tuple(name for name, (family, *_) in ON_TWO_RANKS.items() if family == "hunyuan_v1_moe")
MISTAKES = {
    "too_many": ("hunyuan_v1_moe", "zero3_ep4", MOE_CL),  # on two ranks
    "dense": (None, "zero3_ep2", MOE_CL),
    "no_judge": ("hy_v3", "zero3_ep2", MOE_CL | {"lora": LORA | {"targets": ["q_proj"]}}),
}


@dataclass(frozen=True)
class Routed:
    """What became of the commands, and the work_dir of each."""

    done: dict[str, Done]
    work_dirs: dict[str, Path]
    answers: Path  # what jobs/predict.py wrote of the first task's test rows in `zero3_ep2`


def learn_routed(inputs: Inputs, folder: Path) -> Routed:
    """Two launches: of two ranks, and of four."""
    tasks = [inputs.contract(task) for task in TASKS[:2]]

    def case(name: str, family: str | None, deepspeed: str, method: dict) -> Case:
        until = TASKS[1 if name in TWO_TASKS else 0]
        backbone = inputs.backbone
        if family:
            backbone = folder / family
            if not backbone.is_dir():
                save_moe_backbone(backbone, family)
        (folder / name).mkdir()
        if name not in MISTAKES:  # creating MLflow's database takes seconds
            (folder / name / "work").mkdir()
            shutil.copy(empty_database(folder), folder / name / "work" / "mlflow.db")
        sections = {
            "training": {"epochs": 1, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-2},
            "deepspeed": str(ROOT / "deepspeed_configs" / f"{deepspeed}.json"),
        }
        if name == "zero3_ep2":
            sections["router"] = ROUTER
        stream = make_stream(folder / name / "s.yaml", folder / name / "work", backbone, inputs.root, tasks, **sections)
        arguments = ["--stream", stream, "--set", f"method={json.dumps(method)}", "--until", until]
        return Case("continual", arguments, folder / name / "work")

    two = {name: case(name, *what) for name, what in (ON_TWO_RANKS | MISTAKES).items()}
    work_dir, answers = folder / "zero3_ep2" / "work", folder / "answers.parquet"
    data = inputs.root / "first" / "test.parquet"
    two["predict"] = Case("predict", ["--work-dir", work_dir, "--task", "first", "--data", data, "--out", answers])
    two["evaluate"] = Case("evaluate", ["--work-dir", work_dir])
    four = {name: case(name, *what) for name, what in ON_FOUR_RANKS.items()}
    done = dict(zip(two, run_many(list(two.values()), folder / "two", ranks=2), strict=True))
    done |= zip(four, run_many(list(four.values()), folder / "four", ranks=4), strict=True)
    return Routed(done, {name: folder / name / "work" for name in {**two, **four}}, answers)
