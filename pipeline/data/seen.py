"""Exact sets of texts in 16 bytes a text: what duplicates and leaks are found with.

A text stands for itself by 128 bits of BLAKE2b. Two different texts of a million million would share them with a
probability below 1e-14, and nobody knows how to make two that do: the answer is exact for all that can be met.
"""

from hashlib import blake2b

import numpy as np

# Two runs become one when the older is at most this many times longer: few runs to look in, few copies of an entry.
_MERGE_RATIO = 2


def text_hashes(texts: list[str]) -> np.ndarray:
    """(texts, 2) uint64: the hash of each text as it is."""
    digests = b"".join([blake2b(text.encode("utf-8"), digest_size=16).digest() for text in texts])
    return np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)


def folded(text: str) -> str:
    """A text with case folded and white space collapsed: equal where duplicates and leaks take texts for the same."""
    return " ".join(text.split()).casefold()


class SeenHashes:
    """A set of hashes: runs of rising length, each two arrays sorted by the first half of the hash."""

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return sum(len(high) for high, _ in self._runs)

    @property
    def num_bytes(self) -> int:
        """Bytes held. While two runs become one, up to 13 more for each of their hashes."""
        return sum(high.nbytes + low.nbytes for high, low in self._runs)

    def contains(self, hashes: np.ndarray) -> np.ndarray:
        """(n,) True where a hash of (n, 2) is in the set."""
        found = np.zeros(len(hashes), dtype=bool)
        order = np.argsort(hashes[:, 0])  # neighbours in the question are neighbours in memory
        asked_high, asked_low = hashes[order, 0], hashes[order, 1]
        for high, low in self._runs:
            found[order] |= _in_run(high, low, asked_high, asked_low)
        return found

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Put hashes (n, 2) into the set; (n,) True where one was there already or stands earlier in `hashes`."""
        known = self.contains(hashes)
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: of equal hashes the first row comes first
        ordered = hashes[order]
        known[order[1:][(ordered[1:] == ordered[:-1]).all(axis=1)]] = True
        fresh = ordered[~known[order]]
        if len(fresh):
            self._append(np.ascontiguousarray(fresh[:, 0]), np.ascontiguousarray(fresh[:, 1]))
        return known

    def _append(self, high: np.ndarray, low: np.ndarray) -> None:
        while self._runs and len(self._runs[-1][0]) <= _MERGE_RATIO * len(high):
            older_high, older_low = self._runs.pop()
            places = np.searchsorted(older_high, high)
            places += np.arange(len(high))
            older = np.ones(len(older_high) + len(high), dtype=bool)
            older[places] = False
            high = _interleaved(older_high, high, places, older)
            del older_high  # half of what was held goes before the other half is copied
            low = _interleaved(older_low, low, places, older)
            del older_low
        self._runs.append((high, low))


def _interleaved(older: np.ndarray, newer: np.ndarray, places: np.ndarray, is_older: np.ndarray) -> np.ndarray:
    merged = np.empty(len(is_older), dtype=np.uint64)
    merged[places] = newer
    merged[is_older] = older
    return merged


def _in_run(high: np.ndarray, low: np.ndarray, asked_high: np.ndarray, asked_low: np.ndarray) -> np.ndarray:
    places = np.searchsorted(high, asked_high)
    found = np.zeros(len(places), dtype=bool)
    open_ = np.arange(len(places))  # questions whose first half still matches the entry at their place
    while len(open_):
        at = places[open_]
        open_, at = open_[at < len(high)], at[at < len(high)]
        same = high[at] == asked_high[open_]
        open_, at = open_[same], at[same]
        hit = low[at] == asked_low[open_]
        found[open_[hit]] = True
        open_ = open_[~hit]
        places[open_] += 1
    return found
