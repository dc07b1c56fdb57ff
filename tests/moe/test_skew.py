"""All tokens at one routed expert, single tokens, ranks with nothing of their own: what the skewed cases really hold.

That they equal the naive single process is shown in test_equality.py, where they are cases like the others.
"""

import pytest

from pipeline.data.batching import rank_shares
from tests.distributed.test_equality import change
from tests.moe.oracle import NaiveBlock
from tests.moe.worlds import FORCED, FRESH, PROTOTYPE, SKEW, SKEW_BATCH, SKEWED

pytestmark = pytest.mark.timeout(900)
CASES = {2: ("pair", "skew-ep2-zero3"), 4: ("four", "skew-ep4-zero3")}


@pytest.mark.parametrize("number", (FRESH, PROTOTYPE))
def test_every_token_goes_to_one_routed_expert(naive, number):
    oracle = naive.oracle("skew", naive.reference("skew").tensors(number, "final"))
    rows = naive.rows("skew", number)
    oracle.logits(*rows.tokens(range(len(rows))))
    (block,) = (layer for layer in oracle.layers if isinstance(layer, NaiveBlock))
    assert block.route[1].shape[1] == 1 and (block.route[1] == FORCED).all()
    assert oracle.margin > 10


def test_a_rank_has_one_token_and_a_rank_has_none(naive):
    """On 4 ranks: a batch in which a rank's share is one token, and one of a single row for all ranks."""
    rows = naive.rows("skew", FRESH)
    shares = []
    for prompts, answers in naive.batches("skew", FRESH):
        read = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        shares.append([sum(read[place] for place in share) for share in rank_shares(read, 4)])
    assert shares[0].count(1) == 1 and shares[1].count(1) == 3 and min(shares[0] + shares[1]) == 1
    assert shares[-1].count(0) == 3
    assert len(rows) == len(SKEWED) == 4 * SKEW_BATCH + 1


@pytest.mark.parametrize("size", CASES)
def test_ranks_without_a_token_run_as_many_passes(moe_worlds, size):
    case = moe_worlds.case(*CASES[size])
    assert len(case.notes) == size
    for number in (FRESH, PROTOTYPE):
        for rank in range(size):
            assert case.increment(number, rank)["passes"] == [SKEW_BATCH // size] * 4 + [1]


@pytest.mark.parametrize("size", CASES)
@pytest.mark.parametrize("number", (FRESH, PROTOTYPE))
def test_only_the_lora_experts_of_that_routed_expert_learn(moe_worlds, size, number):
    case = moe_worlds.case(*CASES[size])
    final = case.tensors(number, "final")
    moved = change(case, number)
    routed = [name for name in final if ".experts." in name and name.endswith("lora_B")]
    assert len(routed) == 6
    for name in routed:
        idle = [e for e in range(SKEW["num_experts"]) if e != FORCED]
        assert moved[name][FORCED].norm() > 1e-3
        assert not final[name][idle].any()
