"""Token counts of rows, and cutting rows that are too long."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from data_contracts.contract import TaskContract
from pipeline.data.prompts import rendered
from pipeline.files import sha256_text

# Texts given to the tokenizer at once: it works on them on all cores, in threads of its own (RAYON_NUM_THREADS limits
# them, TOKENIZERS_PARALLELISM=false forbids them), and their encodings are held in memory together: long texts are
# given in smaller batches.
_BATCH = 4096
_BATCH_CHARACTERS = 1 << 22


def text_tokenizer(tokenizer: PreTrainedTokenizerFast | Tokenizer) -> Tokenizer:
    """A copy of a fast tokenizer for texts that are not ours: no padding, no truncation, and a special token's name
    inside a text is read as plain text, so that no text can end a prompt or speak as another role.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    copied = Tokenizer.from_str(backend.to_str())
    copied.no_padding()
    copied.no_truncation()
    copied.encode_special_tokens = True
    return copied


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast | Tokenizer) -> str:
    """Digest of what the tokenizer does to a text."""
    return sha256_text(text_tokenizer(tokenizer).to_str())


class TokenCounter:
    """Tokens of texts and their numbers, as `text_tokenizer` reads them."""

    def __init__(self, tokenizer):
        """`tokenizer` is a Hugging Face fast tokenizer (it has `backend_tokenizer`) or a `tokenizers.Tokenizer`."""
        self._tokenizer = text_tokenizer(tokenizer)

    def prompt_ids(self, texts: list[str]) -> pa.ChunkedArray:
        """Token ids of each prompt (lists of int32), with the special tokens the tokenizer puts around a text."""
        parts = [_ids(encodings) for encodings in self._encoded(texts, add_special_tokens=True)]
        return pa.chunked_array(parts, pa.list_(pa.int32()))

    def answer_ids(self, texts: list[str]) -> pa.ChunkedArray:
        """Token ids of each answer (lists of int32), no special tokens."""
        parts = [_ids(encodings) for encodings in self._encoded(texts, add_special_tokens=False)]
        return pa.chunked_array(parts, pa.list_(pa.int32()))

    def prompts(self, texts: list[str]) -> np.ndarray:
        """Tokens of each prompt, with the special tokens the tokenizer puts around a text (such as a start token)."""
        return self._count(texts, add_special_tokens=True)

    def answers(self, texts: list[str]) -> np.ndarray:
        """Tokens of each answer alone; equal answers (labels) are counted once."""
        distinct = list(dict.fromkeys(texts))
        count_of = dict(zip(distinct, self._count(distinct, add_special_tokens=False).tolist(), strict=True))
        return np.array([count_of[text] for text in texts], dtype=np.int64)

    def _count(self, texts: list[str], add_special_tokens: bool) -> np.ndarray:
        encoded = chain.from_iterable(self._encoded(texts, add_special_tokens))
        return np.fromiter(map(len, encoded), dtype=np.int64, count=len(texts))

    def _encoded(self, texts: list[str], add_special_tokens: bool) -> Iterable[list[Encoding]]:
        fitting = len(texts) * _BATCH_CHARACTERS // max(1, sum(map(len, texts)))
        size = min(_BATCH, max(1, fitting))
        for start in range(0, len(texts), size):
            yield self._tokenizer.encode_batch_fast(texts[start : start + size], add_special_tokens=add_special_tokens)


def _ids(encodings: list[Encoding]) -> pa.ListArray:
    offsets = np.zeros(len(encodings) + 1, dtype=np.int32)
    offsets[1:] = np.cumsum([len(encoding) for encoding in encodings])
    flat = chain.from_iterable(encoding.ids for encoding in encodings)
    return pa.ListArray.from_arrays(offsets, np.fromiter(flat, dtype=np.int32, count=offsets[-1]))


@dataclass(frozen=True)
class Fitted:
    """Rows after the token limits, one entry per row asked about."""

    prompts: list[str]  # cut where needed
    prompt_ids: pa.ChunkedArray  # token ids of the prompts, lists of int32
    tokens: np.ndarray  # prompt + answer + end of answer
    fits: np.ndarray  # bool
    cut: np.ndarray  # bool


def fit(contract: TaskContract, table: pa.Table, answer_texts: list[str], counter: TokenCounter) -> Fitted:
    """Apply the contract's token limits to rows without nulls.

    Tokens of a row = tokens(prompt) + tokens(answer) + 1 for the end of answer; prompt and answer are tokenised apart.
    With `too_long: truncate` the prompt's columns are cut to the greatest number of characters L with which the row
    fits: only columns longer than L lose their end, so the longest is cut first; the template's words stay.
    """
    limits = contract.limits
    prompts = rendered(contract.prompt, table).to_pylist()
    answer_tokens = counter.answers(answer_texts)
    prompt_ids = counter.prompt_ids(prompts)
    tokens = pc.list_value_length(prompt_ids).to_numpy().astype(np.int64) + answer_tokens + 1
    answer_fits = answer_tokens <= limits.max_answer_tokens
    fits = (tokens <= limits.max_tokens) & answer_fits
    cut = np.zeros(len(prompts), dtype=bool)
    if limits.too_long == "truncate":
        rows = np.flatnonzero((tokens > limits.max_tokens) & answer_fits)
        for row, prompt, length in _cut(contract, table, rows, limits.max_tokens - 1 - answer_tokens, counter):
            prompts[row], tokens[row] = prompt, length + answer_tokens[row] + 1
            fits[row] = cut[row] = True
        if len(rows := np.flatnonzero(cut)):
            shorter = counter.prompt_ids([prompts[row] for row in rows])
            source = np.arange(len(prompts))
            source[rows] = len(prompts) + np.arange(len(rows))
            prompt_ids = pa.chunked_array(prompt_ids.chunks + shorter.chunks).take(pa.array(source))
    return Fitted(prompts, prompt_ids, tokens, fits, cut)


def _cut(
    contract: TaskContract, table: pa.Table, rows: np.ndarray, budgets: np.ndarray, counter: TokenCounter
) -> Iterable[tuple[int, str, int]]:
    """(row, cut prompt, its tokens) of each row that can be made to fit, by bisection on L for all rows at once."""
    names = contract.prompt_columns
    values = {name: table.column(name).take(pa.array(rows)).to_pylist() for name in names}
    low = np.zeros(len(rows), dtype=np.int64)  # fits with this many characters (0: nothing found yet)
    high = np.array([max(len(values[name][i]) for name in names) for i in range(len(rows))], dtype=np.int64)
    best: dict[int, tuple[str, int]] = {}
    while len(active := np.flatnonzero(high - low > 1)):
        middle = (low[active] + high[active]) // 2
        part = pa.Table.from_pylist(
            [{name: values[name][i][:keep] for name in names} for i, keep in zip(active, middle, strict=True)]
        )
        prompts = rendered(contract.prompt, part).to_pylist()
        lengths = counter.prompts(prompts)
        for i, keep, prompt, length in zip(active, middle, prompts, lengths.tolist(), strict=True):
            if length <= budgets[rows[i]]:
                low[i], best[i] = keep, (prompt, length)
            else:
                high[i] = keep
    text = contract.columns.text
    for i, (prompt, length) in best.items():
        if values[text][i][: low[i]].strip():
            yield int(rows[i]), prompt, length
