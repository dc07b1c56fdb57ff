"""Proof at size: what a rank reads and keeps of a backbone of about 3 GB, against plain arithmetic.

    deepspeed --num_accelerators 4 tests/placement/loading_proof.py FOLDER

Writes a random Hunyuan-shaped checkpoint into FOLDER (new; removed at the end), loads it at ZeRO-3 x EP 2, at ZeRO-3 x
EP 4 and at ZeRO-2 x EP 4, and prints for every rank the bytes of tensor slices it asked for, and the peak of its
anonymous memory above that of the started process. Ends with 1 where the bytes differ at all, or the memory by more
than 10 % from the rank's share plus one layer.
"""

import argparse
import ctypes
import gc
import json
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from pipeline.backbones.checkpoint import Checkpoint
from pipeline.backbones.load import skeleton
from pipeline.config import BackboneConfig
from pipeline.placement.distributed import World, start_world
from pipeline.placement.expert_parallel import join, share_out
from pipeline.placement.materialise import materialise, stock_tensors

CASES = ((3, 2), (3, 4), (2, 4))  # ZeRO stage, expert-parallel size
TOLERANCE = 0.10
MB = 1e6


@dataclass(frozen=True)
class Sizes:
    """Of a `hunyuan_v1_moe` backbone; the defaults make 3.1 GB in bfloat16."""

    layers: int = 26
    width: int = 1024
    ffn_width: int = 1024
    experts: int = 16
    vocabulary: int = 32_000
    heads: int = 16
    kv_heads: int = 4
    head: int = 64


def layer_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """One layer's tensors as hub checkpoints name them, without the routed experts."""
    query, keys, width = sizes.heads * sizes.head, sizes.kv_heads * sizes.head, sizes.width
    return {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (query, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, query),
        "self_attn.query_layernorm.weight": (sizes.head,),
        "self_attn.key_layernorm.weight": (sizes.head,),
        "mlp.gate.wg.weight": (sizes.experts, width),
        "mlp.shared_mlp.gate_proj.weight": (sizes.ffn_width, width),
        "mlp.shared_mlp.up_proj.weight": (sizes.ffn_width, width),
        "mlp.shared_mlp.down_proj.weight": (width, sizes.ffn_width),
    }


def end_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Tensors before and after the layers."""
    ends = (sizes.vocabulary, sizes.width)
    return {"model.embed_tokens.weight": ends, "lm_head.weight": ends, "model.norm.weight": (sizes.width,)}


def write_checkpoint(folder: Path, sizes: Sizes) -> None:
    """Random weights in bfloat16, routers in fp32, one file a layer; never more than a layer in memory."""
    folder.mkdir(parents=True)
    config = AutoConfig.for_model(
        "hunyuan_v1_moe",
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.ffn_width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head,
        num_experts=sizes.experts,
        moe_topk=1,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    places = {}

    def write(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {name: torch.empty(shape, dtype=_saved_dtype(name)) for name, shape in shapes.items()}
        for tensor in tensors.values():
            tensor.uniform_(-1, 1, generator=generator)
        save_file(tensors, folder / file)
        places.update(dict.fromkeys(tensors, file))

    write("ends.safetensors", end_shapes(sizes))
    for layer in range(sizes.layers):
        shapes = {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes(sizes).items()}
        for expert in range(sizes.experts):
            for part in ("gate", "up", "down"):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
                shapes[name] = (sizes.width, sizes.ffn_width) if part == "down" else (sizes.ffn_width, sizes.width)
        write(f"layer-{layer:03d}.safetensors", shapes)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _saved_dtype(name: str) -> torch.dtype:
    return torch.float32 if ".mlp.gate.wg." in name else torch.bfloat16


def expected_bytes(sizes: Sizes, world_size: int, stage: int, ep: int) -> tuple[int, int]:
    """(a rank's share of the weights, one layer with the rank's experts, whole), in bytes.

    A rank's experts are E / ep of every block. ZeRO-3 cuts these over world / ep ranks and everything else over all.
    The sizes are such that every cut falls between two rows.
    """

    def dense(shapes: dict[str, tuple[int, ...]], ranks: int) -> int:
        return sum(
            _numel(shape) // ranks * (4 if _saved_dtype("." + name) == torch.float32 else 2)
            for name, shape in shapes.items()
        )

    experts = sizes.experts // ep * 3 * sizes.width * sizes.ffn_width * 2
    layer = experts + dense(layer_shapes(sizes), 1)
    everywhere, alike = (world_size, world_size // ep) if stage == 3 else (1, 1)
    share = sizes.layers * (experts // alike + dense(layer_shapes(sizes), everywhere))
    return share + dense(end_shapes(sizes), everywhere), layer


def _numel(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


@dataclass
class Loaded:
    """A backbone on this rank; parameters by their names in the stock model."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    checkpoint: Checkpoint


