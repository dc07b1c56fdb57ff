"""One rank of the plan-against-truth test: bytes and payloads of live engines; see tests/distributed/worker.py.

    deepspeed --num_accelerators N tests/placement/plan_truth.py plan.json

Each case builds a learner, runs one micro-batch with the adversary's game on where there is one, and takes one step.
It only records: tests/placement/test_plan_truth.py compares.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import deepspeed
import torch

from pipeline.config import StreamConfig, build_method
from pipeline.experts.discriminator import AdversaryStep
from pipeline.placement.distributed import World
from pipeline.placement.learner import Learner, build_learner
from tests.distributed import worker
from tests.helpers import micro_batch, ragged

LENGTHS = [9, 4, 6]  # of the prompts of every rank's micro-batch
ANSWERS = [2, 1, 3]


def measure(world: World, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What this rank holds after one step, and what it handed to all-to-all during it."""
    config = StreamConfig.model_validate(case["stream"])
    method = build_method(config)
    learner = build_learner(config, method.plan, world, train=True)
    learner.set_active(method.plan.roles)
    learner.model.train()
    prompts = ragged(LENGTHS, 300, seed=world.rank)
    batch = micro_batch(prompts, ragged(ANSWERS, 300, seed=9), places=(0, 1, 2), world_size=world.size)
    if method.plan.num_discriminator_outputs:
        for ffn in learner.ffns:
            ffn.adversary = AdversaryStep(batch.pool, batch.row_weight, class_index=0, num_classes=2, scale=0.1)
    engine = learner.engine
    engine.set_gradient_accumulation_boundary(True)
    with recorded_payload() as payload:
        logits = engine(batch.input_ids, None, batch.positions, batch.position_ids)
        engine.backward(torch.nn.functional.cross_entropy(logits.float(), batch.targets))
    gradients = sum(bytes_of(part) for part in engine.optimizer.averaged_gradients.values())
    engine.step()
    note = {
        "tokens": batch.input_ids.numel(),
        "sequences": len(prompts),
        "payload": payload,
        "gradients": gradients,
        "optimizer": optimizer_bytes(learner),
        **weight_bytes(learner),
    }
    engine.destroy()
    return note


@contextmanager
def recorded_payload() -> Iterator[list[int]]:
    """Bytes of every tensor handed to an all-to-all inside the context, send side."""
    sent: list[int] = []
    stock = deepspeed.comm.all_to_all_single

    def record(output: torch.Tensor, tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return stock(output, tensor, *arguments, **named)

    deepspeed.comm.all_to_all_single = record
    try:
        yield sent
    finally:
        deepspeed.comm.all_to_all_single = stock


def weight_bytes(learner: Learner) -> dict[str, int]:
    """Storage behind the parameters between steps, each storage once: frozen, and trained."""
    trained = {id(parameter) for parameter in learner.parameters.values()}
    found: dict[str, list[torch.Tensor]] = {"frozen": [], "trained": []}
    for parameter in learner.model.parameters():
        parts = [parameter.data, *([parameter.ds_tensor.data] if hasattr(parameter, "ds_tensor") else [])]
        found["trained" if id(parameter) in trained else "frozen"] += parts
    return {name: storage_bytes(tensors) for name, tensors in found.items()}


def optimizer_bytes(learner: Learner) -> int:
    """Storage of master copies and moments that is no parameter's own."""
    zero = learner.engine.optimizer
    stage3 = learner.engine.zero_optimization_stage() == 3
    flats = zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups
    weights = [getattr(parameter, "ds_tensor", parameter).data for parameter in learner.parameters.values()]
    own = {tensor.untyped_storage().data_ptr() for tensor in weights}
    tensors = [flat.data for flat in flats if flat.untyped_storage().data_ptr() not in own]
    for flat in flats:
        tensors += [value for value in zero.optimizer.state[flat].values() if value.dim() > 0]  # not Adam's step
    return storage_bytes(tensors)


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all storages behind tensors."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


if __name__ == "__main__":
    sys.exit(worker.main({"measure": measure}))
