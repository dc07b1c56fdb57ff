"""The rivals' arithmetic against formulas written out by hand, and what each starts from, keeps and moves."""

import numpy as np
import pytest
import torch

from pipeline.config import TrainingConfig, method_module
from pipeline.data.mixing import plain_batches, rehearsal_batches
from pipeline.experts.prompt_state import nearness, prompt_state
from pipeline.methods import ewc, olora
from pipeline.methods.protocol import Increment, past_of
from pipeline.placement.state import Whole
from pipeline.training.study import RowStudy, answer_loss, spread
from tests.helpers import largest_difference, light_learner, ragged, randomise, tiny_llama

VOCAB = 61
BUNDLES = {"a": {"adapter": "x1"}, "b": {"adapter": "x2"}}
STATES = {"a": {"state": "s1"}, "b": {"state": "s2"}}
LORA = {"rank": 2, "alpha": 6.0, "dropout": 0.3}
TRAINING = TrainingConfig(epochs=2, batch_size=8)


def built(name: str, **options):
    module = method_module(name)
    return module.build(module.Options.model_validate({"lora": LORA} | options))


def increment(task: str = "c", **changes) -> Increment:
    fields = {"number": 3, "seed": 17, "bundles": BUNDLES, "states": STATES, "order": ("a", "b")}
    return Increment(task=task, **(fields | changes))


FIRST = {"number": 1, "bundles": {}, "states": {}, "order": ()}


class Study:
    """Given measurements."""

    def __init__(self, **given):
        self.given = given

    def prompt_vectors(self):
        return self.given["prompts"]

    def squared_gradients(self, max_rows: int):
        self.asked = max_rows
        return self.given["fisher"]


# ---------------------------------------------------------------- replay and multitask


def test_replay_goes_on_from_the_latest_expert_and_every_task_moves_to_it():
    method = built("replay")
    assert method.start(increment()) == {"adapter": "x2"} and method.retention.policy == "follow"
    assert method.moved({"adapter": "x1"}, {"adapter": "x3"}) == {"adapter": "x3"}


def test_replay_mixes_the_share_of_all_earlier_tasks_into_the_new_tasks_batches():
    method = built("replay", share=0.25)
    assert method.rehearses(increment()) == ("a", "b") and method.rehearses(increment("a")) == ("b",)
    assert method.rehearses(increment(**FIRST)) == () and method.learns_earlier_answers
    found = method.batches(increment(), [40, 10, 30], TRAINING)
    expected = rehearsal_batches([40, 10, 30], 2, 8, 0.25, 17, 3)
    assert len(found) == 10 and all(map(np.array_equal, found, expected))
    assert [len(batch) for batch in found] == [10] * 10


def test_multitask_learns_a_fresh_expert_from_the_union_and_every_task_moves_to_it():
    method = built("multitask")
    assert method.start(increment()) == method.start(increment("a")) == {"adapter": None}
    assert method.rehearses(increment()) == ("a", "b")
    found = method.batches(increment(), [40, 10, 30], TRAINING)
    assert all(map(np.array_equal, found, plain_batches(80, 2, 8, 17)))
    assert sorted(np.concatenate(found)) == sorted([*range(80)] * 2)
    assert method.retention.policy == "follow" and method.moved({"adapter": "x1"}, {"adapter": "x3"}) == {
        "adapter": "x3"
    }


@pytest.mark.parametrize("name", ["sequential", "per_task", "ewc", "olora", "mocl"])
def test_methods_without_old_data_ask_for_none(name):
    method = built(name)
    assert method.rehearses(increment()) == ()
    assert all(map(np.array_equal, method.batches(increment(), [40], TRAINING), plain_batches(40, 2, 8, 17)))


# ---------------------------------------------------------------- ewc


