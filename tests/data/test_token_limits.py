"""Token limits with a tokenizer of one token a character, so that every length is known by counting."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

from data_contracts import TaskContract
from pipeline.data.ingest import ingest
from pipeline.data.token_limits import TokenCounter


def tokenizer() -> Tokenizer:
    made = Tokenizer(WordLevel({"?": 0, "<s>": 1}, unk_token="?"))
    made.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    return made


def contract(too_long: str, max_tokens: int, **changes) -> TaskContract:
    limits = {"max_tokens": max_tokens, "max_answer_tokens": 3, "too_long": too_long, "max_rejected_fraction": 1.0}
    content = {
        "task": "t",
        "version": "1.0.0",
        "owner": "o",
        "description": "d",
        "kind": "generation",
        "language": "en",
        "source": {"format": "parquet", "train": ["train.parquet"], "validation": ["v.parquet"], "test": ["e.parquet"]},
        "columns": {"text": "text", "answer": "answer"},
        "prompt": "<{text}>",
        "metric": "exact_match",
        "limits": limits | {"min_rows": {"train": 1, "validation": 1, "test": 1}},
        "licence": "l",
        "sensitivity": "public",
    }
    return TaskContract.model_validate(content | changes)


def train_of(tmp_path, checked: TaskContract, rows: list[dict]):
    for name, content in {
        "train": rows,
        "v": [rows[0] | {"text": "v"}],
        "e": [rows[0] | {"text": "e"}],
    }.items():
        pq.write_table(pa.Table.from_pylist(content), tmp_path / f"{name}.parquet")
    task = ingest(checked, [tmp_path], tokenizer=tokenizer())
    return task.splits["train"].column("prompt").to_pylist(), task.verdict.splits["train"]


def test_a_row_counts_prompt_answer_and_end_and_the_limit_itself_fits(tmp_path):
    # <abcd> is 6, the answer 2, the end of the answer 1: 9 tokens.
    rows = [{"text": "abcd", "answer": "ok"}, {"text": "abcde", "answer": "ok"}, {"text": "x", "answer": "four"}]
    prompts, split = train_of(tmp_path, contract("reject", 9), rows)
    assert prompts == ["<abcd>"]
    assert split.rejected == {"too_long": 2}
    assert (split.tokens.min, split.tokens.max) == (9, 9)


def test_truncate_cuts_the_column_until_the_row_just_fits_and_never_the_prompt(tmp_path):
    rows = [{"text": "abcd", "answer": "ok"}, {"text": "123456789", "answer": "ok"}, {"text": "xyz", "answer": "four"}]
    prompts, split = train_of(tmp_path, contract("truncate", 9), rows)
    assert prompts == ["<abcd>", "<1234>"]
    assert split.truncated == 1
    assert split.rejected == {"too_long": 1}, "an answer that is too long cannot be mended by cutting"


def test_the_longest_column_is_cut_first(tmp_path):
    rows = [
        {"title": "T", "text": "123456789", "answer": "ok"},
        {"title": "TITLES", "text": "12", "answer": "ok"},
        {"title": "TITLES", "text": "123456789", "answer": "ok"},
    ]
    prompts, split = train_of(tmp_path, contract("truncate", 10, prompt="<{title}|{text}"), rows)
    # 10 - 2 (answer) - 1 (end) - 2 (template) = 5 characters: 1 + 4, 3 + 2, and 2 + 2 where both are cut alike.
    assert prompts == ["<T|1234", "<TIT|12", "<TI|12"]
    assert split.truncated == 3


def test_a_prompt_whose_own_words_fill_the_limit_is_rejected(tmp_path):
    # 9 - 6 (template) - 1 (end) leaves an answer of 1 character one character of text, and one of 2 characters none.
    rows = [{"text": "a", "answer": "o"}, {"text": "bcdef", "answer": "o"}, {"text": "cdefg", "answer": "ok"}]
    prompts, split = train_of(tmp_path, contract("truncate", 9, prompt="123456{text}"), rows)
    assert prompts == ["123456a", "123456b"]
    assert split.rejected == {"too_long": 1}


def test_rows_that_became_equal_by_cutting_are_duplicates(tmp_path):
    rows = [{"text": "12345", "answer": "ok"}, {"text": "12346", "answer": "ok"}]
    prompts, split = train_of(tmp_path, contract("truncate", 9), rows)
    assert prompts == ["<1234>"]
    assert split.rejected == {"duplicate_text": 1}
    assert split.truncated == 1


def test_label_texts_are_counted_and_not_label_names(tmp_path):
    checked = contract(
        "reject",
        9,
        kind="classification",
        metric="accuracy",
        labels={"a_long_name": "yes", "no": "four"},
    )
    rows = [{"text": "abc", "answer": "a_long_name"}, {"text": "abd", "answer": "no"}]
    prompts, split = train_of(tmp_path, checked, rows)
    assert prompts == ["<abc>"]
    assert split.rejected == {"too_long": 1}


def test_lengths_are_told_by_rank(tmp_path):
    rows = [{"text": "x" * n, "answer": "a"} for n in range(1, 101)]
    _, split = train_of(tmp_path, contract("reject", 200), rows)
    # Tokens are n + 4 for n = 1..100.
    assert (split.tokens.min, split.tokens.median, split.tokens.p95, split.tokens.max) == (5, 55, 100, 104)


@pytest.mark.parametrize("limited", [False, True])
def test_padding_and_truncation_of_the_tokenizer_do_not_change_a_count(limited):
    made = tokenizer()
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    if limited:
        made.enable_padding(length=50)
        made.enable_truncation(2)
    counter = TokenCounter(made)
    assert counter.prompts(["abc", ""]).tolist() == [4, 1], "a prompt has the special tokens of its tokenizer"
    assert counter.answers(["abc", "d", "abc"]).tolist() == [3, 1, 3], "an answer has none"
    assert counter.prompts([]).tolist() == []


@pytest.mark.parametrize(("rows", "characters"), [(4096, 1 << 22), (3, 1 << 22), (4096, 25), (4096, 1)])
def test_batches_do_not_change_ids_or_counts(monkeypatch, rows, characters):
    monkeypatch.setattr("pipeline.data.token_limits._BATCH", rows)
    monkeypatch.setattr("pipeline.data.token_limits._BATCH_CHARACTERS", characters)
    made = tokenizer()
    made.add_tokens(list("abc"))
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    texts = ["abc", "", "c", "a" * 40, "b?", "abcabc", ""] * 2
    ids = [[{"?": 0, "a": 2, "b": 3, "c": 4}[letter] for letter in text] for text in texts]
    counter = TokenCounter(made)
    assert counter.answer_ids(texts).to_pylist() == ids
    assert counter.prompt_ids(texts).to_pylist() == [[1, *own] for own in ids]
    assert counter.prompts(texts).tolist() == [1 + len(own) for own in ids]
    assert counter.answers(texts).tolist() == list(map(len, ids))
    assert counter.prompt_ids([]).to_pylist() == []
