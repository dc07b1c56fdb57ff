"""The oracle itself: with B = 0 it is the stock model; with experts on, an even plainer loop over single tokens."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import build_tokenizer, ragged
from tests.moe.oracle import MARGIN, MoeOracle, NaiveBlock, Setting
from tests.moe_helpers import MOE_TYPES, tiny_moe

RANK, SCALING = 2, 1.5
EXPERTS = 4
VOCABULARY = len(build_tokenizer())


def start_values(model, *, zero_b: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every trainable tensor of a stock model under its public name, random; B zero if asked."""
    generator = torch.Generator().manual_seed(seed)
    values = {}

    def pair(path: str, stack: tuple[int, ...], out: int, into: int) -> None:
        for role in ("shared", "dedicated"):
            values[f"{role}/{path}.lora_A"] = torch.randn(*stack, RANK, into, generator=generator) / math.sqrt(into)
            high = torch.randn(*stack, out, RANK, generator=generator)
            values[f"{role}/{path}.lora_B"] = high * 0 if zero_b else high

    def network(path: str, stack: tuple[int, ...], width: int, ffn_width: int) -> None:
        pair(f"{path}.gate_proj", stack, ffn_width, width)
        pair(f"{path}.up_proj", stack, ffn_width, width)
        pair(f"{path}.down_proj", stack, width, ffn_width)

    width = model.config.hidden_size
    for index, layer in enumerate(model.model.layers):
        path = f"model.layers.{index}.mlp"
        if hasattr(layer.mlp, "experts"):
            num_experts, _, ffn_width = layer.mlp.experts.down_proj.shape
            network(f"{path}.experts", (num_experts,), width, ffn_width)
            for name in ("shared_mlp", "shared_experts"):
                if hasattr(layer.mlp, name):
                    network(f"{path}.{name}", (), width, getattr(layer.mlp, name).up_proj.out_features)
        else:
            network(path, (), width, layer.mlp.up_proj.out_features)
        values[f"gate/{path}.gate.weight"] = torch.randn(2, width, generator=generator)
        values[f"discriminator/{path}.discriminator.weight"] = torch.randn(3, width, generator=generator)
        values[f"discriminator/{path}.discriminator.bias"] = torch.randn(3, generator=generator)
    return values


@pytest.fixture(scope="module", params=MOE_TYPES)
def saved(request, tmp_path_factory):
    """A folder with a tiny backbone of each family, and the model."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_moe(request.param, VOCABULARY, num_experts=EXPERTS, top_k=3 if request.param == "qwen3_moe" else 2)
    model.save_pretrained(folder)
    return folder, model


def oracle_of(saved, *, zero_b: bool) -> MoeOracle:
    folder, model = saved
    setting = Setting(SCALING, {"shared": 1e-3, "dedicated": 1e-3, "gate": 1e-3}, 0.0, 1.0, 0.5, 2, 0)
    return MoeOracle(folder, start_values(model, zero_b=zero_b), setting)


def test_without_experts_the_oracle_is_the_stock_model(saved):
    oracle = oracle_of(saved, zero_b=True)
    rows = ragged([9, 4, 1], VOCABULARY)
    logits, mask = oracle.logits(rows, [[5], [6, 7], []])
    stock = AutoModelForCausalLM.from_pretrained(saved[0], dtype=torch.float32)
    for row, (prompt, answer) in enumerate(zip(rows, [[5], [6, 7], []], strict=True)):
        ids = torch.tensor([[*prompt, *answer]])
        expected = stock(input_ids=ids).logits[0]
        assert mask[row].sum() == ids.numel()
        assert (logits[row, : ids.numel()] - expected).abs().max() < 1e-4
    assert MARGIN < oracle.margin < 10


def test_with_experts_a_block_is_a_plain_loop_over_tokens(saved):
    """Every token by itself, every number by hand: route, two low-rank additions a matrix, SwiGLU, weights, gate."""
    oracle = oracle_of(saved, zero_b=False)
    _, mask = oracle.logits(ragged([5, 3], VOCABULARY), [[], []])
    layers = [layer for layer in oracle.layers if isinstance(layer, NaiveBlock)]
    assert layers
    for layer in layers:
        assert torch.allclose(layer(layer.x), by_token(layer, None), rtol=0, atol=1e-6)
        pooled = layer.pooled(mask)
        shared = by_token(layer, "shared")
        assert torch.allclose(pooled[0], shared[0].sum(0) / 5, rtol=0, atol=1e-6)
        assert torch.allclose(pooled[1], shared[1, :3].sum(0) / 3, rtol=0, atol=1e-6)


@torch.no_grad()
def by_token(layer: NaiveBlock, only: str | None) -> torch.Tensor:
    """y of each token of the layer's last input, or z of one role."""
    kind, block, values = layer.model_type, layer.block, layer.values
    always = {"hunyuan_v1_moe": "shared_mlp", "hy_v3": "shared_experts"}.get(kind)
    ffn_width = block.experts.down_proj.shape[2]
    result = torch.zeros_like(layer.x)
    for row in range(layer.x.shape[0]):
        for column in range(layer.x.shape[1]):
            x = layer.x[row, column]
            router = block.gate.wg.weight if kind == "hunyuan_v1_moe" else block.gate.weight
            logits = [float(w @ x) for w in router.double()]
            if kind == "hy_v3":
                worth = [1 / (1 + math.exp(-v)) for v in logits]
                bias = block.e_score_correction_bias.tolist()
                order = sorted(range(EXPERTS), key=lambda e: -(worth[e] + bias[e]))
            else:
                worth = [math.exp(v) for v in logits]
                order = sorted(range(EXPERTS), key=lambda e: -worth[e])
            chosen = order[: block.gate.top_k]
            scale = 2.826 if kind == "hy_v3" else 1.0
            route = {e: scale * worth[e] / sum(worth[c] for c in chosen) for e in chosen}
            z = {}
            for role in ("shared", "dedicated"):
                total = torch.zeros_like(x)
                for e, weight in route.items():
                    frozen = {
                        "gate_proj": block.experts.gate_up_proj[e, :ffn_width],
                        "up_proj": block.experts.gate_up_proj[e, ffn_width:],
                        "down_proj": block.experts.down_proj[e],
                    }
                    total = total + weight * network(x, frozen, f"{role}/{layer.path}.experts", values, e)
                if always:
                    ffn = getattr(block, always)
                    frozen = {name: getattr(ffn, name).weight for name in frozen}
                    total = total + network(x, frozen, f"{role}/{layer.path}.{always}", values, None)
                z[role] = total
            gate = [math.exp(float(g @ x)) for g in values[f"gate/{layer.path}.gate.weight"]]
            mixed = (gate[0] * z["shared"] + gate[1] * z["dedicated"]) / sum(gate)
            result[row, column] = mixed if only is None else z[only]
    return result


def network(x, frozen, path, values, e) -> torch.Tensor:
    """One SwiGLU on one token, frozen product and low-rank product apart."""

    def linear(name: str, v: torch.Tensor) -> torch.Tensor:
        low, high = values[f"{path}.{name}.lora_A"], values[f"{path}.{name}.lora_B"]
        low, high = (low, high) if e is None else (low[e], high[e])
        return frozen[name].double() @ v + SCALING * (high @ (low @ v))

    gate, up = linear("gate_proj", x), linear("up_proj", x)
    return linear("down_proj", gate / (1 + torch.exp(-gate)) * up)
