"""`jobs/export.py` on chains made by hand: what it writes computes what the published experts do, or is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from jobs import export as job
from pipeline.config import StreamConfig, build_method
from pipeline.experts.bank import Bank
from pipeline.files import canonical_json, sha256_text
from pipeline.tracking.chain import publish
from pipeline.tracking.manifest import Manifest
from tests.helpers import light_learner, randomise, stream_dict
from tests.tracking.conftest import manifest_fields, sha

ROOT = Path(__file__).resolve().parents[1]
INPUT = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(5))
METHODS = {name: {"name": name, "lora": {"rank": 3, "alpha": 6}} for name in ("moe_cl", "sequential", "per_task")}
METHODS["zero_shot"] = {"name": "zero_shot"}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=INPUT).logits


def stock(backbone_dir):
    return AutoModelForCausalLM.from_pretrained(backbone_dir, dtype=torch.float32).eval()


def experts(backbone_dir, method: str, seed: int = 0):
    """Random published components of a method on the stock model, {component: tensors}, and the model's logits."""
    config = StreamConfig.model_validate(stream_dict(ROOT, backbone_dir, ROOT, ["t.yaml"], method=METHODS[method]))
    made = build_method(config)
    learner = light_learner(stock(backbone_dir), made.plan)
    randomise(learner, seed)
    learner.set_active(made.plan.roles)
    learner.model.eval()
    parts = {name: {k: p.detach().clone() for k, p in learner.components[name].items()} for name in made.published()}
    return parts, logits(learner.model.backbone)


def publish_bundle(work_dir: Path, backbone_dir: Path, method: str, bundle: dict[str, str], digest: str = "") -> Path:
    """One increment whose task is served with a bundle that is in the bank."""
    learning = {"method": METHODS[method], "seed": 17}
    manifest = Manifest(
        **manifest_fields(
            task="reviews",
            learning=learning,
            learning_digest=sha256_text(canonical_json(learning)),
            method=method,
            bundles={"reviews": bundle},
            bank={},
            backbone={"digest": digest or sha("backbone"), "model_type": "llama", "dtype": "float32"},
            row={"reviews": 0.5},
            files={},
        )
    )
    staged = work_dir / "inflight" / "publish-1"
    staged.mkdir(parents=True)
    (staged / "run.json").write_text(json.dumps({"config": {"backbone": {"path": str(backbone_dir)}}}))
    publish(work_dir, staged, manifest)
    return work_dir


def run(work_dir: Path, to: Path, *more: str, task: str = "reviews") -> int:
    return job.main(["--work-dir", str(work_dir), "--task", task, "--to", str(to), *more])


def base_model(folder: Path) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_a_plain_bundle_becomes_an_adapter_with_our_logits(tmp_path, backbone_dir, capsys):
    parts, expected = experts(backbone_dir, "per_task")
    bundle = {"adapter": Bank(tmp_path / "w/bank").put(parts["adapter"])}
    work_dir = publish_bundle(tmp_path / "w", backbone_dir, "per_task", bundle)
    assert run(work_dir, tmp_path / "out") == 0
    assert "adapter_config.json, adapter_model.safetensors" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        backbone_dir
    )
    found = logits(PeftModel.from_pretrained(stock(backbone_dir), tmp_path / "out").eval())
    assert (expected - logits(stock(backbone_dir))).abs().max() > 0.05
    assert (found - expected).abs().max() <= 1e-5
    assert run(work_dir, tmp_path / "out") == 2 and "is there already" in capsys.readouterr().err
    assert run(work_dir, tmp_path / "other", "--base-model", "us/model") == 0
    assert base_model(tmp_path / "other") == "us/model"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out", "w"]


