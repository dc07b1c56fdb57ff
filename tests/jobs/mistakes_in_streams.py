"""Mistakes in the stream file, on the command line and in DeepSpeed's file."""

import json
import shutil
from pathlib import Path

from tests.jobs.mistakes import Place, mistake

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
