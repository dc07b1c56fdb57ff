"""moses: masked sub-experts of one pool, claims nobody overwrites, bits in the bank."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from data_contracts.errors import UserError
from pipeline.experts.attach import pairs_of
from pipeline.experts.claims import claim_tensors, masked_values, pack_bits, read_claim, unpack_bits
from pipeline.experts.lora import LoraOptions, initial_value
from pipeline.experts.pool import SubExperts, num_kept
from pipeline.experts.sub_experts import SparsePair, choose, keep_mask
from pipeline.methods import moses
from pipeline.methods.protocol import Increment, past_of
from pipeline.placement.state import Whole
from tests.helpers import light_learner, ragged, tiny_llama
from tests.moe_helpers import tiny_moe

VOCAB, RANK, K, TOP, DENSITY = 61, 2, 3, 2, 0.3
TARGETS = ("gate_proj", "up_proj", "down_proj", "q_proj")
LORA = LoraOptions(rank=RANK, alpha=RANK, dropout=0.0, targets=TARGETS)  # a scale of 1
OPTIONS = moses.Options(lora=LORA, sub_experts=K, top_k=TOP, density=DENSITY)
IDS = torch.tensor(ragged([9, 9, 9], VOCAB, seed=4))
MODELS = {
    "llama": lambda: tiny_llama(VOCAB, num_layers=2),
    "hunyuan_v1_moe": lambda: tiny_moe("hunyuan_v1_moe", VOCAB),
}
WIDTH = 5  # of prompt vectors


class Stream:
    """Tasks learned one after another on one learner without an engine, with what the bank would hold in `files`."""

    def __init__(self, model: str, options: moses.Options, monkeypatch) -> None:
        monkeypatch.setattr(moses, "own_value", lambda parameter: parameter.detach().float())
        self.method = moses.build(options)
        self.learner = light_learner(MODELS[model](), self.method.plan)
        self.files: dict[str, dict[str, torch.Tensor]] = {}
        self.bundles: dict[str, dict[str, str]] = {}
        self.states: dict[str, dict[str, torch.Tensor]] = {}
        self.accounts: list[dict[str, int]] = []

    @property
    def pairs(self) -> dict[str, SparsePair]:
        return pairs_of(self.learner.experts)["adapter"]

    def learn(self, task: str, prompts: torch.Tensor, steps: int = 3, rate: float = 1e-2) -> None:
        """A few steps towards random targets, with weight decay, from the start values of a job."""
        number = len(self.accounts) + 1
        order = tuple(self.bundles)
        states = {name: {"state": name} for name in order}
        increment = Increment(number, task, 0, self.bundles, states, order)
        study = SimpleNamespace(prompt_vectors=lambda: prompts)
        increment = increment.with_states({name: self.states[name] for name in self.method.states_needed(increment)})
        past = self.method.past(increment, study)
        self.method.learn_beside(self.learner, [(Whole(self.files[digest]), near) for digest, near in past])
        with torch.no_grad():
            for name, parameter in self.learner.parameters.items():
                parameter.copy_(initial_value(name, tuple(parameter.shape), f"0/{number}"))
        targets = torch.randint(VOCAB, IDS.shape, generator=torch.Generator().manual_seed(number))
        optimizer = torch.optim.AdamW(self.learner.parameters.values(), lr=rate, weight_decay=0.1)
        self.learner.model.train()
        for _ in range(steps):
            logits = self.learner.model.backbone(input_ids=IDS).logits
            nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        packed = self.method.pack(self.learner)
        self.files[f"{task}-{number}"] = packed.tensors
        digests = [past[place][0] for place in packed.reads]
        earlier = {f"past.{n}": digest for n, digest in enumerate(digests, start=1)}
        self.bundles.pop(task, None)
        self.bundles[task] = {"adapter": f"{task}-{number}"} | earlier
        self.states[task] = self.method.learned(study)
        self.accounts.append(packed.account)

    @torch.no_grad()
    def logits(self, task: str | None = None) -> torch.Tensor:
        """What a task is served with; without one, what the trained values give."""
        self.learner.model.eval()
        if task is not None:
            own, *past = (Whole(self.files[d]) for d in (self.bundles[task]["adapter"], *past_of(self.bundles[task])))
            self.method.unpack(self.learner, own, past)
        return self.learner.model.backbone(input_ids=IDS).logits.clone()


def prompts_like(*directions: float, seed: int = 0) -> torch.Tensor:
    """Prompt vectors around a point."""
    draw = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(seed))
    return 5 * torch.tensor([*directions, *[0.0] * (WIDTH - len(directions))]) + draw


ALIKE, OTHER = (1.0,), (0.0, 1.0)


# ---- the masked forward


def naive_factor(values, scores, match, side: int):
    """By loops: the masked values of the chosen sub-experts at their places, zero elsewhere, one weight by itself."""
    chosen = sorted(sorted(range(K), key=lambda j: -float(match[j]))[:TOP])
    total = sum(torch.exp(match[j]) for j in chosen)
    result = torch.zeros_like(values)
    rows = result if side == 0 else result.T  # a view: (K * RANK, in or out)
    source = values if side == 0 else values.T
    for j in chosen:
        places = [(r, c) for r in range(j * RANK, (j + 1) * RANK) for c in range(rows.shape[1])]
        order = sorted(range(len(places)), key=lambda n: -float(scores[j, n]))
        weight = 1.0 if side == 0 else TOP * torch.exp(match[j]) / total
        for n in order[: num_kept(len(places), DENSITY)]:
            rows[places[n]] = source[places[n]] * weight
    return result


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_masked_forward_is_that_of_a_model_with_the_masked_products_in_its_weights(name, monkeypatch):
    stream = Stream(name, OPTIONS, monkeypatch)
    draw = torch.Generator().manual_seed(1)
    for parameter in stream.learner.parameters.values():
        parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    merged = MODELS[name]()
    for path, pair in stream.pairs.items():
        tensors = [pair.lora_A, pair.lora_B, pair.score_A, pair.score_B, pair.match.squeeze(-1)]
        stacked = [t.reshape(-1, *t.shape[-2:]) for t in tensors[:4]] + [tensors[4].reshape(-1, K)]
        deltas = [
            naive_factor(b, sb, match, 1) @ naive_factor(a, sa, match, 0)
            for a, b, sa, sb, match in zip(*stacked, strict=True)
        ]
        parent, _, projection = path.rpartition(".")
        module = merged.get_submodule(parent)
        if hasattr(module, "gate_up_proj"):
            half = module.gate_up_proj.shape[1] // 2
            rows = {"gate_proj": slice(0, half), "up_proj": slice(half, None)}
            where = module.down_proj if projection == "down_proj" else module.gate_up_proj[:, rows[projection]]
            where += torch.stack(deltas)
        else:
            getattr(module, projection).weight += deltas[0]
    bare = MODELS[name]()(input_ids=IDS).logits
    expected, found = merged(input_ids=IDS).logits, stream.logits()
    assert (found - expected).abs().max() < 1e-3 * (expected - bare).abs().max()


def test_scores_learn_straight_through_and_claimed_parameters_get_no_gradient():
    pair = SparsePair((4, 3), 1, SubExperts(2, 1, 0.5), torch.float64, torch.device("cpu"))
    with torch.no_grad():
        pair.match.copy_(torch.tensor([[0.0], [1.0]]))  # the second sub-expert is chosen
        pair.lora_A.copy_(torch.tensor([[9.0, 9, 9], [1, 2, 3]]))
        pair.lora_B.copy_(torch.tensor([[9.0, 5], [9, 6], [9, 7], [9, 8]]))
        pair.score_A.copy_(torch.tensor([[0.0, 0, 0], [0.1, 0.3, 0.2]]))  # keeps 2 of 3: the last two
        pair.score_B.copy_(torch.tensor([[0.0] * 4, [0.4, 0.1, 0.3, 0.2]]))  # keeps 2 of 4: rows 0 and 2
    a, b = pair.factors()
    assert a.tolist() == [[0, 2, 3]] and b.tolist() == [[5], [0], [7], [0]]
    (a.sum() + 10 * b.sum()).backward()
    assert pair.lora_A.grad.tolist() == [[0, 0, 0], [0, 1, 1]]
    assert pair.lora_B.grad.tolist() == [[0, 10], [0, 0], [0, 10], [0, 0]]
    assert pair.score_A.grad.tolist() == [[0, 0, 0], [1, 2, 3]]
    assert pair.score_B.grad.tolist() == [[0] * 4, [50, 60, 70, 80]]

    owner = torch.full((2, 3), -1, dtype=torch.int16)
    owner[1, 1] = 0
    claimed = moses.Claims(owner, torch.full((2, 3), 20.0, dtype=torch.float64), torch.zeros(2, 3))
    none = moses.Claims(torch.full((2, 4), -1, dtype=torch.int16), torch.zeros(2, 4).double(), torch.zeros(2, 4))
    pair.claims = claimed, none
    for parameter in pair.parameters():
        parameter.grad = None
    a, _ = pair.factors()
    assert a.tolist() == [[0, 20, 3]]
    a.sum().backward()
    assert pair.lora_A.grad.tolist() == [[0, 0, 0], [0, 0, 1]]
    assert pair.score_A.grad.tolist() == [[0, 0, 0], [1, 20, 3]]
    claimed.head[1, 0] = 1.0  # a head start brings the first parameter into the mask
    assert pair.factors()[0].tolist() == [[1, 20, 0]]


def test_the_best_matches_are_chosen_with_weights_of_mean_one():
    chosen, weights = choose(torch.tensor([[0.0], [2.0], [-1.0], [1.0]]), 2)
    e = torch.tensor(1.0).exp()
    assert chosen.tolist() == [1, 3]
    assert weights.tolist() == pytest.approx([float(2 * e / (e + 1)), float(2 / (e + 1))])
    one, weight = choose(torch.tensor([[[0.0], [2.0]], [[3.0], [1.0]]]), 1)  # a choice for each routed expert
    assert one.tolist() == [[1], [0]] and weight.tolist() == [[1.0], [1.0]]
    match = torch.tensor([[0.0], [2.0], [1.0]], requires_grad=True)
    choose(match, 2)[1][0].backward()
    assert match.grad[0] == 0 and match.grad[1] > 0 > match.grad[2]


def test_a_mask_holds_the_share_rounded_up_and_at_least_one():
    assert [num_kept(size, 0.07) for size in (1, 10, 100, 101)] == [1, 1, 7, 8]
    assert num_kept(6, 1.0) == 6
    assert keep_mask(torch.tensor([[3.0, 1, 2], [0, 5, 4]]), 0.5).tolist() == [[1, 0, 1], [0, 1, 1]]


# ---- the bank's form


def test_bits_and_values_are_those_counted_by_hand():
    flags = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 0, 1, 1], [0] * 9 + [1]], dtype=torch.bool)
    assert pack_bits(flags).tolist() == [[1 + 8, 1 + 2], [0, 2]]
    assert unpack_bits(pack_bits(flags), 10).equal(flags)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    new = torch.tensor([[0, 1, 0, 1, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    tensors = claim_tensors("p", "A", mask, new, torch.arange(10.0).unsqueeze(0))
    assert tensors["p.A.mask"].tolist() == [[1 + 2 + 8, 2]]
    assert tensors["p.A.new"].tolist() == [[2 + 4]]  # of the four used ones, the second and third
    assert tensors["p.A.values"].tolist() == [1.0, 3.0]


def test_a_rank_reads_the_claims_of_its_own_routed_experts():
    shape, pool = (4, 5, 3), SubExperts(K, TOP, DENSITY)
    whole = SparsePair(shape, RANK, pool, torch.float32, torch.device("cpu"))
    part = SparsePair((2, 5, 3), RANK, pool, torch.float32, torch.device("cpu"))
    size, draw = RANK * 3, torch.Generator().manual_seed(0)
    mask = keep_mask(torch.rand(4, TOP, size, generator=draw), DENSITY)
    new = mask & (torch.rand(mask.shape, generator=draw) < 0.5)
    values = torch.randn(mask.shape, generator=draw)
    chosen = torch.tensor([[0, 1], [1, 2], [0, 2], [1, 2]], dtype=torch.uint8)
    source = Whole({"p.chosen": chosen} | claim_tensors("p", "A", mask, new, values))
    every = read_claim(source, "p", "A", whole, None)
    own = read_claim(source, "p", "A", part, (2, 4))
    assert own.mask.equal(every.mask[2:]) and own.new.equal(every.new[2:]) and own.claimed == every.claimed == new.sum()
    assert every.mask[3, 1].equal(mask[3, 0]) and not every.mask[3, 0].any()
    assert own.values.equal(values[2:][new[2:]])
    with pytest.raises(UserError, match="none of its files holds"):
        masked_values(every, [])


def test_stored_bytes_of_a_first_task_are_those_counted_by_hand(monkeypatch):
    stream = Stream("llama", OPTIONS, monkeypatch)
    stream.learn("first", prompts_like(*ALIKE), steps=1)
    sizes = {"gate_proj": (48, 92), "up_proj": (48, 92), "down_proj": (92, 48), "q_proj": (48, 48)}  # in, out
    count = capacity = masked = 0
    for ins, outs in sizes.values():
        count += TOP * (1 + 4)  # numbers and weights of the chosen
        for size in (RANK * ins, RANK * outs):
            kept = -(-3 * size // 10)
            count += TOP * (-(-size // 8) + -(-kept // 8) + 4 * kept)
            masked, capacity = masked + TOP * kept, capacity + K * size
    account = stream.accounts[0]
    assert account["stored_bytes"] == 2 * count  # layers
    assert (account["pool_parameters"], account["mask_parameters"]) == (2 * capacity, 2 * masked)
    assert (account["pool_claimed"], account["mask_reused"]) == (2 * masked, 0)


# ---- a stream of tasks


@pytest.mark.parametrize("name", MODELS)
def test_served_answers_are_those_of_the_trained_model_and_never_change(name, monkeypatch):
    stream = Stream(name, OPTIONS, monkeypatch)
    first = {}
    for number, direction in enumerate([ALIKE, OTHER, ALIKE], start=1):
        task = f"task{number}"
        stream.learn(task, prompts_like(*direction, seed=number))
        trained = stream.logits()
        first[task] = stream.logits(task)
        assert (first[task] - trained).abs().max() < 1e-4
        for earlier, logits in first.items():
            assert stream.logits(earlier).equal(logits), (task, earlier)
    stream.learn("task1", prompts_like(*ALIKE, seed=9))  # a new version of a known task
    for earlier in ("task2", "task3"):
        assert stream.logits(earlier).equal(first[earlier])
    distinct = [first[task] for task in first]
    assert all(not one.equal(other) for n, one in enumerate(distinct) for other in distinct[:n])


def test_a_bundle_is_served_where_no_parameter_is_at_hand(monkeypatch):
    stream = Stream("llama", OPTIONS, monkeypatch)
    stream.learn("one", prompts_like(*ALIKE), steps=1)
    expected = stream.logits("one")
    for parameter in stream.learner.parameters.values():
        parameter.data = torch.empty(0)  # as ZeRO-3 leaves it
    assert stream.logits("one").equal(expected)


def test_claimed_parameters_are_published_once_and_read_to_the_bit(monkeypatch):
    stream = Stream("llama", OPTIONS, monkeypatch)
    seen: dict[str, torch.Tensor] = {}
    for number in range(1, 5):
        task = f"task{number}"
        stream.learn(task, prompts_like(*ALIKE, seed=number))
        own, *past = (Whole(stream.files[d]) for d in (stream.bundles[task]["adapter"], *past_of(stream.bundles[task])))
        for path, pair in stream.pairs.items():
            claim, *earlier = (read_claim(file, path, "A", pair, None) for file in (own, *past))
            values = masked_values(claim, earlier)
            known = seen.setdefault(path, torch.full(claim.mask.shape, torch.nan))
            assert not (claim.new & ~known.isnan()).any()  # nobody claims what is claimed
            reused = claim.mask & ~claim.new
            assert values[reused].equal(known[reused])
            known[claim.new] = values[claim.new]
    claimed = sum(int((~known.isnan()).sum()) for known in seen.values())
    assert 0 < claimed < sum(known.numel() for known in seen.values())


def test_related_tasks_make_the_pool_grow_sublinearly_and_unrelated_ones_do_not_share(monkeypatch):
    alike = Stream("llama", OPTIONS, monkeypatch)
    for number in range(1, 9):
        alike.learn(f"task{number}", prompts_like(*ALIKE, seed=number), steps=2, rate=1e-3)
    new = [account["mask_parameters"] - account["mask_reused"] for account in alike.accounts]
    sizes = [account["stored_bytes"] for account in alike.accounts]
    claimed = [account["pool_claimed"] for account in alike.accounts]
    assert claimed == [sum(new[:n]) for n in range(1, 9)]
    assert max(new[1:]) < 0.6 * new[0] and max(sizes[1:]) < 0.75 * sizes[0]
    assert sum(sizes[4:]) < sum(sizes[:4]) and sum(new[4:]) < 0.5 * sum(new[:4])

    apart = Stream("llama", OPTIONS.model_copy(update={"top_k": 1}), monkeypatch)
    for number in range(K):  # as many directions as sub-experts
        vector = [0.0] * WIDTH
        vector[number] = 1.0
        apart.learn(f"task{number}", prompts_like(*vector), steps=2, rate=1e-3)
    assert [account["mask_reused"] for account in apart.accounts] == [0] * K
    assert all(not past_of(bundle) for bundle in apart.bundles.values())


def test_related_tasks_choose_the_same_sub_experts(monkeypatch):
    stream = Stream("llama", OPTIONS.model_copy(update={"sub_experts": 4}), monkeypatch)
    for task, direction in {"one": ALIKE, "two": OTHER, "three": ALIKE}.items():
        stream.learn(task, prompts_like(*direction), steps=1, rate=1e-3)
    one, two, three = stream.files.values()
    for path in stream.pairs:
        chosen = [file[f"{path}.chosen"].tolist() for file in (one, two, three)]
        assert chosen[0] == chosen[2] and sorted(chosen[0] + chosen[1]) == [0, 1, 2, 3]


def test_the_pool_may_grow_and_masks_change_their_density_but_it_may_not_shrink(monkeypatch):
    small = Stream("llama", OPTIONS, monkeypatch)
    small.learn("one", prompts_like(*ALIKE), steps=2)
    before = small.logits("one")

    def next_run(**changes) -> Stream:
        stream = Stream("llama", OPTIONS.model_copy(update=changes), monkeypatch)
        stream.files, stream.bundles, stream.states = dict(small.files), dict(small.bundles), dict(small.states)
        stream.accounts = list(small.accounts)
        return stream

    large = next_run(sub_experts=5, top_k=3, density=0.4)
    large.learn("two", prompts_like(*ALIKE), steps=2)
    assert large.logits("one").equal(before) and not large.logits("two").equal(before)
    assert large.accounts[1]["mask_reused"] > 0
    with pytest.raises(UserError, match="the pool may grow, not shrink"):
        next_run(sub_experts=1, top_k=1).learn("two", prompts_like(*ALIKE))


def test_more_choices_than_sub_experts_are_refused():
    with pytest.raises(ValueError, match="top_k is 5, but there are 4"):
        moses.Options(top_k=5)
