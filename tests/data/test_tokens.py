"""Token shards: what the tokenizer says, whole or not at all, under a name that follows every input."""

import json
from dataclasses import replace

import pyarrow as pa
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from data_contracts import load_contract
from pipeline.data.ingest import ingest
from pipeline.data.token_limits import TokenCounter
from pipeline.data.tokens import (
    answer_tokens,
    open_shards,
    prompt_tokens,
    shard_digest,
    tokenizer_digest,
    write_shards,
)
from tests.helpers import END, LABELS, build_tokenizer, make_task


@pytest.fixture(scope="module")
def clean(data_root, tokenizer):
    return {
        name: ingest(load_contract(data_root / f"{name}.yaml"), [str(data_root)], tokenizer=tokenizer)
        for name in ("first", "copying")
    }


@pytest.fixture(scope="module")
def prepared(clean, tokenizer, tmp_path_factory):
    opened = {}
    for name, task in clean.items():
        folder = tmp_path_factory.mktemp("prepared") / name / "digest"
        folder.parent.mkdir()
        write_shards(task, tokenizer, folder)
        opened[name] = open_shards(task.contract, folder)
    return opened


def with_special_tokens(tokenizer, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a start token and / or the end token around every text."""
    made = build_tokenizer()
    made.add_special_tokens({"bos_token": "<|start|>"})
    tokens = [(token, made.convert_tokens_to_ids(token)) for token in ("<|start|>", "<|end|>")]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=tokens)
    return made


@pytest.mark.parametrize("name", ["first", "copying"])
def test_every_row_is_stored_with_its_own_tokens(clean, prepared, tokenizer, name):
    task = prepared[name]
    for split, table in clean[name].splits.items():
        view = task.rows(split, None, seed=0)
        prompts, answers = view.tokens(range(len(view)))
        for row, record in enumerate(table.to_pylist()):
            text = LABELS[record["answer"]] if name == "first" else record["answer"]
            assert prompts[row] == tokenizer.encode(record["prompt"])
            assert answers[row] == tokenizer.encode(text)
            assert view.prompt_lengths[row] == len(prompts[row])
            assert view.answer_lengths[row] == len(answers[row]) + 1
            assert view.lengths[row] == len(prompts[row]) + len(answers[row]) + 1
        assert view.column("row_id") == table["row_id"].to_pylist()
        assert view.column("reference") == table["answer"].to_pylist()
        assert view.column("text") == table["text"].to_pylist()
    assert task.end_of_answer == tokenizer.eos_token_id
    assert task.data_digests == clean[name].data_digests


def no_tokens(*_) -> None:
    raise AssertionError("tokenised again")


@pytest.mark.parametrize("template", [None, "<|start|> $A <|end|>", "$A <|end|>"])
@pytest.mark.parametrize("name", ["first", "copying"])
def test_prompts_tokenised_by_the_checks_are_stored_and_not_tokenised_again(
    data_root, tmp_path, monkeypatch, name, template
):
    used = build_tokenizer() if template is None else with_special_tokens(build_tokenizer(), template)
    contract = load_contract(data_root / f"{name}.yaml")
    other = with_special_tokens(build_tokenizer(), "<|start|> <|start|> $A")
    for made_with, folder in ((used, "kept"), (None, "none"), (other, "other")):
        task = ingest(contract, [str(data_root)], tokenizer=made_with)
        with monkeypatch.context() as patch:
            if made_with is used:
                patch.setattr(TokenCounter, "prompt_ids", no_tokens)
            write_shards(task, used, tmp_path / folder)
        opened = open_shards(contract, tmp_path / folder)
        for split, table in task.splits.items():
            expected = [used(text)["input_ids"] for text in table["prompt"].to_pylist()]
            expected = [ids[:-1] if ids[-1] == used.eos_token_id else ids for ids in expected]
            assert opened.rows(split, None, 0).tokens(range(len(expected)))[0] == expected


def test_a_prompt_that_was_cut_is_stored_as_it_was_cut(tmp_path, tokenizer):
    limits = {"max_tokens": 30, "too_long": "truncate", "max_rejected_fraction": 1.0}
    path = make_task(tmp_path, "cut", limits=limits | {"min_rows": {"train": 1, "validation": 1, "test": 1}})
    task = ingest(load_contract(path), [str(tmp_path)], tokenizer=tokenizer)
    counts = task.verdict.splits["train"]
    assert 0 < counts.truncated < counts.kept
    write_shards(task, tokenizer, tmp_path / "digest")
    stored = open_shards(task.contract, tmp_path / "digest").splits["train"]["prompt_ids"]
    assert list(stored) == [tokenizer.encode(text) for text in task.splits["train"]["prompt"].to_pylist()]


@pytest.mark.parametrize("batch_rows", [1, 7])
def test_batches_of_rows_do_not_change_a_shard(clean, prepared, tokenizer, tmp_path, monkeypatch, batch_rows):
    monkeypatch.setattr("pipeline.data.tokens.BATCH_ROWS", batch_rows)
    for name, task in clean.items():
        write_shards(task, tokenizer, tmp_path / name)
        opened = open_shards(task.contract, tmp_path / name)
        for split in task.splits:
            assert opened.splits[split].to_dict() == prepared[name].splits[split].to_dict()
            assert opened.splits[split].features == prepared[name].splits[split].features


def test_labels_are_stored_in_the_contracts_order(prepared, tokenizer):
    task = prepared["first"]
    assert task.label_ids == tuple(tuple(tokenizer.encode(text)) for text in LABELS.values())
    assert len(set(map(len, task.label_ids))) > 1 and min(map(len, task.label_ids)) > 1
    train = task.splits["train"]
    assert [list(LABELS)[i] for i in train["label"]] == list(train["reference"])
    assert prepared["copying"].label_ids == () and set(prepared["copying"].splits["train"]["label"]) == {-1}


def test_lengths_are_those_of_the_verdict(clean, prepared):
    for name, task in prepared.items():
        for split, counts in clean[name].verdict.to_dict()["splits"].items():
            lengths = task.rows(split, None, 0).lengths
            assert (counts["tokens"]["min"], counts["tokens"]["max"]) == (lengths.min(), lengths.max())


def test_a_limit_draws_the_same_rows_again_and_keeps_their_columns_together(prepared):
    task = prepared["first"]
    view = task.rows("train", 9, seed=3)
    again = task.rows("train", 9, seed=3)
    assert len(view) == 9 and view.column("row_id") == again.column("row_id")
    whole = task.rows("train", None, seed=3)
    places = [whole.column("row_id").index(row_id) for row_id in view.column("row_id")]
    assert view.tokens(range(9)) == whole.tokens(places)
    assert view.lengths.tolist() == whole.lengths[places].tolist()
    assert view.tokens([4, 0]) == tuple([part[4], part[0]] for part in view.tokens(range(9)))
    assert task.rows("train", 9, seed=4).column("row_id") != view.column("row_id")


def test_shards_are_memory_mapped(prepared):
    files = prepared["first"].splits["train"].cache_files
    assert files and all(file["filename"].endswith(".arrow") for file in files)


def test_a_prompt_keeps_the_start_token_and_never_ends_with_the_end(tokenizer):
    texts = ["Note 1: odd.\nAnswer:", "x"]
    plain = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    both = with_special_tokens(tokenizer, "<|start|> $A <|end|>")
    start = both.convert_tokens_to_ids("<|start|>")
    assert prompt_tokens(both, texts) == [[start, *ids] for ids in plain]
    assert prompt_tokens(with_special_tokens(tokenizer, "<|start|> $A"), texts) == [[start, *ids] for ids in plain]
    assert prompt_tokens(tokenizer, texts) == plain
    assert answer_tokens(both, texts) == plain


def test_padding_and_truncation_left_on_in_the_tokenizer_do_not_reach_the_rows():
    tokenizer = build_tokenizer()
    texts = ["Note 1: the parcel we got was odd again.\nAnswer:", "x"]
    plain = [tokenizer.encode(text) for text in texts]
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=32, pad_id=1, pad_token="<|pad|>")
    assert prompt_tokens(tokenizer, texts) == plain
    assert answer_tokens(tokenizer, texts) == plain
    assert tokenizer_digest(tokenizer) == tokenizer_digest(build_tokenizer())


def test_a_special_token_named_in_a_text_is_read_as_text(tokenizer):
    text = f"odd {END} parcel"
    prompt, answer = prompt_tokens(tokenizer, [text])[0], answer_tokens(tokenizer, [text])[0]
    assert prompt == answer and tokenizer.eos_token_id not in prompt
    assert tokenizer.decode(prompt) == text
    start = with_special_tokens(tokenizer, "<|start|> $A <|end|>")
    ids = prompt_tokens(start, [f"<|start|>x{END}"])[0]
    assert ids.count(start.bos_token_id) == 1 and ids[0] == start.bos_token_id and start.eos_token_id not in ids


def test_the_name_of_a_shard_follows_every_input(tokenizer):
    base = ("c" * 64, {"a.parquet": "1" * 64}, tokenizer_digest(tokenizer))
    digest = shard_digest(*base)
    assert digest == shard_digest(*base) and len(digest) == 64
    others = [
        shard_digest("d" * 64, *base[1:]),
        shard_digest(base[0], {"b.parquet": "1" * 64}, base[2]),
        shard_digest(base[0], {"a.parquet": "2" * 64}, base[2]),
        shard_digest(base[0], base[1], tokenizer_digest(with_special_tokens(tokenizer, "<|start|> $A"))),
    ]
    assert len({digest, *others}) == 5


def test_a_failure_half_way_leaves_nothing_behind(clean, tokenizer, tmp_path):
    task = clean["first"]
    broken = task.splits["test"].set_column(3, "answer", pa.array(["no such label"] * 20))
    half = replace(task, splits={**task.splits, "test": broken})
    with pytest.raises(KeyError):
        write_shards(half, tokenizer, tmp_path / "digest")
    assert list(tmp_path.iterdir()) == []


def test_shards_that_are_there_already_are_left_alone(clean, prepared, tokenizer, tmp_path):
    folder = tmp_path / "digest"
    write_shards(clean["first"], tokenizer, folder)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}
    write_shards(clean["first"], tokenizer, folder)
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}
    assert before == after and [path.name for path in tmp_path.iterdir()] == ["digest"]


def test_counts_and_file_names_travel_with_the_shards(tmp_path, tokenizer):
    path = make_task(tmp_path, "counted", rows={"train": 12, "validation": 6, "test": 6})
    task = ingest(load_contract(path), [str(tmp_path)], tokenizer=tokenizer)
    write_shards(task, tokenizer, tmp_path / "digest")
    opened = open_shards(task.contract, tmp_path / "digest")
    assert {split: counts["kept"] for split, counts in opened.counts.items()} == {
        "train": 12,
        "validation": 6,
        "test": 6,
    }
    assert opened.files == ("counted/test.parquet", "counted/train.parquet", "counted/validation.parquet")
    meta = json.loads((tmp_path / "digest" / "meta.json").read_text())
    assert str(tmp_path) not in json.dumps(meta)
