"""`start_from`: a PEFT adapter folder starts a new task's own LoRA expert, or is refused before weights are read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data_contracts.errors import UserError
from pipeline.backbones.load import backbone_digest
from pipeline.config import StreamConfig, adapter_digest, build_method
from pipeline.experts.bank import Bank
from pipeline.experts.peft_format import pairs_in, to_peft
from pipeline.methods.protocol import Increment
from pipeline.stages.job import Job
from pipeline.stages.train import start_values
from pipeline.tensor_files import METADATA_KEY
from pipeline.training.adapter_folder import check_start_from, check_started_tasks
from tests.helpers import light_learner, randomise, stream_dict

TASKS = ["first", "second"]


@pytest.fixture
def folder(tmp_path, backbone_dir) -> Path:
    """A PEFT adapter folder of rank 3 and alpha 12 on the three projections, saved for the tiny backbone."""
    config = stream(tmp_path, backbone_dir, {}, {"name": "per_task", "lora": {"rank": 3, "alpha": 12}})
    model = AutoModelForCausalLM.from_pretrained(backbone_dir)
    learner = light_learner(model, build_method(config).plan)
    randomise(learner, 4)
    own, tensors = to_peft(pairs_in(learner.components["adapter"]), 4.0, str(backbone_dir), False)
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(own))
    save_file({name: tensor.detach() for name, tensor in tensors.items()}, path / "adapter_model.safetensors")
    return path


def stream(tmp_path, backbone_dir, start_from, method=None) -> StreamConfig:
    """A stream whose experts have rank 3 and alpha 6."""
    found = stream_dict(tmp_path / "work", backbone_dir, tmp_path, ["a.yaml", "b.yaml"], start_from=start_from)
    found["method"] = method or {"name": "moe_cl", "lora": {"rank": 3, "alpha": 6}}
    return StreamConfig.model_validate(found)


def increment(task: str, **bundles) -> Increment:
    return Increment(number=len(bundles) + 1, task=task, seed=17, bundles=bundles, states={}, order=tuple(bundles))


def test_a_new_task_starts_from_the_folder_and_everything_else_as_always(tmp_path, backbone_dir, tiny_model, folder):
    config = stream(tmp_path, backbone_dir, {"second": str(folder)})
    method = build_method(config)
    check_start_from(config, method)
    learner = light_learner(tiny_model, method.plan)
    work_dir, bank = tmp_path / "work", Bank(tmp_path / "work/bank")
    job = Job(config, learner.world, work_dir, method, None, learner, bank, {})
    plain = start_values(replace(job, config=config.model_copy(update={"start_from": {}})), increment("second"))
    started, other = start_values(job, increment("second")), start_values(job, increment("first"))
    peft = load_file(folder / "adapter_model.safetensors")
    for name in learner.parameters:
        component, _, public = name.partition("/")
        if component == "dedicated":
            path, _, part = public.rpartition(".")
            value = peft[f"base_model.model.{path}.{part}.weight"]
            # alpha / rank is 4 there and 2 here: what is added to the frozen weight must be the same
            assert torch.equal(started.read(name), value if part == "lora_A" else 2 * value)
        else:
            assert torch.equal(started.read(name), plain.read(name))
        assert torch.equal(other.read(name), plain.read(name))  # the folder is the other task's
    own = bank.put({n: torch.full(tuple(p.shape), 0.5) for n, p in learner.components["dedicated"].items()})
    again = start_values(job, increment("second", second={"dedicated": own}))
    assert all(bool((again.read(f"dedicated/{name}") == 0.5).all()) for name in learner.components["dedicated"])


def test_the_folders_digest_is_part_of_what_is_learned_and_its_path_is_not(tmp_path, backbone_dir, folder):
    without, named = (stream(tmp_path, backbone_dir, tasks).learning() for tasks in ({}, {"first": str(folder)}))
    assert "start_from" not in without
    assert named == without | {"start_from": {"first": adapter_digest(str(folder))}}
    moved = folder.rename(tmp_path / "moved")
    assert stream(tmp_path, backbone_dir, {"first": str(moved)}).learning() == named


def rewrite(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def only_a_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def with_note(folder: Path, backbone: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={METADATA_KEY: json.dumps({"backbone": backbone})})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (only_a_pickle, "adapter_model.bin, a pickle, which is never read"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "and no tensors"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"torn"), "save the adapter again"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json cannot be read"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "is not PEFT's"),
        (lambda folder: rewrite(folder, base_model_name_or_path=5), "is not PEFT's"),
        (lambda folder: rewrite(folder, base_model_name_or_path="x" * 5000), "its base model is"),
        (lambda folder: rewrite(folder, alpha_pattern=[3]), "must be a mapping"),
        (lambda folder: rewrite(folder, base_model_name_or_path="meta-llama/Llama-2-7b"), "its base model is"),
        (lambda folder: with_note(folder, "0" * 64), "trained on another model"),
        (lambda folder: rewrite(folder, r=5), "adapter_config.json says 5"),
        (lambda folder: rewrite(folder, peft_type="IA3"), "only LORA can be read"),
    ],
)
def test_a_folder_that_cannot_start_the_expert_is_refused_in_one_sentence(tmp_path, backbone_dir, folder, damage, told):
    damage(folder)
    config = stream(tmp_path, backbone_dir, {"first": str(folder)})
    with pytest.raises(UserError, match=rf"start_from\.first: .*{told}") as raised:
        check_start_from(config, build_method(config))
    assert "\n" not in str(raised.value) and "name another adapter" in str(raised.value)


def test_rank_targets_and_shapes_must_be_the_streams(tmp_path, backbone_dir, folder):
    def told(**lora) -> str:
        config = stream(tmp_path, backbone_dir, {"first": str(folder)}, {"name": "per_task", "lora": lora})
        with pytest.raises(UserError) as raised:
            check_start_from(config, build_method(config))
        return str(raised.value)

    assert "is 3, and method.lora.rank is 8" in told(rank=8)
    assert "no pair on model.layers.0.self_attn.q_proj" in told(rank=3, targets=["gate_proj", "q_proj"])
    assert "adapts model.layers.0.mlp.down_proj" in told(rank=3, targets=["gate_proj", "up_proj"])
    path = folder / "adapter_model.safetensors"
    save_file(
        {k: v[:, 1:].contiguous() if k.endswith("gate_proj.lora_A.weight") else v for k, v in load_file(path).items()},
        path,
    )
    assert "is (3, 47), and this backbone needs (3, 48)" in told(rank=3)


def test_the_base_model_is_the_same_by_digest_by_folder_or_by_name(tmp_path, backbone_dir, folder):
    config = stream(tmp_path, backbone_dir, {"first": str(folder)})
    method = build_method(config)
    for base in (None, str(backbone_dir), f"us/{Path(backbone_dir).resolve().name}"):
        rewrite(folder, base_model_name_or_path=base)
        check_start_from(config, method)
    rewrite(folder, base_model_name_or_path="renamed/since")
    with_note(folder, backbone_digest(str(backbone_dir)))
    check_start_from(config, method)


def test_tasks_are_checked_against_the_stream_and_the_method(tmp_path, backbone_dir, folder):
    def check(task: str, method: dict | None = None) -> None:
        check_started_tasks(stream(tmp_path, backbone_dir, {task: str(folder)}, method), TASKS)

    check("second")
    check("second", {"name": "per_task"})
    check("first", {"name": "sequential"})
    with pytest.raises(UserError, match=r"start_from names 'third'.* it has first, second"):
        check("third")
    with pytest.raises(UserError, match=r"start_from\.second: with method sequential .* first, alone"):
        check("second", {"name": "sequential"})
    config = stream(tmp_path, backbone_dir, {"first": str(folder)}, {"name": "zero_shot"})
    with pytest.raises(UserError, match="zero_shot trains no LoRA expert"):
        check_start_from(config, build_method(config))
