"""The verdict on a task's data: counts that add up, told in words a business owner understands."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_contracts.contract import TaskContract
from data_contracts.errors import UserError

REASONS = {
    "malformed": "the line is not a whole record (broken JSON, or more or fewer cells than the header)",
    "invalid_utf8": "the text is not valid UTF-8",
    "wrong_type": "a value has the wrong type (text is needed; whole numbers are fine for id and answer)",
    "null": "a value is missing",
    "empty_text": "the text is empty",
    "unknown_label": "the answer is not one of the contract's labels",
    "duplicate_id": "the id occurred before in the same split",
    "duplicate_text": "the text occurred before in the same split",
    "leak": "the text is also in a split used for judging the model",
    "too_long": "prompt and answer are longer than limits.max_tokens, or the answer than limits.max_answer_tokens",
}
_RULES = {
    "min_length": "is shorter than the contract's rule allows",
    "max_length": "is longer than the contract's rule allows",
    "regex": "does not have the form the contract's rule asks for",
    "allowed_values": "is not one of the values the contract's rule allows",
    "min_value": "is below the contract's rule, or no number",
    "max_value": "is above the contract's rule, or no number",
}


def explain(code: str) -> str:
    """A reason code in plain words."""
    if code in REASONS:
        return REASONS[code]
    _, check, column = code.split(":", 2)
    return f"{column} {_RULES[check]}"


@dataclass(frozen=True)
class TokenLengths:
    """Tokens per kept row (prompt + answer + end of answer)."""

    min: int
    median: int
    p95: int
    max: int


@dataclass(frozen=True)
class SplitCounts:
    """One split: rows_in = kept + sum(rejected.values())."""

    rows_in: int
    kept: int
    rejected: dict[str, int]  # reason code -> rows
    warned: dict[str, int]  # reason code -> kept rows
    truncated: int  # kept rows whose longest prompt column was cut
    labels: dict[str, int]  # label -> kept rows, every label of the contract; empty for generation
    tokens: TokenLengths | None  # None: no tokenizer was given

    def __post_init__(self) -> None:
        assert self.rows_in == self.kept + sum(self.rejected.values())


@dataclass(frozen=True)
class Verdict:
    """What was found in a task's data and whether it may be learned."""

    task: str
    version: str
    splits: dict[str, SplitCounts]  # train, validation, test
    leaks: dict[str, int]  # "train in test" -> rows of train left out because test has their text
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason code -> first places, "file line n"
    problems: list[str] = field(default_factory=list)  # each fails the data; empty: passed
    warnings: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the data may be learned."""
        return not self.problems

    @property
    def rows_in(self) -> int:
        """Rows of all splits."""
        return sum(split.rows_in for split in self.splits.values())

    @property
    def kept(self) -> int:
        """Kept rows of all splits."""
        return sum(split.kept for split in self.splits.values())

    @property
    def rejected(self) -> dict[str, int]:
        """Rejected rows of all splits by reason code, most frequent first."""
        total: dict[str, int] = {}
        for split in self.splits.values():
            for code, number in split.rejected.items():
                total[code] = total.get(code, 0) + number
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))

    def to_dict(self) -> dict[str, Any]:
        """The verdict as plain JSON values."""
        return {**asdict(self), "passed": self.passed}

    def render(self) -> str:
        """The verdict as text for the task's owner."""
        lines = [f"Task {self.task}, contract version {self.version}", ""]
        lines += self._table() + self._rejections() + self._labels() + self._tokens() + self._leaks()
        lines += [f"Note: {warning}." for warning in self.warnings]
        lines += [f"Problem: {problem}." for problem in self.problems]
        if self.passed:
            lines.append(f"PASS: {self.kept:,} of {self.rows_in:,} rows are ready to be learned.")
        else:
            lines.append("FAIL: the task cannot be learned yet. Mend each problem above and check again.")
        return "\n".join(lines)

    def _table(self) -> list[str]:
        lines = [f"{'':12}{'rows in':>10}{'kept':>10}{'rejected':>10}{'cut':>8}"]
        for name, split in self.splits.items():
            rejected = sum(split.rejected.values())
            lines.append(f"{name:12}{split.rows_in:>10,}{split.kept:>10,}{rejected:>10,}{split.truncated:>8,}")
        return [*lines, ""]

    def _rejections(self) -> list[str]:
        lines = []
        if self.rejected:
            lines.append("Rejected rows, and why:")
        for code, number in self.rejected.items():
            places = "; ".join(self.examples.get(code, ()))
            lines.append(f"{number:>8,}  {explain(code)} [{code}]" + (f"; first: {places}" if places else ""))
        warned: dict[str, int] = {}
        for split in self.splits.values():
            for code, number in split.warned.items():
                warned[code] = warned.get(code, 0) + number
        if warned:
            lines.append("Kept, but look at them:")
        lines += [f"{number:>8,}  {explain(code)} [{code}]" for code, number in warned.items()]
        if sum(split.truncated for split in self.splits.values()):
            lines.append("Cut rows were longer than limits.max_tokens; the end of their longest column was left out.")
        return [*lines, ""] if lines else []

    def _labels(self) -> list[str]:
        if not any(split.labels for split in self.splits.values()):
            return []
        lines = ["Label balance (kept rows):"]
        for name, split in self.splits.items():
            shares = [f"{label} {n:,} ({n / max(split.kept, 1):.0%})" for label, n in split.labels.items()]
            lines.append(f"  {name:12}" + ", ".join(shares))
        return [*lines, ""]

    def _tokens(self) -> list[str]:
        if any(split.tokens is None and split.kept for split in self.splits.values()):
            return ["Token lengths: not checked, because no backbone was named.", ""]
        lines = ["Token lengths (prompt and answer, kept rows):"]
        for name, split in self.splits.items():
            if split.tokens is not None:
                t = split.tokens
                lines.append(f"  {name:12}shortest {t.min}, half below {t.median}, 95% below {t.p95}, longest {t.max}")
        return [*lines, ""]

    def _leaks(self) -> list[str]:
        if not self.leaks:
            return ["Leaks: none; no text is in two splits.", ""]
        found = ", ".join(f"{number:,} {where}" for where, number in self.leaks.items())
        return [f"Leaks: {found}; those rows are left out, so that the model is judged on text it has not seen.", ""]


