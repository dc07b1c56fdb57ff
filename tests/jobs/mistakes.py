"""What users get wrong in streams, contracts, data and placement; tests/jobs/test_bad_input.py hands each to jobs/continual.py.

A builder gets a `Place`, makes the mistake there and returns the command's arguments; `@mistake` names what the sentence on
stderr must contain.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.helpers import make_stream, make_task, save_backbone
from tests.jobs.conftest import LEARNING, TASKS, Learned

ROWS = {"train": 12, "validation": 6, "test": 6}


@dataclass(frozen=True)
class Place:
    """An empty folder for one mistake, with a work_dir that does not exist yet."""

    folder: Path
    learned: Learned

    @property
    def root(self) -> Path:
        """The data root."""
        return self.folder / "data"

    @property
    def work_dir(self) -> Path:
        """Where the stream would publish."""
        return self.folder / "work"

    def task(self, name: str = "alone", **changes: Any) -> Path:
        """A small good task with contract fields changed."""
        return make_task(self.root, name, **({"rows": ROWS} | changes))

    def source(self, **splits: Any) -> dict[str, Any]:
        """The `source` of the task `alone` with splits changed."""
        return {"format": "parquet", **{split: [f"alone/{split}.parquet"] for split in ROWS}} | splits

    def stream(self, *tasks: Path, **sections: Any) -> list[str]:
        """Arguments that name a stream of these tasks (of one good task if none)."""
        backbone = sections.pop("backbone_dir", self.learned.inputs.backbone)
        contracts = tasks or (self.task(),)
        path = make_stream(
            self.folder / "stream.yaml", self.work_dir, backbone, self.root, contracts, **(LEARNING | sections)
        )
        return ["--stream", str(path)]

    def going_on(self, **sections: Any) -> list[str]:
        """Arguments that name the learned stream with sections changed, on a copy of its work_dir."""
        shutil.copytree(self.learned.work_dir, self.work_dir)
        inputs = self.learned.inputs
        return self.stream_of(inputs.root, [inputs.contract(task) for task in TASKS], **sections)

    def stream_of(self, root: Path, tasks: list[Path], **sections: Any) -> list[str]:
        """Arguments that name a stream of tasks elsewhere."""
        backbone = sections.pop("backbone_dir", self.learned.inputs.backbone)
        path = make_stream(self.folder / "stream.yaml", self.work_dir, backbone, root, tasks, **(LEARNING | sections))
        return ["--stream", str(path)]

    def deepspeed(self, text: str) -> list[str]:
        """Arguments that name a DeepSpeed file with this text."""
        path = self.folder / "deepspeed.json"
        path.write_text(text)
        return self.stream(deepspeed=str(path))


@dataclass(frozen=True)
class Mistake:
    """How it is made, and what the sentence must contain."""

    build: Callable[[Place], list[str]]
    says: tuple[str, ...]


MISTAKES: dict[str, Mistake] = {}


def mistake(*says: str) -> Callable:
    """Register a builder under its own name."""

    def register(build: Callable[[Place], list[str]]) -> Callable:
        MISTAKES[build.__name__] = Mistake(build, says)
        return build

    return register


# ---- stream and command line


@mistake("unknown key 'trainig'")
def unknown_key(at: Place) -> list[str]:
    return at.stream(trainig={"epochs": 2})


@mistake("unknown key 'training.epoch'")
def unknown_nested_key(at: Place) -> list[str]:
    return [*at.stream(), "--set", "training.epoch=2"]


@mistake("unknown key", "lora.rnak")
def unknown_method_option(at: Place) -> list[str]:
    return [*at.stream(), "--set", "method.lora.rnak=4"]


@mistake("method.name is 'moe'", "moe_cl", "sequential")
def unknown_method(at: Place) -> list[str]:
    return [*at.stream(), "--set", "method.name=moe"]


@mistake("method.name is None")
def no_method_name(at: Place) -> list[str]:
    return [*at.stream(), "--set", "method={}"]


@mistake("batch_size", "greater than or equal to 1")
def batch_of_no_rows(at: Place) -> list[str]:
    return [*at.stream(), "--set", "training.batch_size=0"]


@mistake("nowhere.yaml", "No such file")
def missing_stream(at: Place) -> list[str]:
    return ["--stream", str(at.folder / "nowhere.yaml")]


@mistake("stream.yaml", "not valid YAML")
def broken_stream(at: Place) -> list[str]:
    arguments = at.stream()
    Path(arguments[1]).write_text("stream: [tiny\n")
    return arguments


@mistake("mapping of keys")
def stream_that_is_a_list(at: Place) -> list[str]:
    arguments = at.stream()
    Path(arguments[1]).write_text("- tiny\n")
    return arguments


@mistake("--set training.epochs", "key.path=value")
def override_without_a_value(at: Place) -> list[str]:
    return [*at.stream(), "--set", "training.epochs"]


@mistake("--set seed.value=3", "not a section")
def override_below_a_value(at: Place) -> list[str]:
    return [*at.stream(seed=1), "--set", "seed.value=3"]


@mistake("--set training.epochs=[", "not valid YAML")
def override_that_is_no_yaml(at: Place) -> list[str]:
    return [*at.stream(), "--set", "training.epochs=["]


@mistake("--until nobody", "alone")
def until_an_unknown_task(at: Place) -> list[str]:
    return [*at.stream(), "--until", "nobody"]


@mistake("named twice")
def same_contract_twice(at: Place) -> list[str]:
    task = at.task()
    return at.stream(task, task)


@mistake("two contracts", "'alone'")
def two_contracts_of_one_task(at: Place) -> list[str]:
    task = at.task()
    other = at.root / "other.yaml"
    shutil.copy(task, other)
    return at.stream(task, other)


@mistake("work_dir", "cannot be written")
def work_dir_that_is_a_file(at: Place) -> list[str]:
    (at.folder / "file").write_text("")
    return [*at.stream(), "--set", f"work_dir={at.folder / 'file'}"]


@mistake("batch_size 10", "does not divide over 1 ranks", "micro_batch_size 4")
def batch_that_does_not_divide(at: Place) -> list[str]:
    return at.stream(training={"batch_size": 10, "micro_batch_size": 4})


@mistake("--stages train", "validate,prepare")
def stage_that_needs_a_device(at: Place) -> list[str]:
    return [*at.stream(), "--stages", "train"]


@mistake("gate.min_metric", "'alnoe'", "alone")
def gate_for_an_unknown_task(at: Place) -> list[str]:
    return at.stream(gate={"min_metric": {"alnoe": 0.5}})


@mistake("tracking.registered_model", "rename it")
def registered_model_with_a_slash(at: Place) -> list[str]:
    return [*at.stream(), "--set", "tracking.registered_model=team/reviews"]


@mistake("tracking.uri", "'carrier-pigeon://loft'")
def tracking_uri_of_an_unknown_kind(at: Place) -> list[str]:
    return [*at.stream(), "--set", "tracking.uri=carrier-pigeon://loft"]


# ---- contracts


@mistake("alone.yaml", "No such file")
def missing_contract(at: Place) -> list[str]:
    arguments = at.stream()
    (at.root / "alone.yaml").unlink()
    return arguments


@mistake("alone.yaml", "task", "'../../elsewhere'")
def task_name_with_a_path(at: Place) -> list[str]:
    return at.stream(at.task(task="../../elsewhere"))


@mistake("alone.yaml", "ownr", "not a field of a contract")
def unknown_contract_field(at: Place) -> list[str]:
    return at.stream(at.task(ownr="somebody"))


@mistake("labels changed under version 1.0.0", "increment 1", "raise the contract's version")
def labels_changed_under_the_same_version(at: Place) -> list[str]:
    return _first_changed(at, labels={"negative": " no", "neutral": " so", "positive": " yes"})


@mistake("prompt changed under version 1.0.0", "increment 1", "raise the contract's version")
def prompt_changed_under_the_same_version(at: Place) -> list[str]:
    return _first_changed(at, prompt="{text}\nVerdict:")


def _first_changed(at: Place, **changes: Any) -> list[str]:
    inputs = at.learned.inputs
    shutil.copytree(at.learned.work_dir, at.work_dir)
    contract = yaml.safe_load(inputs.contract("first").read_text()) | changes
    changed = at.folder / "first.yaml"
    changed.write_text(yaml.safe_dump(contract))
    return at.stream_of(inputs.root, [changed])


# ---- data


@mistake("alone/train.parquet", "matches no file")
def missing_data_file(at: Place) -> list[str]:
    task = at.task()
    (at.root / "alone" / "train.parquet").unlink()
    return at.stream(task)


@mistake("nowhere", "matches no file")
def missing_data_root(at: Place) -> list[str]:
    return [*at.stream(), "--set", f"data_roots=[{at.folder / 'nowhere'}]"]


@mistake("outside the data roots")
def path_outside_the_roots(at: Place) -> list[str]:
    outside = make_task(at.folder / "outside", "alone", rows=ROWS).parent / "alone" / "train.parquet"
    return at.stream(at.task(source=at.source(train=[str(outside)])))


@mistake("'..'", "not allowed")
def path_that_climbs_out(at: Place) -> list[str]:
    return at.stream(at.task(source=at.source(train=["../outside/train.parquet"])))


@mistake("train.parquet", "outside the data roots")
def link_out_of_the_root(at: Place) -> list[str]:
    task = at.task()
    train = at.root / "alone" / "train.parquet"
    train.rename(at.folder / "train.parquet")
    train.symlink_to(at.folder / "train.parquet")
    return at.stream(task)


@mistake("'file::alone/train.parquet'", "not allowed")
def chained_protocol(at: Place) -> list[str]:
    return at.stream(at.task(source=at.source(train=["file::alone/train.parquet"])))


@mistake("task alone", "5 of 24 rows", "3 empty_text", "2 unknown_label", "max_rejected_fraction")
def too_many_bad_rows(at: Place) -> list[str]:
    task = at.task()
    path = at.root / "alone" / "train.parquet"
    rows = pq.read_table(path).to_pylist()
    for row in rows[:3]:
        row["text"] = "  "
    for row in rows[3:5]:
        row["label"] = "grand"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return at.stream(task)


@mistake("train has 12 usable rows and needs 50")
def too_few_rows(at: Place) -> list[str]:
    return at.stream(at.task(limits={"min_rows": {"validation": 1, "test": 1}}))


@mistake("'title'", "train.parquet")
def prompt_naming_a_missing_column(at: Place) -> list[str]:
    return at.stream(at.task(prompt="{title}: {text}\nAnswer:"))


@mistake("train.parquet", "not a readable parquet")
def unreadable_parquet(at: Place) -> list[str]:
    task = at.task()
    (at.root / "alone" / "train.parquet").write_bytes(b"PAR1 this is no table PAR1")
    return at.stream(task)


@mistake("train.parquet", "not a readable parquet")
def cut_off_parquet(at: Place) -> list[str]:
    task = at.task()
    path = at.root / "alone" / "train.parquet"
    path.write_bytes(path.read_bytes()[:-300])
    return at.stream(task)


# ---- backbone and experts


@mistake("'gpt2'", "llama", "qwen3")
def backbone_without_a_known_ffn(at: Place) -> list[str]:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(at.folder / "gpt2")
    return at.stream(backbone_dir=at.folder / "gpt2")


@mistake("nowhere", "config.json")
def missing_backbone(at: Place) -> list[str]:
    return at.stream(backbone_dir=at.folder / "nowhere")


@mistake("no *.safetensors")
def backbone_without_safetensors(at: Place) -> list[str]:
    shutil.copytree(at.learned.inputs.backbone, at.folder / "backbone")
    (at.folder / "backbone" / "model.safetensors").unlink()
    return at.stream(backbone_dir=at.folder / "backbone")


@mistake("cannot read its config.json")
def backbone_with_a_broken_config(at: Place) -> list[str]:
    shutil.copytree(at.learned.inputs.backbone, at.folder / "backbone")
    (at.folder / "backbone" / "config.json").write_text("{")
    return at.stream(backbone_dir=at.folder / "backbone")


@mistake("cannot read its config.json", "num_hidden_layers")
def backbone_config_of_a_wrong_type(at: Place) -> list[str]:
    folder = shutil.copytree(at.learned.inputs.backbone, at.folder / "backbone")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": "three"}
    (folder / "config.json").write_text(json.dumps(config))
    return at.stream(backbone_dir=folder)


@mistake("model.safetensors", "cannot be read")
def cut_off_weights(at: Place) -> list[str]:
    folder = shutil.copytree(at.learned.inputs.backbone, at.folder / "backbone")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return at.stream(backbone_dir=folder)


@mistake("tokenizer")
def backbone_without_a_tokenizer(at: Place) -> list[str]:
    shutil.copytree(at.learned.inputs.backbone, at.folder / "backbone")
    for file in (at.folder / "backbone").glob("token*"):
        file.unlink()
    return at.stream(backbone_dir=at.folder / "backbone")


@mistake("trust_remote_code")
def code_from_the_checkpoint(at: Place) -> list[str]:
    return [*at.stream(), "--set", "backbone.trust_remote_code=true"]


@mistake("mlp.gate_projection", "matches no projection", "gate_proj")
def target_that_matches_nothing(at: Place) -> list[str]:
    return [*at.stream(), "--set", "method.lora.targets=[mlp.gate_projection]"]


@mistake("backbone", "increment 3")
def other_backbone_in_the_middle_of_a_stream(at: Place) -> list[str]:
    return at.going_on(backbone_dir=save_backbone(at.folder / "backbone", seed=9))


@mistake("method.lora", "increment 3")
def other_experts_in_the_middle_of_a_stream(at: Place) -> list[str]:
    return [*at.going_on(), "--set", "method.lora.rank=5"]


@mistake("method.lora", "increment 3")
def other_scale_in_the_middle_of_a_stream(at: Place) -> list[str]:
    return [*at.going_on(), "--set", "method.lora.alpha=7"]


@mistake("method", "moe_cl", "increment 3")
def other_method_in_the_middle_of_a_stream(at: Place) -> list[str]:
    return at.going_on(method={"name": "sequential", "lora": LEARNING["method"]["lora"]})


# ---- DeepSpeed's file and what was published before


@mistake("train_batch_size", "training.batch_size")
def deepspeed_file_with_a_batch_size(at: Place) -> list[str]:
    return at.deepspeed(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 3}}))


@mistake("stage 1", "2 and 3")
def deepspeed_file_with_stage_1(at: Place) -> list[str]:
    return at.deepspeed(json.dumps({"zero_optimization": {"stage": 1}}))


@mistake("zero_optimization", "2 and 3")
def deepspeed_file_without_zero(at: Place) -> list[str]:
    return at.deepspeed(json.dumps({"zero_optimization": None}))


@mistake("nowhere.json", "No such file")
def missing_deepspeed_file(at: Place) -> list[str]:
    return at.stream(deepspeed=str(at.folder / "nowhere.json"))


@mistake("deepspeed.json", "not valid JSON")
def broken_deepspeed_file(at: Place) -> list[str]:
    return at.deepspeed('{"zero_optimization": ')


@mistake("champion.json", "restore it from a backup")
def damaged_champion(at: Place) -> list[str]:
    arguments = at.going_on()
    champion = at.work_dir / "champion.json"
    champion.write_text(champion.read_text().replace('"increment":3', '"increment":2'))
    return arguments
