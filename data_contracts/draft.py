"""A first contract for a data file: what the data shows is filled in, what the owner knows is marked `# OWNER:`."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import yaml

from data_contracts.contract import TASK_PATTERN
from data_contracts.errors import UserError
from data_contracts.readers import as_text, open_file, raw_columns
from data_contracts.sources import resolve_source, source_name
from data_contracts.template import parse_template

_FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}
_ID_NAME = re.compile(r"^(id|uid|uuid|key|.*[_ -]id)$", re.IGNORECASE)
_TEXT_NAMES = ("text", "sentence", "review", "content", "message", "body", "comment", "question", "input", "document")
_ANSWER_NAMES = (
    *("label", "labels", "class", "category", "sentiment", "intent", "topic", "target"),
    *("answer", "output", "response", "completion", "summary", "reference", "translation"),
)
_MAX_LABELS = 50
# Token limits are guessed from characters: most languages and tokenizers have three or more characters a token.
_CHARACTERS_PER_TOKEN = 3
_TOKEN_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class _Profile:
    """What one column looks like."""

    name: str
    is_text: bool  # every value is text
    is_name: bool  # every value is text, a whole number or true/false
    num_rows: int
    num_filled: int
    values: list[str]  # distinct, not blank, in alphabetical order
    mean_length: float  # characters
    long_length: int  # characters; 99% of the values are not longer

    @property
    def looks_like_labels(self) -> bool:
        """Few values, each several times."""
        return self.is_name and 2 <= len(self.values) <= min(_MAX_LABELS, max(2, self.num_filled // 5))


def draft_contract(data_file: Path | str, task: str, roots: list[str | Path]) -> str:
    """A contract for a CSV, JSON-lines or parquet file, as YAML text with comments.

    The file serves all three splits: validation and test are shares of it, chosen by a hash of the text. Fields marked
    `# OWNER:` are empty and must be filled in before the contract loads; the rest is inferred and worth a look.

    Args:
        data_file: a file below one of `roots`; the contract names it relative to that root.
        task: the task's name.
        roots: allowed folders.

    Raises:
        UserError: a bad task name, an unreadable file or one outside the roots, or no column that can be the text.
    """
    if not re.fullmatch(TASK_PATTERN, task):
        raise UserError(
            f"task name {task!r} must be a lower-case letter followed by at most 62 lower-case letters, digits or _"
        )
    file_format = _FORMATS.get(Path(data_file).suffix.lower())
    if file_format is None:
        raise UserError(f"{data_file} is of no known kind; give a file that ends in {', '.join(_FORMATS)}")
    (path,) = resolve_source(os.path.abspath(data_file), roots)
    profiles = _profiles(path, file_format)
    id_column = next((p for p in profiles if _is_id(p)), None)
    rest = [p for p in profiles if p is not id_column]
    answer = _answer_column(rest)
    text = _text_column([p for p in rest if p is not answer])
    if text is None:
        found = ", ".join(p.name for p in profiles)
        raise UserError(f"{path} has no column that can be the text besides the answer (it has {found}); add one")
    parse_template(f"{{{text.name}}}")
    others = [p.name for p in rest if p not in (text, answer)]
    return _yaml(task, source_name(path, roots), file_format, id_column, text, answer, others)


def _profiles(path: str, file_format: str) -> list[_Profile]:
    with open_file(path) as file:
        columns, lines, _, _ = raw_columns(path, file, file_format, None)
    if not len(lines):
        raise UserError(f"{path} has no rows; a contract is drafted from data")
    return [_profile(name, values) for name, values in columns.items()]


def _profile(name: str, raw: object) -> _Profile:
    texts, not_name, _ = as_text(raw, "key")
    _, not_text, _ = as_text(raw, "text")
    filled = texts.filter(pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(texts), ""), False))
    lengths = pc.utf8_length(filled)
    return _Profile(
        name=name,
        is_text=not pc.any(not_text).as_py(),
        is_name=not pc.any(not_name).as_py(),
        num_rows=len(texts),
        num_filled=len(filled),
        values=sorted(pc.unique(filled).to_pylist()),
        mean_length=pc.mean(lengths).as_py() or 0.0,
        long_length=pc.quantile(lengths, q=0.99, interpolation="higher")[0].as_py() or 0,
    )


def _is_id(profile: _Profile) -> bool:
    is_key = profile.is_name and len(profile.values) == profile.num_rows
    return is_key and _ID_NAME.match(profile.name) is not None


def _named(profiles: list[_Profile], names: tuple[str, ...]) -> _Profile | None:
    by_name = {profile.name.strip().lower(): profile for profile in profiles}
    return next((by_name[name] for name in names if name in by_name), None)


def _answer_column(profiles: list[_Profile]) -> _Profile | None:
    named = _named([profile for profile in profiles if profile.is_name], _ANSWER_NAMES)
    if named is not None and len(named.values) > 1:
        return named
    candidates = [profile for profile in profiles if profile.looks_like_labels]
    return min(candidates, key=lambda profile: len(profile.values), default=None)


def _text_column(profiles: list[_Profile]) -> _Profile | None:
    texts = [profile for profile in profiles if profile.is_text and profile.num_filled]
    return _named(texts, _TEXT_NAMES) or max(texts, key=lambda profile: profile.mean_length, default=None)


def _token_size(characters: int, spare: int) -> int:
    needed = characters // _CHARACTERS_PER_TOKEN + spare
    return next((size for size in _TOKEN_SIZES if size >= needed), _TOKEN_SIZES[-1])


def _label_texts(values: list[str]) -> dict[str, str]:
    texts = {value: " " + value.replace("_", " ").strip() for value in values}
    distinct = len({text.strip() for text in texts.values()}) == len(values)
    return texts if distinct else {value: f" {value}" for value in values}


def _quoted(value: str) -> str:
    """A YAML scalar in double quotes, on one line."""
    return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=10**9).strip()


def _words(name: str) -> str:
    return name.replace("_", " ").strip().capitalize()


def _yaml(
    task: str,
    source: str,
    file_format: str,
    id_column: _Profile | None,
    text: _Profile,
    answer: _Profile | None,
    others: list[str],
) -> str:
    classify = answer is None or answer.looks_like_labels
    max_answer = 16 if classify or answer is None else _token_size(answer.long_length, 4)
    max_tokens = max(64, _token_size(text.long_length + 30, 2 * max_answer))
    prompt = f"{_words(text.name)}: {{{text.name}}}\n{_words(answer.name) if answer else 'Answer'}:"
    columns = (
        [f"  id: {_quoted(id_column.name)}"] if id_column else ["  # id: no column has a distinct id in every row"]
    )
    columns.append(f"  text: {_quoted(text.name)}")
    if answer is not None:
        columns.append(f"  answer: {_quoted(answer.name)}")
    else:
        columns.append('  answer: ""  # OWNER: the column with the right answer')
    lines = [
        "# Drafted from the data. Fill in every line marked OWNER, look over the rest, then run the check.",
        f"task: {yaml.safe_dump(task).splitlines()[0]}",
        "version: 1.0.0",
        'owner: ""  # OWNER: who answers for this data (a mail address)',
        'description: ""  # OWNER: one sentence on what the model must do',
        f"kind: {'classification' if classify else 'generation'}",
        'language: ""  # OWNER: the language of the text, such as en',
        "source:",
        f"  format: {file_format}",
        f"  train: [{_quoted(source)}]",
        "  # A share of the file's texts, chosen by a hash of the text; name files of their own if you have them.",
        "  validation: {from: train, fraction: 0.1}",
        "  test: {from: train, fraction: 0.2}",
        "columns:",
        *columns,
        *([f"  # not used: {', '.join(map(_quoted, others))}"] if others else []),
        "# What the model reads before it answers; {name} stands for a column.",
        f"prompt: {_quoted(prompt)}",
        *_label_lines(classify, answer),
        f"metric: {'accuracy' if classify else 'rouge_l'}  # {_metric_choice(classify)}",
        "limits:",
        f"  max_tokens: {max_tokens}  # prompt and answer",
        f"  max_answer_tokens: {max_answer}",
        "  too_long: reject  # or truncate: cut the end of the longest column",
        "  max_rejected_fraction: 0.01",
        "  min_rows: {train: 50, validation: 20, test: 20}",
        "rules: []",
        'licence: ""  # OWNER: under which licence or agreement the data may be used',
        'sensitivity: ""  # OWNER: public, internal or personal',
    ]
    return "\n".join(lines) + "\n"


def _label_lines(classify: bool, answer: _Profile | None) -> list[str]:
    if not classify:
        return []
    if answer is None:
        return ["labels: {}  # OWNER: every label with the text the model writes for it, such as good: ' good'"]
    texts = _label_texts(answer.values)
    return [
        "# Every label with the text the model writes for it; plain words work best.",
        "labels:",
        *(f"  {_quoted(label)}: {_quoted(text)}" for label, text in texts.items()),
    ]


def _metric_choice(classify: bool) -> str:
    if classify:
        return "or macro_f1, when the labels are out of balance"
    return "or exact_match, edit_similarity, sari"
