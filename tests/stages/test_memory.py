"""Freed memory is kept while an increment works and given back after it."""

import ctypes
import os

import pytest

from pipeline.placement.distributed import keep_freed_memory
from pipeline.stages.job import leaving_no_garbage

BLOCK, NUMBER = 60_000, 2_000


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_what_lies_free_between_what_is_in_use_goes_back_after_an_increment():
    keep_freed_memory()
    with leaving_no_garbage():
        blocks = [(b"x" * BLOCK, b"y" * 1_000) for _ in range(NUMBER)]
        kept = [small for _, small in blocks]  # holds on to the last page of every block
        del blocks
        held = resident()
    assert held - resident() > 0.8 * BLOCK * NUMBER
    assert len(kept) == NUMBER
