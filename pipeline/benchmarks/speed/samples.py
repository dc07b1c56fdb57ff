"""Interleaved timing, and what is said about the samples. Pure but for the clock.

Contenders take turns (A B C A B C ...), so that whatever else the machine does meets all of them alike; a ratio is
taken within each round, between neighbours in time.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Samples = dict[str, list[float]]  # contender -> seconds of each counted round


def interleave(contenders: Mapping[str, Callable[[int], Any]], repeats: int, warmup: int) -> Samples:
    """Run every contender once a round, `warmup` rounds uncounted and then `repeats` counted ones; wall seconds.

    A contender is called with the number of the round, from 0, warm-up included: the same work for all of them.
    """
    seconds: Samples = {name: [] for name in contenders}
    for number in range(warmup + repeats):
        for name, work in contenders.items():
            begin = time.perf_counter()
            work(number)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles (linear between samples) and all samples."""
    if len(values) == 1:
        low = high = values[0]
    else:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "quartiles": [low, high], "samples": list(values)}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """Round by round above / below: how many times as long `above` takes."""
    return summary([first / second for first, second in zip(above, below, strict=True)])


def compare(seconds: Samples, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The part of a report that all cases share: seconds by contender, and the ratio of each pair as 'a / b'."""
    return {
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "ratios": {f"{a} / {b}": ratio(seconds[a], seconds[b]) for a, b in pairs},
    }


def rates(amounts: Sequence[float], seconds: Sequence[float]) -> dict[str, Any]:
    """Amount a second in each round."""
    return summary([amount / second for amount, second in zip(amounts, seconds, strict=True)])