def test_the_elastic_penalty_and_its_gradient_are_those_of_the_formula():
    torch.manual_seed(0)
    value, fisher, solution = torch.randn(3, 5).double(), torch.rand(3, 5).double(), torch.randn(3, 5).double()
    value.requires_grad_()
    loss = ewc.quadratic(7.0, fisher, solution)(value)
    by_hand = sum(
        7.0 / 2 * float(fisher[i, j]) * (float(value.detach()[i, j]) - float(solution[i, j])) ** 2
        for i in range(3)
        for j in range(5)
    )
    assert float(loss.detach()) == pytest.approx(by_hand, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, value)
    assert (gradient - 7.0 * fisher * (value.detach() - solution)).abs().max() < 1e-12


def test_ewc_penalises_every_tensor_around_the_values_it_starts_from():
    method = built("ewc", weight=3.0)
    learner = light_learner(tiny_llama(VOCAB, num_layers=1), method.plan)
    method.begin(increment(**FIRST), learner.ffns, {})
    assert method.penalties(learner, Whole({})) == {}  # nothing to hold on to yet
    torch.manual_seed(1)
    start, fisher = ({n: torch.rand(p.shape) for n, p in learner.parameters.items()} for _ in range(2))
    assert method.states_needed(increment()) == ("b",) and method.start(increment()) == {"adapter": "x2"}
    method.begin(increment().with_states({"b": fisher}), learner.ffns, {})
    penalties = method.penalties(learner, Whole(start))
    assert penalties.keys() == learner.parameters.keys()
    for name, penalty in penalties.items():
        assert float(penalty(start[name])) == 0
        assert float(penalty(start[name] + 2)) == pytest.approx(3.0 / 2 * 4 * float(fisher[name].sum()), rel=1e-5)


def test_the_fisher_information_of_all_tasks_adds_up_and_may_fade():
    old, new = {"adapter/w": torch.tensor([4.0, 0.0])}, {"adapter/w": torch.tensor([1.0, 3.0])}
    for decay, expected in ((1.0, [5.0, 3.0]), (0.25, [2.0, 3.0])):
        method, study = built("ewc", decay=decay, fisher_rows=9), Study(fisher=new)
        method.begin(increment(**FIRST), [], {})
        assert method.learned(study)["adapter/w"].tolist() == [1.0, 3.0] and study.asked == 9
        method.begin(increment().with_states({"b": old}), [], {})
        assert method.learned(study)["adapter/w"].tolist() == expected


class Rows:
    """Rows made by hand, as a `RowView` gives them."""

    def __init__(self, prompts, answers) -> None:
        self.prompts, self.answers, self.end_of_answer = prompts, answers, 0
        self.answer_lengths = np.array([len(answer) + 1 for answer in answers])
        self.lengths = self.answer_lengths + [len(prompt) for prompt in prompts]

    def __len__(self) -> int:
        return len(self.prompts)

    def tokens(self, rows):
        return [self.prompts[row] for row in rows], [self.answers[row] for row in rows]


ROWS = Rows(ragged([7, 3, 12, 1, 6], VOCAB, seed=1), ragged([1, 2, 3, 1, 2], VOCAB, seed=2))


class Engine:
    """What `RowStudy` asks of DeepSpeed's engine, without partitions."""

    def __init__(self, learner) -> None:
        self.learner, self.optimizer = learner, self

    def __call__(self, *arguments):
        return self.learner.model(*arguments)

    def set_gradient_accumulation_boundary(self, boundary: bool) -> None:
        assert boundary

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def zero_grad(self) -> None:
        self.learner.model.zero_grad(set_to_none=True)

    def zero_optimization_stage(self) -> int:
        return 3


@pytest.fixture
def learner():
    made = light_learner(tiny_llama(VOCAB, num_layers=2).double(), built("ewc").plan)
    randomise(made, scale=0.3)
    active = {id(parameter) for parameter in made.parameters.values()}
    for parameter in made.model.parameters():
        parameter.requires_grad_(id(parameter) in active)
    return made


