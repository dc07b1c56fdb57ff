"""Mistakes in contracts and in the data they name."""

import shutil
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.helpers import make_task
from tests.jobs.mistakes import ROWS, Place, mistake

# ---- contracts


@mistake("alone.yaml", "No such file")
def missing_contract(at: Place) -> list[str]:
    arguments = at.stream()
    (at.root / "alone.yaml").unlink()
    return arguments


@mistake("alone.yaml", "task", "'../../elsewhere'")
def task_name_with_a_path(at: Place) -> list[str]:
    return at.stream(at.task(task="../../elsewhere"))


@mistake("alone.yaml", "ownr", "not a field of a contract")
def unknown_contract_field(at: Place) -> list[str]:
    return at.stream(at.task(ownr="somebody"))


@mistake("labels changed under version 1.0.0", "increment 1", "raise the contract's version")
def labels_changed_under_the_same_version(at: Place) -> list[str]:
    return _first_changed(at, labels={"negative": " no", "neutral": " so", "positive": " yes"})


@mistake("prompt changed under version 1.0.0", "increment 1", "raise the contract's version")
def prompt_changed_under_the_same_version(at: Place) -> list[str]:
    return _first_changed(at, prompt="{text}\nVerdict:")


def _first_changed(at: Place, **changes: Any) -> list[str]:
    inputs = at.learned.inputs
    shutil.copytree(at.learned.work_dir, at.work_dir)
    contract = yaml.safe_load(inputs.contract("first").read_text()) | changes
    changed = at.folder / "first.yaml"
    changed.write_text(yaml.safe_dump(contract))
    return at.stream_of(inputs.root, [changed])


# ---- data


@mistake("alone/train.parquet", "matches no file")
def missing_data_file(at: Place) -> list[str]:
    task = at.task()
    (at.root / "alone" / "train.parquet").unlink()
    return at.stream(task)


@mistake("nowhere", "matches no file")
def missing_data_root(at: Place) -> list[str]:
    return [*at.stream(), "--set", f"data_roots=[{at.folder / 'nowhere'}]"]


@mistake("outside the data roots")
def path_outside_the_roots(at: Place) -> list[str]:
    outside = make_task(at.folder / "outside", "alone", rows=ROWS).parent / "alone" / "train.parquet"
    return at.stream(at.task(source=at.source(train=[str(outside)])))


@mistake("'..'", "not allowed")
def path_that_climbs_out(at: Place) -> list[str]:
    return at.stream(at.task(source=at.source(train=["../outside/train.parquet"])))


@mistake("train.parquet", "outside the data roots")
def link_out_of_the_root(at: Place) -> list[str]:
    task = at.task()
    train = at.root / "alone" / "train.parquet"
    train.rename(at.folder / "train.parquet")
    train.symlink_to(at.folder / "train.parquet")
    return at.stream(task)


@mistake("'file::alone/train.parquet'", "not allowed")
def chained_protocol(at: Place) -> list[str]:
    return at.stream(at.task(source=at.source(train=["file::alone/train.parquet"])))


@mistake("task alone", "5 of 24 rows", "3 empty_text", "2 unknown_label", "max_rejected_fraction")
def too_many_bad_rows(at: Place) -> list[str]:
    task = at.task()
    path = at.root / "alone" / "train.parquet"
    rows = pq.read_table(path).to_pylist()
    for row in rows[:3]:
        row["text"] = "  "
    for row in rows[3:5]:
        row["label"] = "grand"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return at.stream(task)


@mistake("train has 12 usable rows and needs 50")
def too_few_rows(at: Place) -> list[str]:
    return at.stream(at.task(limits={"min_rows": {"validation": 1, "test": 1}}))


@mistake("'title'", "train.parquet")
def prompt_naming_a_missing_column(at: Place) -> list[str]:
    return at.stream(at.task(prompt="{title}: {text}\nAnswer:"))


@mistake("train.parquet", "not a readable parquet")
def unreadable_parquet(at: Place) -> list[str]:
    task = at.task()
    (at.root / "alone" / "train.parquet").write_bytes(b"PAR1 this is no table PAR1")
    return at.stream(task)


@mistake("train.parquet", "not a readable parquet")
def cut_off_parquet(at: Place) -> list[str]:
    task = at.task()
    path = at.root / "alone" / "train.parquet"
    path.write_bytes(path.read_bytes()[:-300])
    return at.stream(task)
