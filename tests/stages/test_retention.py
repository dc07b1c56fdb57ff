"""What earlier tasks are served with, whether a task is to be learned, the matrix the chain tells (METHODS 2)."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest

from data_contracts import load_contract
from data_contracts.errors import UserError
from pipeline.config import StreamConfig
from pipeline.data.ingest import ingest
from pipeline.data.tokens import open_shards, write_shards
from pipeline.evaluation.answers import Answers
from pipeline.experts.bank import Bank
from pipeline.increments import check_sampling, measurable, standing
from pipeline.methods.moe_cl import Options, build
from pipeline.methods.protocol import PlainLora, RetentionOptions
from pipeline.stages.evaluate import Measured, measure, moves, retain
from pipeline.stages.job import Job
from pipeline.tracking.chain import fold
from pipeline.tracking.history import History
from pipeline.tracking.manifest import Manifest
from pipeline.tracking.matrix_rows import matrix_of
from tests.helpers import light_learner, randomise, stream_dict

REFERENCES = ["negative", "neutral", "positive", "neutral", "negative", "positive", "neutral", "positive"]


def measured(contract, wrong: set[int]) -> Measured:
    """A measurement of eight rows of which those in `wrong` are answered wrongly; the score is its accuracy."""
    swap = {"negative": "neutral", "neutral": "positive", "positive": "negative"}
    answers = [swap[name] if row in wrong else name for row, name in enumerate(REFERENCES)]
    columns = {"reference": REFERENCES, "text": [""] * 8}
    rows = SimpleNamespace(column=columns.__getitem__)
    return Measured(contract, Answers(answers, np.ones(8), None), rows, 1 - len(wrong) / 8)


@pytest.fixture(scope="module")
def contract(data_root):
    return load_contract(data_root / "first.yaml")


# ---------------------------------------------------------------- moves()


def test_the_default_margin_is_one_paired_standard_error(contract):
    # per row +1 +1 +1 -1 0 0 0 0: gain 2/8; variance (4 - 8 * (1/4)^2) / 7 = 1/2; error sqrt(1/2 / 8) = 1/4
    better, gain, margin = moves(measured(contract, {0, 1, 2}), measured(contract, {3}), None)
    assert (gain, margin) == pytest.approx((0.25, 0.25)) and not better  # not more than the margin
    # +1 +1 +1 0 0 0 0 0: gain 3/8; variance (3 - 8 * 9/64) / 7 = 15/56; error sqrt(15/448) = 0.183
    better, gain, margin = moves(measured(contract, {0, 1, 2}), measured(contract, set()), None)
    assert (gain, margin) == pytest.approx((0.375, (15 / 448) ** 0.5)) and better


def test_equal_answers_do_not_move(contract):
    assert moves(measured(contract, {1}), measured(contract, {1}), None) == (False, 0.0, 0.0)
    assert moves(measured(contract, {1}), measured(contract, {1}), 0.0)[0] is False


def test_a_loss_never_moves(contract):
    for wrong in ({0}, {0, 1}, set(range(8))):
        assert moves(measured(contract, set()), measured(contract, wrong), None)[0] is False
        assert moves(measured(contract, set()), measured(contract, wrong), 0.0)[0] is False


@pytest.mark.parametrize(("margin", "better"), [(0.0, True), (0.12, True), (0.125, False), (0.2, False)])
def test_a_margin_of_ones_own_must_be_exceeded(contract, margin, better):
    assert moves(measured(contract, {1}), measured(contract, set()), margin) == (better, 0.125, margin)


def test_a_gain_of_just_the_margin_does_not_move_whatever_the_rounding(contract):
    any_rows = measured(contract, {1})
    before, after = (Measured(contract, any_rows.answers, any_rows.rows, score) for score in (0.75, 0.8))
    assert after.score - before.score > 0.05  # what floats make of it
    assert moves(before, after, 0.05)[0] is False


# ---------------------------------------------------------------- retain()

OLD = {"shared": "s1", "dedicated": "d1", "gate": "g1"}
NEW = {"shared": "s2", "dedicated": "d2", "gate": "g2"}
MOVED = {"shared": "s2", "dedicated": "d1", "gate": "g1"}


def never(bundle):
    raise AssertionError("nothing needs to be measured")


def method(policy: str, margin: float | None = None):
    return build(Options(retention=RetentionOptions(policy=policy, margin=margin)))


def test_pin_and_follow_measure_nothing():
    assert retain(method("pin"), OLD, NEW, never) == (OLD, {"policy": "pin", "moved": False})
    assert retain(method("follow"), OLD, NEW, never) == (MOVED, {"policy": "follow", "moved": True})


def test_a_method_that_cannot_move_stays_under_every_policy():
    for policy in ("pin", "follow", "best"):
        bundle, told = retain(PlainLora(None, RetentionOptions(policy=policy)), OLD, NEW, never)
        assert bundle == OLD and told["moved"] is False


@pytest.mark.parametrize(
    ("after", "expected"), [(set(), MOVED), ({0, 1, 2}, OLD), ({0, 1, 2, 3}, OLD), ({0, 1, 3}, OLD)]
)
def test_best_moves_only_if_validation_is_better_by_more_than_the_margin(contract, after, expected):
    scores = {"s1": measured(contract, {0, 1, 2}), "s2": measured(contract, after)}
    asked = []

    def on_validation(bundle):
        asked.append(bundle)
        return scores[bundle["shared"]]

    bundle, told = retain(method("best"), OLD, NEW, on_validation)
    assert bundle == expected and asked == [OLD, MOVED]
    assert told["moved"] is (expected is MOVED) and told["policy"] == "best"
    assert told["gain"] == pytest.approx((3 - len(after)) / 8)
    assert scores[bundle["shared"]].score >= scores["s1"].score  # BWT on validation is not negative


# ---------------------------------------------------------------- serving


@pytest.fixture
def job(tmp_path, data_root, tiny_model, tokenizer):
    """A job of one process with two tasks' bundles in its bank: {task: bundle}."""
    stream = stream_dict(tmp_path, tmp_path, data_root, ["unused"], evaluation={"batch_tokens": 200})
    config = StreamConfig.model_validate(stream)
    what = build(Options.model_validate({"lora": {"rank": 2, "dropout": 0.0}}))
    learner = light_learner(tiny_model, what.plan)
    bank, bundles = Bank(tmp_path / "bank"), {}
    for seed, task in enumerate(("first", "second")):
        randomise(learner, seed=seed, scale=0.3)
        parts = {name: learner.components[name] for name in what.published()}
        bundles[task] = {
            name: bank.put({key: p.detach() for key, p in part.items()}, {}) for name, part in parts.items()
        }
    return Job(config, learner.world, tmp_path, what, tokenizer, learner, bank, {}), bundles


