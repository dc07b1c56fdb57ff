"""A PEFT adapter that starts a task, and the published expert as a PEFT adapter again, as whole jobs."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from jobs import audit, export
from tests.jobs.streams import manifests

pytestmark = pytest.mark.timeout(1800)  # set-up is a launch with a shorter limit of its own


def test_an_adapter_goes_in_and_comes_out_with_the_same_logits(methods, inputs, tmp_path, capsys):
    work_dir, done = methods["started"]
    assert done.code == 0, done.text
    folder = work_dir.parent.with_name("adapter")
    assert f"adapter expert starts from {folder}" in done.stdout
    (manifest,) = manifests(work_dir)
    assert list(manifest["learning"]["start_from"]) == ["first"] and str(folder) not in str(manifest)
    assert audit.main(["--work-dir", str(work_dir)]) == 0, capsys.readouterr().out
    assert export.main(["--work-dir", str(work_dir), "--task", "first", "--to", str(tmp_path / "out")]) == 0
    ids = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(5))
    logits = []
    for adapter in (folder, tmp_path / "out"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(inputs.backbone), adapter)
        logits.append(model.eval()(input_ids=ids).logits.detach())
    assert (logits[0] - logits[1]).abs().max() <= 1e-5
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    came, went = (load_file(path / "adapter_model.safetensors")[name] for path in (folder, tmp_path / "out"))
    assert (went * 6 / 3 - came * 5 / 3).abs().max() <= 1e-6  # alpha is 5 there and 6 here
