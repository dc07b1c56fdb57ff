"""The micro-batches of a rank, and the next one made ready while the caller works on this one."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from pipeline.config import TrainingConfig
from pipeline.data.batching import MicroRows, micro_batches
from pipeline.data.collate import MicroBatch, collate
from pipeline.data.tokens import RowView
from pipeline.placement.distributed import World

T = TypeVar("T")
_END = object()


def passes_of(world: World, settings: TrainingConfig, rows: RowView, chosen: np.ndarray) -> list[MicroRows]:
    """This rank's forward passes over the global batch of rows `chosen`."""
    lengths = rows.lengths[chosen].tolist()
    return micro_batches(lengths, world.rank, world.size, settings.micro_batch_size, settings.micro_batch_tokens)


def read_batches(
    world: World, settings: TrainingConfig, rows: RowView, chosen: np.ndarray, step: int
) -> Iterator[MicroBatch]:
    """The micro-batches of `passes_of`, read and collated, in host memory."""
    for part in passes_of(world, settings, rows, chosen):
        prompts, answers = rows.tokens(chosen[list(part.places)])
        yield collate(
            prompts,
            answers,
            rows.end_of_answer,
            places=part.places,
            weight=part.weight,
            step=step,
            global_rows=len(chosen),
            world_size=world.size,
            device=torch.device("cpu"),
        )


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items in the same order; a thread makes the next one while the caller has the last.

    An exception of `items` is raised where its item is asked for. Items are never made at the same time as each other,
    and at most one is made that nobody takes. Closing the iterator, or dropping it, ends the thread.
    """
    source = iter(items)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="one-ahead") as pool:
        ready = pool.submit(next, source, _END)
        while (item := ready.result()) is not _END:
            ready = pool.submit(next, source, _END)
            yield item