def shards(job: Job, data_root, name: str):
    contract = load_contract(data_root / f"{name}.yaml")
    folder = job.work_dir / name
    write_shards(ingest(contract, [str(data_root)], tokenizer=job.tokenizer), job.tokenizer, folder)
    return open_shards(contract, folder)


def test_a_pinned_bundle_scores_to_the_bit_what_it_scored_before_others_were_served(job, data_root):
    job, bundles = job
    task = shards(job, data_root, "first")
    moved = {**bundles["first"], "shared": bundles["second"]["shared"]}
    first = measure(job, task, bundles["first"], "test").answers.label_scores
    seen = [first]
    for bundle in (bundles["second"], moved, {}, {"shared": bundles["second"]["shared"]}):
        seen.append(measure(job, task, bundle, "test").answers.label_scores)
        again = measure(job, task, bundles["first"], "test").answers.label_scores
        assert np.array_equal(first, again)
    assert all(not np.allclose(one, other) for n, one in enumerate(seen) for other in seen[:n])


def test_an_empty_bundle_is_the_bare_backbone_and_the_shared_expert_can_speak_alone(job):
    job, bundles = job
    job.serve(bundles["first"])
    assert {ffn.active for ffn in job.learner.ffns} == {("shared", "dedicated")}
    job.serve({"shared": bundles["second"]["shared"]})
    assert {ffn.active for ffn in job.learner.ffns} == {("shared",)}
    job.serve({})
    assert {ffn.active for ffn in job.learner.ffns} == {()}


def test_a_damaged_bank_file_is_refused_before_it_is_served(job):
    job, bundles = job
    path = job.bank.path(bundles["second"]["shared"])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="was altered"):
        job.serve(bundles["second"])