def log_likelihood(learner, row: int) -> torch.Tensor:
    """log p(answer and its end | prompt) of a row, token by token."""
    prompt, answer = ROWS.prompts[row], [*ROWS.answers[row], 0]
    learner.model.eval()
    logits = learner.model.backbone(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
    return sum(torch.log_softmax(logits[len(prompt) - 1 + place], dim=0)[token] for place, token in enumerate(answer))


def test_the_fisher_information_is_the_mean_of_single_rows_squared_gradients(learner):
    expected = {name: torch.zeros_like(p) for name, p in learner.parameters.items()}
    for row in range(len(ROWS)):
        gradients = torch.autograd.grad(log_likelihood(learner, row), list(learner.parameters.values()))
        for name, gradient in zip(expected, gradients, strict=True):
            expected[name] += gradient.square() / len(ROWS)
    learner.engine = Engine(learner)
    found = RowStudy(learner, ROWS, 4096).squared_gradients(64)  # dropout is .3 in training, and off here
    scale = max(float(value.max()) for value in expected.values())
    assert largest_difference({n: v.double() for n, v in found.items()}, expected) < 1e-5 * scale
    assert all(ffn.dropout.p == 0.3 for ffn in learner.ffns)
    assert all(parameter.grad is None for parameter in learner.parameters.values())
    some = RowStudy(learner, ROWS, 4096).squared_gradients(2)  # rows 0 and 3
    two = [torch.autograd.grad(log_likelihood(learner, r), list(learner.parameters.values())) for r in spread(5, 2)]
    for (name, value), first, second in zip(some.items(), *two, strict=True):
        assert (value - (first.square() + second.square()) / 2).abs().max() < 1e-5 * scale, name


def test_the_loss_of_a_start_is_the_mean_over_answer_tokens(learner):
    expected = -sum(float(log_likelihood(learner, row).detach()) for row in range(len(ROWS)))
    assert answer_loss(learner, ROWS, 16) == pytest.approx(expected / ROWS.answer_lengths.sum(), rel=1e-5)


# ---------------------------------------------------------------- olora


@pytest.mark.parametrize("experts", [(), (3,)], ids=["dense", "routed"])
def test_the_orthogonality_penalty_is_the_sum_of_squared_inner_products_with_its_gradient(experts):
    torch.manual_seed(2)
    earlier, value = torch.randn(*experts, 4, 7).double(), torch.randn(*experts, 2, 7).double().requires_grad_()
    loss = olora.orthogonality(0.7, earlier)(value)
    by_hand, gradient = 0.0, torch.zeros_like(value)
    olds, news, grads = (t.detach().reshape(-1, *t.shape[-2:]) for t in (earlier, value, gradient))
    for old, new, grad in zip(olds, news, grads, strict=True):
        for k in range(2):
            for j in range(4):
                inner = float((old[j] * new[k]).sum())
                by_hand += 0.7 * inner**2
                grad[k] += 2 * 0.7 * inner * old[j]
    assert float(loss.detach()) == pytest.approx(by_hand, rel=1e-12)
    assert (torch.autograd.grad(loss, value)[0] - gradient).abs().max() < 1e-12
    assert float(olora.orthogonality(0.7, torch.eye(7)[:2])(torch.eye(7)[2:4])) == 0


def test_olora_sums_every_expert_there_was_and_every_task_is_served_with_the_sum():
    method = built("olora")
    assert method.past(increment(**FIRST), Study()) == []
    assert method.start(increment()) == method.start(increment("a")) == {"adapter": None}
    assert method.past(increment(number=2, order=("a",)), Study()) == [("x1", 1.0)]
    latest = {"adapter": "x9", "past.2": "x2", "past.10": "x10", "past.1": "x1"}
    where = increment("d", bundles={"a": latest, "c": latest}, order=("a", "c"))
    assert [digest for digest, _ in method.past(where, Study())] == ["x1", "x2", "x10", "x9"]  # by number
    assert method.retention.policy == "follow" and method.moved({"adapter": "x1"}, latest) == latest


def test_olora_penalises_the_new_a_of_every_projection_against_all_earlier_ones():
    method = built("olora", weight=2.0)
    learner = light_learner(tiny_llama(VOCAB, num_layers=2), method.plan)
    assert method.penalties(learner, Whole({})) == {}
    earlier = [some_expert(learner, seed) for seed in (1, 2)]
    learner.set_past("adapter", [(Whole(values), 1.0) for values in earlier])
    penalties = method.penalties(learner, Whole({}))
    assert set(penalties) == {name for name in learner.parameters if name.endswith("lora_A")}
    for name, penalty in penalties.items():
        value = torch.randn(learner.parameters[name].shape)
        expected = 2.0 * sum(
            float((values[name.removeprefix("adapter/")] @ value.T).square().sum()) for values in earlier
        )
        assert float(penalty(value)) == pytest.approx(expected, rel=1e-5)


def some_expert(learner, seed: int) -> dict[str, torch.Tensor]:
    """Values for one expert by public name."""
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=draw) for name, p in learner.components["adapter"].items()}