def engine_settings(stage: int, dtype: str, **zero: Any) -> dict[str, Any]:
    """A whole DeepSpeed configuration."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
        "steps_per_print": 10**9,
    }


def load(world: World, folder: Path, dtype: str, stage: int, ep: int, **zero: Any) -> Loaded:
    """Load as the pipeline's learner does, without LoRA experts."""
    model, family = skeleton(BackboneConfig(path=str(folder), dtype=dtype))
    parallel = join(ep)
    if parallel is not None:
        share_out(model, family, parallel)
    parameters, buffers = stock_tensors(model)
    checkpoint = Checkpoint(folder, family, model.config)
    settings = engine_settings(stage, dtype, **zero) if stage == 3 else None
    materialise(parameters, buffers, checkpoint, world.device, getattr(torch, dtype), settings)
    return Loaded(model, parameters, checkpoint)


class AnonymousPeak:
    """Peak of this process' anonymous resident memory over that at the start of the context, in bytes."""

    def __enter__(self) -> "AnonymousPeak":
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.start = self.highest = _anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.highest = max(self.highest, _anonymous())

    @property
    def above_start(self) -> int:
        return self.highest - self.start

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.highest = max(self.highest, _anonymous())


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system's /proc/self/status has no RssAnon")


def measure(world: World, folder: Path, sizes: Sizes, stage: int, ep: int) -> dict[str, Any]:
    """One case on this rank: bytes asked for and peak memory, measured and expected."""
    share, layer = expected_bytes(sizes, world.size, stage, ep)
    world.barrier()
    with AnonymousPeak() as peak:
        begin = time.monotonic()
        loaded = load(world, folder, "bfloat16", stage, ep)
        seconds = time.monotonic() - begin
    return {
        "case": f"ZeRO-{stage} x EP {ep}",
        "read": loaded.checkpoint.bytes_read,
        "share": share,
        "layer": layer,
        "peak": peak.above_start,
        "seconds": seconds,
        "values": _last_experts_are_right(world, folder, sizes, loaded, stage, ep),
    }


def _last_experts_are_right(world: World, folder: Path, sizes: Sizes, loaded: Loaded, stage: int, ep: int) -> bool:
    """Whether what this rank keeps of the last layer's down projections is what the file holds there."""
    local = sizes.experts // ep
    first = world.rank % ep * local
    saved = f"model.layers.{sizes.layers - 1}.mlp.experts"
    with safe_open(folder / f"layer-{sizes.layers - 1:03d}.safetensors", framework="pt") as file:
        tensor = torch.stack([file.get_tensor(f"{saved}.{first + e}.down_proj.weight") for e in range(local)])
    parameter = loaded.parameters[f"{saved}.down_proj"]
    if stage == 2:
        return torch.equal(parameter.data, tensor)
    parts = tensor.flatten().chunk(world.size // ep)
    return torch.equal(parameter.ds_tensor.data, parts[world.rank // ep])


def prove(world: World, folder: Path, sizes: Sizes) -> list[dict[str, Any]]:
    """Write, load in every case, remove. All ranks' figures, case by case, in rank order."""
    world.on_main(lambda: write_checkpoint(folder, sizes))
    MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(folder))]  # imported before the first measurement
    try:
        figures = []
        for stage, ep in CASES:
            join(ep)  # the groups' own buffers belong to the started process
            figures += [
                {"rank": rank} | f for rank, f in enumerate(world.gather(measure(world, folder, sizes, stage, ep)))
            ]
        return figures
    finally:
        world.barrier()
        world.on_main(lambda: shutil.rmtree(folder))


def main() -> int:
    """Run the proof; see the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local_rank")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    world = start_world()
    failed = False
    for f in prove(world, folder, Sizes()):
        expected = f["share"] + f["layer"]
        off = f["peak"] / expected - 1
        fine = f["read"] == f["share"] and abs(off) <= TOLERANCE and f["values"]
        failed = failed or not fine
        if world.is_main:
            print(
                f"{f['case']}, rank {f['rank']}: asked for {f['read'] / MB:.1f} MB, share {f['share'] / MB:.1f} MB; "
                f"peak {f['peak'] / MB:.1f} MB, share and one layer {expected / MB:.1f} MB ({off:+.1%}), share alone "
                f"{f['peak'] / f['share'] - 1:+.1%}; {f['seconds']:.1f} s{'' if fine else '  FAILED'}",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
