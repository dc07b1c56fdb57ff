"""Stage 1: a contract and its files become clean rows, or a verdict that says why not."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from data_contracts import TaskContract, UserError, load_contract
from data_contracts.contract import refuse_silent_change
from pipeline.config import StreamConfig
from pipeline.data.ingest import CleanTask, ingest, source_digests
from pipeline.data.tokens import shard_digest, tokenizer_digest
from pipeline.tracking.history import History


@dataclass(frozen=True)
class ValidatedTask:
    """A contract with the name of its token shards; `clean` is None where the shards of these very inputs exist
    already.
    """

    contract: TaskContract
    shards: Path
    clean: CleanTask | None


def validate(
    contract_path: str,
    config: StreamConfig,
    tokenizer: PreTrainedTokenizerFast,
    history: History,
    folder: Path | None = None,
    files: dict[str, str] | None = None,
) -> ValidatedTask:
    """Check one contract and its data. `folder` takes shards and quarantine (default: the work_dir); `files` are the
    digests of the data files, where they are known already.

    Raises UserError for a contract or data that cannot be used, a retired task, rejected rows past the contract's
    limit (quarantine and counts are written by then), or labels or prompt that changed under a version learned before.
    """
    contract = load_contract(contract_path)
    refuse_retired(contract, history)
    for entry in history.of_task(contract.task):
        refuse_silent_change(
            contract,
            version=entry.contract.version,
            labels=entry.contract.labels,
            prompt=entry.contract.prompt,
            learned_as=f"increment {entry.increment}",
        )
    roots = list(config.data_roots)
    files = source_digests(contract, roots) if files is None else files
    digest = shard_digest(contract.digest, files, tokenizer_digest(tokenizer))
    folder = config.work_path() if folder is None else folder
    shards = folder / "prepared" / contract.task / digest
    if (shards / "meta.json").is_file():
        return ValidatedTask(contract, shards, None)
    clean = ingest(contract, roots, tokenizer=tokenizer, quarantine_dir=folder / "quarantine")
    return ValidatedTask(contract, shards, clean)


def refuse_retired(contract: TaskContract, history: History) -> None:
    """Raise UserError for a task that was withdrawn and comes back as it was: its data was to go."""
    number = history.retired.get(contract.task)
    versions = [entry.contract.version for entry in history.of_task(contract.task) if entry.increment < (number or 0)]
    if contract.version in versions:
        raise UserError(
            f"task '{contract.task}' was withdrawn (increment {number}); take its contract out of the stream, or, to "
            "learn it anew, give the contract a new version"
        )


def check_task_names(contracts: list[TaskContract]) -> None:
    """Raise UserError when two contracts of a stream carry the same task name."""
    seen: set[str] = set()
    for contract in contracts:
        if contract.task in seen:
            raise UserError(f"two contracts of the stream name the task '{contract.task}'; give each its own name")
        seen.add(contract.task)