# ---------------------------------------------------------------- mocl


def test_nearness_is_one_over_one_plus_the_mean_squared_distance_in_standard_deviations():
    one = prompt_state(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
    assert one["prompt_mean"].tolist() == [1.0, 3.0] and one["prompt_variance"].tolist() == [1.0, 4.0]
    other = prompt_state(torch.tensor([[2.0, 3.0], [4.0, 3.0]]))  # means 3 and 3, variances 1 and 0
    # (2^2 / 1 + 0) / 2 = 2
    assert nearness(one, other) == nearness(other, one) == pytest.approx(1 / 3)
    assert nearness(one, one) == 1.0
    single = prompt_state(torch.tensor([[1.0, 1.0]]))  # one prompt has no spread
    assert nearness(single, single) == 1.0 and nearness(single, prompt_state(torch.tensor([[1.0, 2.0]]))) < 1e-6


def test_prompts_of_one_kind_are_near_and_of_another_far_whatever_they_share():
    draw = torch.Generator().manual_seed(0)

    def prompts(shift: float) -> torch.Tensor:
        return 20 + torch.tensor([shift, 0, 0, 0]) + torch.randn(100, 4, generator=draw)

    same, other = prompts(0), prompts(6)
    states = [prompt_state(vectors) for vectors in (prompts(0), same, other)]
    assert nearness(states[0], states[1]) > 0.9 > 0.2 > nearness(states[0], states[2])


def test_mocl_weighs_earlier_experts_by_the_nearness_of_their_tasks_prompts():
    prompts = torch.tensor([[0.0, 1.0], [2.0, 5.0]])  # means 1 and 3, variances 1 and 4
    variance = torch.tensor([1.0, 4.0])
    means = {"a": [1.0, 3.0], "b": [2.0, 3.0], "c": [1.0, 9.0]}  # squared distances 0, 1 / 2, 9 / 2
    bundles = {task: {"adapter": f"x-{task}"} for task in means}
    states = {t: {"prompt_mean": torch.tensor(mean), "prompt_variance": variance} for t, mean in means.items()}
    where = increment("e", bundles=bundles, states={t: {"state": t} for t in means}, order=tuple(means))
    method, study = built("mocl"), Study(prompts=prompts)
    assert method.states_needed(where) == tuple(means)
    past = method.past(where.with_states(states), study)
    assert [digest for digest, _ in past] == ["x-a", "x-b", "x-c"]
    assert [weight for _, weight in past] == pytest.approx([1.0, 2 / 3, 2 / 11])
    assert method.learned(study)["prompt_mean"].tolist() == [1.0, 3.0]
    assert method.past(increment(**FIRST), study) == [] and method.start(where) == {"adapter": None}
    assert method.retention.policy == "pin" and method.moved({"adapter": "x1"}, {"adapter": "x3"}) is None


def test_a_prompts_vector_is_its_mean_embedding_less_that_of_the_table(learner):
    found = RowStudy(learner, ROWS, 4096).prompt_vectors()
    table = learner.model.backbone.get_input_embeddings().weight.detach()
    for row, prompt in enumerate(ROWS.prompts):
        expected = sum(table[token] for token in prompt) / len(prompt) - sum(table) / len(table)
        assert (found[row] - expected).abs().max() < 1e-6


def test_a_bundles_past_is_read_in_the_order_of_its_numbers():
    assert past_of({"adapter": "x", "past.11": "l", "past.2": "b", "past.1": "a", "past_weights": "w"}) == [*"abl"]
    assert past_of({"shared": "s", "dedicated": "d", "gate": "g"}) == []
