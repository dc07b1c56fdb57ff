"""Case `round_trips` of the multi-process worker: state out of and into one live engine, compared to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_optimizer_state
from safetensors.torch import save_file

from data_contracts.errors import UserError
from pipeline.backbones.load import load_tokenizer
from pipeline.config import StreamConfig, build_method
from pipeline.data.batching import global_batch, row_order
from pipeline.methods.protocol import Increment, Tensors
from pipeline.placement.distributed import World
from pipeline.placement.learner import Learner, build_learner
from pipeline.placement.state import (
    MOMENTS,
    Whole,
    full_shape,
    gather_values,
    gathered,
    restore_state,
    stream_state,
    whole_gradient,
    write_weights,
)
from pipeline.training.loop import run_global_batch
from pipeline.training.penalty import add_penalties
from pipeline.training.study import RowStudy
from tests.distributed.learning import open_tasks

FISHER_ROWS = 3


def round_trips(world: World, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Names of tensors that differ, by check (all lists should be empty), and how the engine holds its state."""
    config = StreamConfig.model_validate(case["stream"])
    method = build_method(config)
    tokenizer = load_tokenizer(config.backbone)
    rows = open_tasks(config, tokenizer, world)["first"].rows("train", None, config.seed)
    order = row_order(len(rows), 1, config.seed)

    def build() -> tuple[Learner, Callable[[int, int], None]]:
        learner = build_learner(config, method.plan, world, train=True)
        method.begin(Increment(1, "first", config.seed, {}, {}), learner.ffns, {})
        learner.set_active(method.plan.roles)
        learner.model.train()

        def steps(first: int, last: int) -> None:
            for step in range(first, last):
                chosen = global_batch(order, step, config.training.batch_size)
                run_global_batch(learner, method, config, rows, chosen, step, config.seed)
                learner.engine.step()

        return learner, steps

    learner, steps = build()
    parameters = learner.parameters
    dtype = getattr(torch, config.backbone.dtype)
    shapes = {name: full_shape(parameter) for name, parameter in parameters.items()}
    start, other = random_values(shapes, seed=1), random_values(shapes, seed=2)
    differing: dict[str, list[str]] = {}

    restore_state(learner.engine, parameters, Whole(start), {}, 0)
    differing["start values in the master copy"] = differences(gather_values(parameters), start)
    differing["start values in the working weights"] = differences(working(parameters), cast(start, dtype))

    steps(0, 2)
    early = dict(stream_state(parameters))
    differing["working weights after two steps"] = differences(working(parameters), cast(part(early, "value"), dtype))
    steps(2, 4)
    late = dict(stream_state(parameters))
    counts = adam_counts(learner)

    restore(learner, early, 2)
    differing["restored state"] = differences(dict(stream_state(parameters)), early)
    differing["restored working weights"] = differences(working(parameters), cast(part(early, "value"), dtype))
    differing["Adam's step after restoring"] = [str(n) for n in adam_counts(learner) if n != 2]
    fisher = RowStudy(learner, rows, 4096).squared_gradients(FISHER_ROWS)  # leaves nothing behind
    steps(2, 4)
    differing["trained again"] = differences(dict(stream_state(parameters)), late)

    drawn = stream_state(parameters)

    def full() -> None:
        next(drawn)
        raise UserError("the disk is full")

    try:
        refused = world.on_main(full, drawn)
    except UserError as error:
        refused = str(error)
    differing["state after a refused one"] = differences(dict(stream_state(parameters)), late)
    write_weights(parameters, Whole(other))
    differing["written working weights"] = differences(working(parameters), cast(other, dtype))
    differing["master copy after writing weights"] = differences(dict(stream_state(parameters)), late)
    held = how_held(learner, shapes)
    restore_state(learner.engine, parameters, Whole(start), {}, 0)
    penalised = penalise(learner, method, config, rows, order)
    learner.engine.destroy()
    if world.is_main:
        save_file(fisher, folder / "fisher.safetensors")

    learner, steps = build()
    restore(learner, early, 2)
    differing["restored into a new engine"] = differences(dict(stream_state(learner.parameters)), early)
    steps(2, 4)
    differing["trained on in a new engine"] = differences(dict(stream_state(learner.parameters)), late)
    differing["working weights in a new engine"] = differences(
        working(learner.parameters), cast(part(late, "value"), dtype)
    )
    learner.engine.destroy()
    return {
        "differing": differing,
        "refused": refused,
        "tensors": len(parameters),
        "unmoved": differences(part(late, "value"), part(early, "value"), equal=True),
        "adam_steps": counts,
        "held": held,
        "penalised": penalised,
    }


