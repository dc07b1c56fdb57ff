"""The streams that are broken on purpose: three contradicting tasks on tiny random backbones, dense and routed."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.helpers import make_task, save_backbone, stream_dict
from tests.moe_helpers import save_moe_backbone

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("first", "second", "third")
EPOCHS, ROWS, BATCH = 2, 13, 8  # 26 rows in 4 global batches, the last one of 2 rows
STEPS = 4
SAVE_EVERY = 3  # so that a kill costs steps, which are learned again


@dataclass(frozen=True)
class Setting:
    """What a stream is learned on."""

    name: str
    backbone: str  # dense | routed
    dtype: str
    expert_parallel: int = 1
    dropout: float = 0.1
    router: bool = False


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("dense-fp32", "dense", "float32", dropout=0.0, router=True),
        Setting("dense-bf16", "dense", "bfloat16"),
        Setting("routed-fp32", "routed", "float32", 2, dropout=0.0),
        Setting("routed-bf16", "routed", "bfloat16", 2),
    )
}


@dataclass(frozen=True)
class Inputs:
    """Backbones, data and an empty MLflow database below one folder."""

    folder: Path

    def make(self) -> None:
        """Write them."""
        save_backbone(self.folder / "dense", intermediate_size=91, num_layers=2)
        save_moe_backbone(self.folder / "routed", "hunyuan_v1_moe", num_experts=4, intermediate_size=23)
        rows = {"train": ROWS, "validation": 3, "test": 3}
        for turn, task in enumerate(TASKS):
            make_task(self.folder / "data", task, rows=rows, turn=turn, seed=turn)
        if (pid := os.fork()) == 0:  # its threads and connections stay out of this process
            from mlflow import MlflowClient

            MlflowClient(tracking_uri=f"sqlite:///{self.folder / 'empty.db'}").get_experiment_by_name("perennial")
            os._exit(0)
        os.waitpid(pid, 0)

    def stream(self, setting: Setting, folder: Path) -> tuple[Path, Path]:
        """Stream file and work_dir in a new folder."""
        folder.mkdir(parents=True)
        work_dir = folder / "work"
        work_dir.mkdir()
        shutil.copy(self.folder / "empty.db", work_dir / "mlflow.db")  # to make one takes seconds
        tasks = [self.folder / "data" / f"{task}.yaml" for task in TASKS]
        sections = {
            "method": {
                "lora": {"rank": 3, "alpha": 6, "dropout": setting.dropout},
                "adversary": {"weight": 0.1, "negatives": "prototypes"},
                "retention": {"policy": "best"},
            },
            "training": {
                **{"epochs": EPOCHS, "batch_size": BATCH, "micro_batch_size": 4, "learning_rate": 1e-2},
                **{"gradient_clipping": 1.0, "save_every": SAVE_EVERY},
            },
            "router": {"layers": 1, "features": 32} if setting.router else None,
            "deepspeed": str(self.placement(setting.expert_parallel)),
        }
        backbone = self.folder / setting.backbone
        stream = stream_dict(work_dir, backbone, self.folder / "data", tasks, **sections)
        stream["backbone"]["dtype"] = setting.dtype
        (folder / "stream.yaml").write_text(yaml.safe_dump(stream))
        return folder / "stream.yaml", work_dir

    def placement(self, expert_parallel: int) -> Path:
        """A DeepSpeed file of ZeRO-3 at an expert-parallel size, in which no tensor is kept whole."""
        raw = json.loads((ROOT / "deepspeed_configs" / "zero3.json").read_text())
        raw["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        if expert_parallel > 1:
            raw["expert_parallel"] = {"autoep_size": expert_parallel}
        path = self.folder / f"zero3-ep{expert_parallel}.json"
        path.write_text(json.dumps(raw))
        return path
