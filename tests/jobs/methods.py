"""moe_cl under `follow` and the methods beside it, each on two tasks."""

import shutil
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.jobs.launch import Case, Done, run_many
from tests.jobs.streams import LEARNING, TASKS, Inputs, stream_of

LORA = {"rank": 8, "alpha": 16, "dropout": 0.0}
TASK_FREE = {"router": {"layers": 2, "features": 64}, "evaluation": {"review": {"target_precision": 0.6}}}
FAST = {"epochs": 6, "batch_size": 8, "micro_batch_size": 8, "learning_rate": 2e-2}


def learn_by_methods(inputs: Inputs, folder: Path) -> dict[str, tuple[Path, Done]]:
    """Two tasks in a plain process, one stream after another; {name: (work_dir, what became of it)}.

    `guarded` is `sequential` behind a gate against regression; `ablated` is moe_cl with replayed negatives and a warm
    start.
    """
    ablated = LEARNING["method"] | {"adversary": {"negatives": "replay"}, "warm_start": "similar"}
    follow = LEARNING["method"] | {"retention": {"policy": "follow"}}
    sequential = {"name": "sequential", "lora": LORA}
    once = {"training": FAST | {"epochs": 1}}
    streams = {
        "follow": (follow, once),
        "follow_one_gate": (follow | {"gate": "shared"}, once),
        "sequential": (sequential, {"training": FAST, **TASK_FREE}),
        "guarded": (sequential, {"training": FAST, "gate": {"max_regression": 0.1}}),
        "per_task": ({"name": "per_task", "lora": LORA}, once),
        "zero_shot": ({"name": "zero_shot"}, once),
        "ablated": (ablated, once),
        "replay": ({"name": "replay", "lora": LORA, "share": 0.3}, once),
        "multitask": ({"name": "multitask", "lora": LORA}, once),
        "ewc": ({"name": "ewc", "lora": LORA, "fisher_rows": 4}, once),
        "olora": ({"name": "olora", "lora": LORA}, once),
        "mocl": ({"name": "mocl", "lora": LORA}, once),
        "moses": ({"name": "moses", "lora": LORA}, once),
    }
    cases = {
        name: stream_of(inputs, folder / name, TASKS[:2], method, **sections)
        for name, (method, sections) in streams.items()
    }
    cases["started"] = started(inputs, folder / "started")
    for work_dir, _ in cases.values():  # creating MLflow's database takes seconds: one empty one serves all
        work_dir.mkdir()
        shutil.copy(empty_database(folder), work_dir / "mlflow.db")
    cases |= asking(inputs, cases["sequential"][0], folder)
    done = run_many([case for _, case in cases.values()], folder / "out")
    return {name: (work_dir, result) for (name, (work_dir, _)), result in zip(cases.items(), done, strict=True)}


def started(inputs: Inputs, folder: Path) -> tuple[Path, Case]:
    """A stream whose first task starts from the PEFT adapter folder `adapter` beside its work_dir and hardly moves."""
    model = AutoModelForCausalLM.from_pretrained(inputs.backbone)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["gate_proj", "up_proj", "down_proj"])
    config.init_lora_weights = False  # B is random, not zero
    get_peft_model(model, config).save_pretrained(folder.with_name("adapter"))
    method = {"name": "per_task", "lora": {"rank": 3, "alpha": 6, "dropout": 0.0}}
    sections = {"training": {"learning_rate": 1e-12}, "start_from": {"first": str(folder.with_name("adapter"))}}
    return stream_of(inputs, folder, TASKS[:1], method, **sections)


def asking(inputs: Inputs, work_dir: Path, folder: Path) -> dict[str, tuple[Path, Case]]:
    """Commands on the work_dir of `sequential`; {name: (what they write, command)}."""
    out, data = folder / "auto.parquet", inputs.root / "first" / "test.parquet"
    auto = ["--work-dir", work_dir, "--task", "auto", "--data", data, "--out", out]
    review = ["--work-dir", work_dir, "--task", "first", "--review", 1, 2]
    return {"auto": (out, Case("predict", auto)), "review": (work_dir, Case("evaluate", review))}


def empty_database(folder: Path) -> Path:
    """An MLflow database without runs, made by MLflow."""
    from mlflow import MlflowClient

    path = folder / "empty.db"
    if not path.is_file():
        MlflowClient(tracking_uri=f"sqlite:///{path}").get_experiment_by_name("perennial")
    return path