# ---------------------------------------------------------------- standing()


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def prepared(task: str = "a", version: str = "1", data: str = "1"):
    """A prepared task, as far as its standing depends on it."""
    digests = {split: sha(f"{task}/{split}/{data}") for split in ("train", "validation", "test")}
    return SimpleNamespace(task=task, contract=SimpleNamespace(digest=sha(f"{task}/v{version}")), data_digests=digests)


def manifests_of(*entries: tuple[str, str, str, str, str]) -> list[Manifest]:
    """Manifests of (task, contract version, data, learning, verdict), oldest first."""
    manifests: list[Manifest] = []
    for number, (task, version, data, learning, verdict) in enumerate(entries, start=1):
        what = prepared(task, version, data)
        told = {"name": learning}
        manifests.append(
            Manifest(
                increment=number,
                task=task,
                parent=manifests[-1].sha256 if manifests else None,
                contract={"version": "1.0.0", "digest": what.contract.digest, "labels": None, "prompt": "{text}"},
                data={
                    split: {"digest": digest, "rows_in": 1, "kept": 1, "rejected": {}}
                    for split, digest in what.data_digests.items()
                },
                learning=told,
                learning_digest=sha(json.dumps(told, separators=(",", ":"))),
                backbone={"digest": sha("backbone"), "model_type": "llama", "dtype": "float32"},
                method="moe_cl",
                verdict=verdict,
                bundles={task: {"adapter": sha(str(number))}} if verdict == "promoted" else {},
                bank={},
                state={},
                row={task: number / 10} | {m.task: number / 10 for m in manifests},
                validation_row={},
                files={},
                gate={},
                versions={},
            )
        )
    return manifests


def history_of(*entries: tuple[str, str, str, str, str]) -> History:
    """What the chain of `manifests_of` tells."""
    return History.of(manifests_of(*entries))


def stands(what, *entries, learning: str = "x") -> str:
    return standing(what, history_of(*entries), sha(json.dumps({"name": learning}, separators=(",", ":"))))


PROMOTED, REJECTED = ("a", "1", "1", "x", "promoted"), ("a", "1", "1", "x", "rejected")
OTHER = ("b", "1", "1", "x", "promoted")


def test_a_task_the_chain_does_not_know_is_new():
    assert stands(prepared()) == "new"
    assert stands(prepared(), OTHER) == "new"


def test_a_promoted_task_is_learned_whatever_came_after_and_however_it_would_be_learned_now():
    assert stands(prepared(), PROMOTED) == "learned"
    assert stands(prepared(), PROMOTED, OTHER, learning="y") == "learned"


@pytest.mark.parametrize("changed", [{"version": "2"}, {"data": "2"}])
def test_a_new_contract_or_new_data_makes_a_known_task_new(changed):
    assert stands(prepared(**changed), PROMOTED) == "new"
    assert stands(prepared(**changed), REJECTED) == "new"


def test_the_same_inputs_are_not_trained_again_after_a_rejection():
    assert stands(prepared(), REJECTED) == "rejected"
    assert stands(prepared(), REJECTED, OTHER) == "rejected"
    assert stands(prepared(), REJECTED, learning="y") == "new"  # another learning configuration is another try
    assert stands(prepared(), REJECTED, ("a", "1", "1", "y", "rejected")) == "rejected"  # both were tried
    assert stands(prepared(), REJECTED, ("a", "1", "1", "y", "promoted")) == "learned"


def test_a_rejected_new_version_leaves_the_learned_one_learned():
    rejected_second = ("a", "2", "2", "x", "rejected")
    assert stands(prepared(version="2", data="2"), PROMOTED, rejected_second) == "rejected"
    assert stands(prepared(), PROMOTED, rejected_second) == "learned"  # back to what is served


def test_going_back_to_an_older_version_is_new_once_the_newer_one_is_served():
    assert stands(prepared(), PROMOTED, ("a", "2", "1", "x", "promoted")) == "new"


def test_a_row_measures_the_new_task_and_those_learned_from_the_data_at_hand():
    chain = history_of(PROMOTED, OTHER, ("c", "1", "1", "x", "rejected"))
    tasks = {"a": prepared(data="2"), "b": prepared("b"), "c": prepared("c"), "d": prepared("d"), "e": prepared("e")}
    learning = sha(json.dumps({"name": "x"}, separators=(",", ":")))
    assert set(measurable(tasks, tasks["d"], chain, learning)) == {"b", "d"}