def penalise(learner: Learner, method, config: StreamConfig, rows, order) -> dict[str, Any]:
    """A first step with penalties <r, value> of random r: how far gradients and first moments are from what they must
    be, relative to the largest entry.
    """
    parameters = learner.parameters
    whole = random_values({name: full_shape(parameter) for name, parameter in parameters.items()}, seed=3)
    run_global_batch(learner, method, config, rows, global_batch(order, 0, config.training.batch_size), 0, config.seed)
    before = {name: whole_gradient(parameter).clone() for name, parameter in parameters.items()}
    values = gather_values(parameters)
    told = add_penalties(learner, {name: lambda value, r=r: (r * value).sum() for name, r in whole.items()})
    after = {name: whole_gradient(parameter).clone() for name, parameter in parameters.items()}
    learner.engine.step()
    norm = torch.stack([gradient.double().norm() for gradient in after.values()]).norm()
    factor = min(1.0, config.training.gradient_clipping / float(norm))
    moments = {name: safe_get_full_optimizer_state(p, "exp_avg") for name, p in parameters.items()}
    return {
        "added": max(off(after[name], before[name] + r) for name, r in whole.items()),
        "moment": max(off(moments[name], 0.1 * factor * gradient) for name, gradient in after.items()),
        "clipped": factor,
        "told": told["penalty"],
        "penalty": float(sum((r.double() * values[name].double()).sum() for name, r in whole.items())),
    }


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((found.cpu() - expected.cpu()).abs().max() / expected.abs().max())


def random_values(shapes: dict[str, torch.Size], seed: int) -> Tensors:
    """fp32 values, none of them zero or exact in bf16."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}


def cast(values: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: value.to(dtype) for name, value in values.items()}


def working(parameters) -> Tensors:
    """The whole weights that the forward pass uses."""
    values = {}
    for name, parameter in parameters.items():
        with gathered([parameter]):
            values[name] = parameter.data.detach().cpu().clone()
    return values


def differences(first: Tensors, second: Tensors, *, equal: bool = False) -> list[str]:
    """Names whose tensors differ in a bit (with `equal`: do not)."""
    assert first.keys() == second.keys()
    return [name for name in first if torch.equal(first[name], second[name]) == equal]


def part(state: Tensors, kind: str) -> Tensors:
    """The values, or one of the moments, by name."""
    return {name.removeprefix(f"{kind}/"): tensor for name, tensor in state.items() if name.startswith(f"{kind}/")}


def restore(learner: Learner, state: Tensors, steps: int) -> None:
    """Put what `stream_state` gave back into the engine."""
    moments = {moment: Whole(part(state, moment)) for moment in MOMENTS}
    restore_state(learner.engine, learner.parameters, Whole(part(state, "value")), moments, steps)


def adam_counts(learner: Learner) -> list[float]:
    """Adam's step counter of every flat partition."""
    return [float(state["step"]) for state in learner.engine.optimizer.optimizer.state.values()]


def how_held(learner: Learner, shapes: dict[str, torch.Size]) -> dict[str, Any]:
    """How this engine lays out its optimizer state: what `placement/state.py` relies on."""
    zero = learner.engine.optimizer
    held: dict[str, Any] = {
        "class": type(zero).__name__,
        "adam_class": f"{type(zero.optimizer).__module__}.{type(zero.optimizer).__name__}",
        "adam_keys": sorted({key for state in zero.optimizer.state.values() for key in state}),
        "dtypes": sorted({str(tensor.dtype) for tensor in zero.optimizer.state}),
        "sizes": {name: shape.numel() for name, shape in shapes.items()},
    }
    if learner.engine.zero_optimization_stage() == 3:
        held["flat"] = [tensor.numel() for tensor in zero.fp32_partitioned_groups_flat]
        held["keys_are_flat"] = {id(t) for t in zero.optimizer.state} == {
            id(t) for t in zero.fp32_partitioned_groups_flat
        }
        held["parts"] = {name: parameter.ds_tensor.ds_numel for name, parameter in learner.parameters.items()}
        held["sharded"] = [
            name for name, parameter in learner.parameters.items() if parameter.ds_status.name == "NOT_AVAILABLE"
        ]
        held["persistent"] = [name for name, parameter in learner.parameters.items() if parameter.ds_persist]
    else:
        held["flat"] = [tensor.numel() for tensor in zero.single_partition_of_fp32_groups]
        held["keys_are_flat"] = {id(t) for t in zero.optimizer.state} == {
            id(t) for t in zero.single_partition_of_fp32_groups
        }
    return held
