"""The set of hashes against Python's own, and what it holds a hash."""

import tracemalloc

import numpy as np
import pytest

from pipeline.data.seen import SeenHashes, folded, text_hashes


def random_hashes(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, (count, 2), dtype=np.uint64)


@pytest.mark.parametrize("num_first_halves", [1, 6, 10**9])
def test_a_set_answers_as_a_set_of_python_however_many_hashes_share_their_first_half(num_first_halves):
    draw = np.random.default_rng(num_first_halves)
    seen, expected = SeenHashes(), set()
    for size in draw.integers(0, 60, 200):
        hashes = np.stack([draw.integers(0, num_first_halves, size), draw.integers(0, 300, size)], axis=1)
        rows = list(map(tuple, hashes.tolist()))
        asked = [row in expected for row in rows]
        assert seen.contains(hashes.astype(np.uint64)).tolist() == asked
        again = []
        for row in rows:
            again.append(row in expected)
            expected.add(row)
        assert seen.add(hashes.astype(np.uint64)).tolist() == again
        assert len(seen) == len(expected)
    assert len(expected) > 250


def test_a_set_holds_16_bytes_a_hash_and_needs_at_most_31_while_it_grows():
    def peak(count: int) -> int:
        seen = SeenHashes()
        tracemalloc.start()
        for start in range(0, count, 1000):
            seen.add(random_hashes(start, 1000))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert seen.num_bytes == 16 * count
        return found

    assert (peak(96_000) - peak(32_000)) / 64_000 <= 31


def test_the_hash_of_a_text_is_its_blake2b():
    # printf 'a' | b2sum --length=128; printf '' | b2sum --length=128; printf '\xc3\xa9' | b2sum --length=128
    expected = ["27c35e6e9373877f29e562464e46497e", "cae66941d9efbd404e4d88758ea67670"]
    found = text_hashes(["a", "", "é", "a"])
    assert found.shape == (4, 2) and found.dtype == np.uint64
    assert [row.tobytes().hex() for row in found[:2]] == expected
    assert found[3].tolist() == found[0].tolist() != found[2].tolist()
    assert text_hashes([]).shape == (0, 2)


@pytest.mark.parametrize(
    ("text", "same"), [("In  Test", "in test"), (" a\t\u00a0b\n", "A b"), ("STRASSE", "straße"), ("\x1cx", "X")]
)
def test_case_and_white_space_do_not_make_another_text(text, same):
    assert folded(text) == folded(same)
    assert folded(text) != folded(same + "!")