def test_a_sample_of_the_earlier_tasks_is_drawn_by_seed_and_increment():
    names = [f"task_{n}" for n in range(9)]
    history = history_of(*((name, "1", "1", "x", "promoted") for name in names))
    tasks = {name: prepared(name) for name in [*names[:6], "new"]}  # three learned ones are not in the stream
    learning = sha(json.dumps({"name": "x"}, separators=(",", ":")))

    def drawn(count: int | None, seed: int = 0, told: History = history) -> list[str]:
        return sorted(measurable(tasks, tasks["new"], told, learning, count, seed))

    assert drawn(None) == sorted(tasks) and drawn(0) == ["new"]
    samples = [drawn(2, seed) for seed in range(12)]
    assert all(len(sample) == 3 and "new" in sample and set(sample) <= set(tasks) for sample in samples)
    assert set().union(*samples) == set(tasks), "every earlier task has its turn"
    assert drawn(2, 5) == drawn(2, 5)
    later = history_of(*((name, "1", "1", "x", "promoted") for name in names), ("c", "1", "1", "x", "rejected"))
    assert any(drawn(2, seed, later) != samples[seed] for seed in range(12)), "the next increment draws anew"
    assert drawn(20) == sorted(tasks)


def test_sampling_is_refused_where_every_earlier_task_moves(tmp_path):
    sampled = {"evaluation": {"earlier_tasks": 2}}
    following = stream_dict(tmp_path, tmp_path, tmp_path, ["unused"], **sampled)
    config = StreamConfig.model_validate(following)
    check_sampling(config, method("best"))
    check_sampling(config, method("pin"))
    with pytest.raises(UserError, match=r"evaluation\.earlier_tasks: .*retention follow.*remove the key"):
        check_sampling(config, method("follow"))
    check_sampling(StreamConfig.model_validate({**following, "evaluation": {}}), method("follow"))


# ---------------------------------------------------------------- the order, the champion's row, the matrix


def test_the_order_is_by_newest_promotion():
    def order(tasks: str) -> list[str]:
        return list(history_of(*((task, "1", str(n), "x", "promoted") for n, task in enumerate(tasks))).learned)

    assert order("") == []
    assert order("abc") == ["a", "b", "c"]
    assert order("abacb") == ["a", "c", "b"]


def test_the_champions_row_holds_each_tasks_newest_promoted_score():
    history = history_of(PROMOTED, OTHER, ("c", "1", "1", "x", "rejected"))
    assert history.row == {"a": 0.2, "b": 0.2}  # increment 3 was rejected: its row does not count
    assert History().row == {}


def test_a_history_says_what_the_fold_of_its_chain_says():
    told = [PROMOTED, OTHER, ("c", "1", "1", "x", "rejected"), ("a", "2", "1", "x", "promoted")]
    history = History()
    for count in range(1, len(told) + 1):
        history.add(history_of(*told[:count]).head)
    champion = fold(manifests_of(*told))
    assert (history.bundles, history.state, history.head_sha256) == (champion.bundles, champion.state, champion.head)
    assert history == history_of(*told) and history.promoted.increment == 4 and len(history.entries) == 4
    assert [entry.increment for entry in history.of_task("a")] == [4, 1]


def test_the_matrix_has_a_row_and_a_column_for_each_task_in_the_order_of_learning():
    tasks, rows, names = matrix_of([("a", {"a": 0.9}), ("b", {"a": 0.8, "b": 0.7}), ("c", {"c": 0.6, "b": 0.5})])
    assert tasks == ["a", "b", "c"] and names == ["after a", "after b", "after c"]
    assert rows == [[0.9, None, None], [0.8, 0.7, None], [None, 0.5, 0.6]]


def test_a_task_learned_again_counts_with_its_newest_increment():
    tasks, rows, names = matrix_of([("a", {"a": 0.9}), ("b", {"a": 0.8, "b": 0.7}), ("a", {"a": 0.95, "b": 0.6})])
    assert tasks == ["b", "a"] and rows == [[0.7, 0.8], [0.6, 0.95]] and names == ["after b", "after a"]


def test_no_increment_is_an_empty_matrix():
    assert matrix_of([]) == ([], [], [])
