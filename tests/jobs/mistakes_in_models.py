"""Mistakes in the backbone's folder and in the experts put into it."""

import json
import shutil

from tests.helpers import save_backbone
from tests.jobs.mistakes import Place, mistake
from tests.jobs.streams import LEARNING

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
