"""Pooled states of raw texts from the frozen first layers of the backbone: what the task router reads.

Legend: B rows, S tokens, D model width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from data_contracts.errors import UserError
from pipeline.backbones.families import family_of
from pipeline.config import RouterConfig
from pipeline.data.collate import pad_right
from pipeline.data.tokens import prompt_tokens
from pipeline.evaluation.task_router import TaskRouter
from pipeline.placement.learner import Learner
from pipeline.placement.rounds import each_batch, run_batches

_TINY = 1e-6  # keeps a state of zeros from dividing by zero


def check_router(router: RouterConfig | None, backbone: PreTrainedConfig) -> None:
    """Raise UserError where the router asks for more layers than the backbone has."""
    if router is not None and (router.layers or 1) > backbone.num_hidden_layers:
        raise UserError(
            f"router.layers is {router.layers}, but the backbone has {backbone.num_hidden_layers} layers; lower it"
        )


def with_layers(router: RouterConfig, backbone: PreTrainedConfig, before: TaskRouter | None = None) -> RouterConfig:
    """The configuration with its number of layers: where it leaves that open, `before`'s, or half of the backbone's."""
    if router.layers is not None:
        return router
    layers = before.config.layers if before is not None else max(1, backbone.num_hidden_layers // 2)
    return router.model_copy(update={"layers": layers})


def text_tokens(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """The first tokens of raw texts, no prompt around them; a text without any is its end."""
    return [ids[:max_tokens] or [tokenizer.eos_token_id] for ids in prompt_tokens(tokenizer, list(texts))]


def sum_features(
    learner: Learner, router: TaskRouter, tokens: Sequence[Sequence[int]], batch_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of phi phi^T (F, F) and of phi (F,) over texts, fp64: each rank its rows, then summed over ranks. Collective.

    The caller has emptied the slots, so that nothing adapted speaks.
    """
    normal, moment = torch.zeros_like(router.normal), torch.zeros(len(router.normal), dtype=torch.double)

    def keep(_: list[int], pooled: list[torch.Tensor]) -> None:
        features = router.features(pooled[0])
        normal.addmm_(features.T, features)
        moment.add_(features.sum(dim=0))

    with _first_layers(learner, [router.config.layers]) as pool:
        each_batch(learner.world, list(map(len, tokens)), batch_tokens, lambda rows: pool(tokens, rows), keep)
    return learner.world.sum_tensor(normal), learner.world.sum_tensor(moment)


def score_texts(
    learner: Learner, router: TaskRouter, tokens: Sequence[Sequence[int]], batch_tokens: int
) -> torch.Tensor:
    """The router's score of every task for every text: (rows, T) fp64, the same on every rank. Collective.

    The caller has emptied the slots.
    """
    result = torch.zeros(len(tokens), len(router.tasks), dtype=torch.double)
    with _first_layers(learner, [router.config.layers]) as pool:
        parts = run_batches(
            learner.world, list(map(len, tokens)), batch_tokens, lambda rows: router.scores(pool(tokens, rows)[0])
        )
    for rows, scores in parts:
        result[rows] = scores
    return result


def pooled_texts(
    learner: Learner, depths: Sequence[int], tokens: Sequence[Sequence[int]], batch_tokens: int
) -> list[torch.Tensor]:
    """Pooled states of texts after each of some numbers of layers: (rows, D) fp32, the same on every rank. Collective;
    the caller has emptied the slots.
    """
    with _first_layers(learner, depths) as pool:
        parts = run_batches(learner.world, list(map(len, tokens)), batch_tokens, lambda rows: pool(tokens, rows))
    places = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    return [torch.cat([pooled[index] for _, pooled in parts])[places] for index in range(len(depths))]


Pool = Callable[[Sequence[Sequence[int]], list[int]], list[torch.Tensor]]


@contextmanager
def _first_layers(learner: Learner, depths: Sequence[int]) -> Iterator[Pool]:
    """Inside, the model ends after the deepest of `depths`; yields the function from rows of tokens to their pooled
    states (B, D) after each of these numbers of layers.
    """
    backbone = learner.model.backbone
    config = backbone.get_decoder().config  # every known family runs as many layers as its configuration says
    layers = backbone.get_submodule(family_of(backbone.config).layers)
    states: dict[int, torch.Tensor] = {}

    def record(depth: int):
        return layers[depth - 1].register_forward_hook(lambda module, args, output: states.update({depth: output}))

    hooks = [record(depth) for depth in depths]
    whole, config.num_hidden_layers = config.num_hidden_layers, max(depths)
    learner.model.eval()

    @torch.no_grad()
    def pool(tokens: Sequence[Sequence[int]], rows: list[int]) -> list[torch.Tensor]:
        ids, mask = pad_right([tokens[row] for row in rows])
        device = learner.world.device
        learner.forward(ids.to(device), mask.to(device), torch.zeros(1, dtype=torch.long, device=device))
        return [pool_tokens(states.pop(depth), mask.to(device)).cpu() for depth in depths]

    try:
        yield pool
    finally:
        config.num_hidden_layers = whole
        for hook in hooks:
            hook.remove()


def pool_tokens(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Token states (B, S, D) -> (B, D) fp32 of unit root mean square: the mean over real tokens, each first brought to
    unit root mean square (a decoder's first token is often a hundred times longer than the others).
    """
    real = mask[..., None].float()
    return _unit((_unit(states.float()) * real).sum(dim=1) / real.sum(dim=1))


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + _TINY)
