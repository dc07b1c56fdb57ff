"""One rank of the loading tests: loads small backbones case by case and notes what it holds.

    deepspeed --num_accelerators N tests/placement/loading_ranks.py plan.json

Every rank leaves <folder>/rank<r>.json: {case: note}. It only records: the tests compare.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import deepspeed
import torch
from transformers import AutoModelForCausalLM

from pipeline.placement.distributed import World, start_world
from tests.placement.loading_proof import Sizes, engine_settings, load, prove


@torch.no_grad()
def note_of(world: World, case: dict[str, Any]) -> dict[str, Any]:
    """Load as the case says, and compare every tensor, gathered, with what transformers loads on this rank alone."""
    backbone, dtype, stage, ep, zero = (case[key] for key in ("backbone", "dtype", "stage", "ep", "zero"))
    reference = AutoModelForCausalLM.from_pretrained(
        backbone, dtype=getattr(torch, dtype), attn_implementation="sdpa", experts_implementation="eager"
    ).eval()
    plain = torch.nn.functional.linear
    loaded = load(world, Path(backbone), dtype, stage, ep, **zero)
    wanted = reference.state_dict()
    note: dict[str, Any] = {
        "bytes_read": loaded.checkpoint.bytes_read,
        "names": sorted(loaded.parameters),
        "differing": [],
        "dtypes": {},
        "held": {},
        "slices": {},
    }
    for name, parameter in loaded.parameters.items():
        expected = wanted[name]
        if hasattr(parameter, "expert_slice"):
            first, stop, _ = note["slices"][name] = parameter.expert_slice
            expected = expected[first:stop]
        partitioned = hasattr(parameter, "ds_id")
        held = parameter.ds_tensor if partitioned else parameter
        note["held"][name] = [held.numel(), parameter.data.numel(), str(held.device)]
        note["dtypes"][name] = str(held.dtype)
        with deepspeed.zero.GatheredParameters([parameter], enabled=partitioned):
            same = parameter.shape == expected.shape and torch.equal(parameter, expected)
        if not same or loaded.model.get_parameter(name) is not parameter or parameter.requires_grad:
            note["differing"].append(name)
    for name, buffer in loaded.model.named_buffers():
        other = dict(reference.named_buffers())[name]
        if buffer.dtype != torch.float32 or not torch.equal(buffer, other):
            note["differing"].append(name)
    note["linear_replaced"] = torch.nn.functional.linear is not plain
    if case["forward"]:
        ids = torch.randint(0, 83, (2, 13), generator=torch.Generator().manual_seed(1))
        torch.nn.functional.linear = plain  # both sides by the same kernels
        loaded.model.set_experts_implementation("eager")
        engine = deepspeed.initialize(model=loaded.model, config=engine_settings(stage, dtype, **zero))[0]
        note["logits_equal"] = torch.equal(engine(input_ids=ids).logits, reference(input_ids=ids).logits)
        engine.destroy()
    torch.nn.functional.linear = plain
    return note


def main() -> int:
    """Run the plan named on the command line; a rank that fails ends the launch."""
    path = next(argument for argument in sys.argv[1:] if argument.endswith(".json"))
    plan = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(1)  # the ranks of a test share two cores
    world = start_world(timeout_seconds=120)
    notes: dict[str, Any] = {}
    try:
        for case in plan["cases"]:
            notes[case["name"]] = note_of(world, case)
            world.barrier()
        notes["proof"] = prove(world, Path(plan["folder"]) / "synthetic", Sizes(**plan["sizes"]))
    except BaseException:
        print(f"rank {world.rank}, after {list(notes)}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        raise
    (Path(plan["folder"]) / f"rank{world.rank}.json").write_text(json.dumps(notes), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