class DataRejected(UserError):
    """The data does not keep its contract; `verdict` has the counts, `quarantine` names the file of rejected rows."""

    def __init__(self, verdict: Verdict, quarantine: Path | None = None):
        listed = f" (the rejected rows are listed in {quarantine})" if quarantine else ""
        super().__init__(f"task {verdict.task}: " + "; ".join(verdict.problems) + listed)
        self.verdict = verdict
        self.quarantine = quarantine

    def __reduce__(self):
        return DataRejected, (self.verdict, self.quarantine)  # it travels between ranks


def judge(
    contract: TaskContract, splits: dict[str, SplitCounts], leaks: dict[str, int], examples: dict[str, list[str]]
) -> Verdict:
    """Hold the counts against the contract's limits."""
    found = Verdict(contract.task, contract.version, splits, leaks, examples)
    limits = contract.limits
    problems = []
    rejected = found.rows_in - found.kept
    if rejected > limits.max_rejected_fraction * found.rows_in:
        why = ", ".join(f"{number:,} {code}" for code, number in found.rejected.items())
        problems.append(
            f"{rejected:,} of {found.rows_in:,} rows were rejected ({rejected / found.rows_in:.1%}; {why}), and the "
            f"contract allows {limits.max_rejected_fraction:.1%}: mend the data or raise limits.max_rejected_fraction"
        )
    for name, split in splits.items():
        needed = getattr(limits.min_rows, name)
        if split.kept < needed:
            problems.append(
                f"{name} has {split.kept:,} usable rows and needs {needed:,}: add data or lower limits.min_rows.{name}"
            )
    warnings = [
        f"no row of {name} has the label {label!r}; check the label's spelling, or add rows"
        for name, split in splits.items()
        for label, number in split.labels.items()
        if not number
    ]
    return Verdict(contract.task, contract.version, splits, leaks, examples, problems, warnings)