def test_a_bundle_that_sums_weighted_experts_becomes_one_adapter(tmp_path, backbone_dir, capsys):
    bank, weights = Bank(tmp_path / "w/bank"), [0.5, -2.0]
    sets = [experts(backbone_dir, "sequential", seed)[0]["adapter"] for seed in (1, 2, 3)]
    names = ["past.2", "past.1", "adapter"]
    bundle = {name: bank.put(tensors) for name, tensors in zip(names, sets, strict=True)}
    bundle["past_weights"] = bank.put({"weights": torch.tensor(weights)})
    work_dir = publish_bundle(tmp_path / "w", backbone_dir, "sequential", bundle)
    assert run(work_dir, tmp_path / "out") == 0
    # the oracle: every delta written into the stock weights
    model = stock(backbone_dir)
    with torch.no_grad():
        for tensors, weight in zip(sets, (weights[1], weights[0], 1.0), strict=True):
            for name in (name for name in tensors if name.endswith("lora_A")):
                target = model.get_parameter(name.replace("lora_A", "weight"))
                target += weight * 2.0 * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
    found = PeftModel.from_pretrained(stock(backbone_dir), tmp_path / "out").eval()
    assert found.peft_config["default"].r == 9
    assert (logits(found) - logits(model)).abs().max() <= 2e-5
    assert run(work_dir, tmp_path / "n", "--format", "native") == 2 and "--format peft" in capsys.readouterr().err


@pytest.fixture(scope="module")
def moe_cl(tmp_path_factory, backbone_dir):
    """A work_dir with a moe_cl bundle, and the logits it gives."""
    folder = tmp_path_factory.mktemp("export")
    parts, expected = experts(backbone_dir, "moe_cl")
    bundle = {name: Bank(folder / "bank").put(tensors) for name, tensors in parts.items()}
    return publish_bundle(folder, backbone_dir, "moe_cl", bundle), expected


def test_a_moe_cl_bundle_is_refused_for_peft_with_the_reason(moe_cl, tmp_path, capsys):
    assert run(moe_cl[0], tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "moe_cl bundle" in told and "no single LoRA" in told and "gate" in told and "--format native" in told
    assert len(told.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_the_documented_loader_gives_the_moe_cl_bundles_logits(moe_cl, tmp_path, backbone_dir, monkeypatch):
    work_dir, expected = moe_cl
    assert run(work_dir, tmp_path / "exported", "--format", "native") == 0
    text = (ROOT / "docs/EXPORT.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert '"demo/backbone"' in code
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(code.replace("demo/backbone", str(backbone_dir)), scope)
    assert torch.equal(logits(scope["model"]), expected)
    record = json.loads((tmp_path / "exported/bundle.json").read_text())
    assert record["roles"] == ["shared", "dedicated"]  # the gate's outputs stand in this order
    for name, digest in record["files"].items():
        assert (tmp_path / "exported" / name).read_bytes() == Bank(work_dir / "bank").path(digest).read_bytes()


def test_what_cannot_be_exported_is_one_sentence(moe_cl, tmp_path, backbone_dir, capsys):
    work_dir, _ = moe_cl
    bare = publish_bundle(tmp_path / "bare", backbone_dir, "zero_shot", {})
    (tmp_path / "file").write_text("mine")
    for given, told in (
        ((tmp_path / "nothing", tmp_path / "o"), "no published increment"),
        ((work_dir, tmp_path / "o", "--increment", "7"), "no increment 7"),
        ((bare, tmp_path / "o"), "bare backbone"),
        ((work_dir, tmp_path / "file", "--format", "native"), "is there already"),
    ):
        assert run(*given) == 2
        message = capsys.readouterr().err
        assert told in message and len(message.splitlines()) == 1
    assert run(work_dir, tmp_path / "o", task="tweets") == 2 and "learned: reviews" in capsys.readouterr().err
    masks = Bank(tmp_path / "m/bank").put({"model.layers.0.mlp.up_proj.lora_A.bits": torch.ones(4, dtype=torch.uint8)})
    packed = publish_bundle(tmp_path / "m", backbone_dir, "per_task", {"adapter": masks, "past.1": masks})
    for form in ("peft", "native"):
        assert run(packed, tmp_path / "o", "--format", form) == 2
        assert "more than LoRA pairs" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "o").exists()
