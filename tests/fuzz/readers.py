"""One fuzzer a reader: each makes an input, reads it, and asserts what must hold. Allowed outcomes are a result or a
UserError in a readable sentence; any other exception is a find.
"""

import csv
import io
import json
import math
import os
import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import save

from data_contracts import UserError, load_contract
from data_contracts.contract import TaskContract
from data_contracts.sources import resolve_source
from data_contracts.template import parse_template
from pipeline.config import load_stream
from pipeline.data.ingest import examine
from pipeline.experts.bank import Bank, file_bytes
from pipeline.experts.peft_format import from_peft
from pipeline.files import sha256_bytes
from pipeline.tracking.chain import load_chain, publish
from pipeline.tracking.manifest import Manifest
from pipeline.tracking.outbox import Outbox, read_outbox
from pipeline.training.adapter_folder import read_adapter
from tests.fuzz.inputs import NAMES, PATTERNS, PROMPTS, TEXTS, broken, mutated, scalar, value
from tests.tracking.conftest import manifest_fields, stage

CONTRACT = {
    "task": "reviews",
    "version": "1.0.0",
    "owner": "team",
    "description": "what it is",
    "kind": "classification",
    "language": "en",
    "source": {
        "format": "csv",
        "train": ["rows.csv"],
        "validation": {"from": "train", "fraction": 0.2},
        "test": {"from": "train", "fraction": 0.2},
    },
    "columns": {"id": "id", "text": "text", "answer": "answer"},
    "prompt": "Review: {text}\nAnswer:",
    "labels": {"good": " good", "bad": " bad"},
    "metric": "accuracy",
    "limits": {"max_rejected_fraction": 1.0, "min_rows": {"train": 1, "validation": 1, "test": 1}},
    "rules": [{"column": "text", "check": "min_length", "value": 2}],
    "licence": "none",
    "sensitivity": "public",
}
STREAM = {
    "stream": "fuzz",
    "work_dir": "work",
    "data_roots": ["data"],
    "backbone": {"path": "backbone", "dtype": "float32"},
    "tasks": ["a.yaml", "b.yaml"],
    "method": {"name": "moe_cl", "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}},
    "training": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3},
    "gate": {"max_regression": 0.02, "min_metric": {"a": 0.5}},
    "tracking": {"uri": "http://host:5000"},
}
SHAPES = {"model.layers.0.mlp.up_proj.lora_A": (2, 4), "model.layers.0.mlp.up_proj.lora_B": (6, 2)}
# 9 times 7^9 values in half a kilobyte
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 7)}]\n" for before, name in pairwise("abcdefghij")
)
BOMBS = [
    LAUGHS,
    LAUGHS + "task: *j\nprompt: *j\n",
    LAUGHS + "method: {name: *j}\n",
    LAUGHS + "method: *j\ntasks: *j\nseed: *j\ngate: {min_metric: *j}\nstart_from: *j\n",
    "task: &t [*t]\n",
    "a: &a {b: *a}\n",
    "[" * 3000,
    "{a: " * 2000,
    "- " * 3000,
    "task: !!python/object/apply:os.system ['touch pwned']\n",
    "task: !!python/name:os.system\n",
    "? [a, b]\n: c\n",
    "<<: [a]\n",
    "<<: &a {<<: *a}\n",
    "x: 2020-13-45\n",
    "x: 99999999999999999999-01-01\n",
    "x: 1" + "0" * 5000 + "\n",
    "x: 0x" + "f" * 5000 + "\n",
    "x: 1:" + "60:" * 3000 + "1\n",
    "x: !!binary '====='\n",
    "x: !!int 'a'\n",
    "x: !!float 'a'\n",
    "x: !!timestamp 'a'\n",
    "x: !!set [a]\n",
    "1: 2\nnull: 3\ntrue: 4\n",
    "task: \x00",
    "--- a\n--- b\n",
    "%YAML 9.9\n---\na: b\n",
    "&a *a",
    "\t",
    "",
]


def _yaml_bytes(rng: random.Random, whole: dict) -> bytes:
    kind = rng.random()
    if kind < 0.08:
        return rng.choice(BOMBS).encode()
    content = whole
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        content = mutated(rng, content)
    try:
        text = yaml.safe_dump(content, allow_unicode=rng.random() < 0.5, sort_keys=False)
    except (yaml.YAMLError, UnicodeError):
        text = json.dumps(content)
    if kind < 0.15:
        text = text.replace("\n", "\n" + rng.choice(BOMBS), 1)
    data = text.encode("utf-8", "surrogatepass")
    return broken(rng, data) if kind > 0.7 else data


def contract(rng: random.Random, folder: Path) -> None:
    """A contract file: a contract whose digest can be taken, or a refusal that names the file."""
    path = folder / "contract.yaml"
    path.write_bytes(_yaml_bytes(rng, CONTRACT))
    try:
        read = load_contract(path)
    except UserError as error:
        assert str(path) in str(error)
        raise
    assert re.fullmatch("[0-9a-f]{64}", read.digest)
    assert re.fullmatch(r"[a-z][a-z0-9_]{0,62}", read.task)


def stream(rng: random.Random, folder: Path) -> None:
    """A stream file with overrides."""
    path = folder / "stream.yaml"
    path.write_bytes(_yaml_bytes(rng, STREAM) if rng.random() < 0.8 else yaml.safe_dump(STREAM).encode())
    keys = [
        "training.epochs",
        "stream",
        "method.lora.rank",
        "tasks.0",
        "gate",
        "a.b.c",
        "training.epochs.x",
        "",
        "seed",
    ]
    overrides = []
    if rng.random() < 0.3:
        text = rng.choice([str(scalar(rng)), rng.choice(BOMBS), rng.choice(TEXTS)])
        overrides.append(f"{rng.choice(keys)}={text}")
    read = load_stream(path, overrides)
    assert re.fullmatch(r"[a-z][a-z0-9_]{0,62}", read.stream)
    json.dumps(read.model_dump(mode="json"), allow_nan=False).encode("utf-8")


def template(rng: random.Random, folder: Path) -> None:
    """A prompt: literal text and column names, which by hand put together again are the prompt."""
    text = rng.choice(PROMPTS)
    for _ in range(rng.randrange(3)):
        place = rng.randrange(len(text) + 1)
        text = (
            text[:place] + rng.choice(["{", "}", "{{", "text", ".", "[", "!r", ":x", "0", "\x00", "é"]) + text[place:]
        )
    parts = parse_template(text)
    again = lambda literal: literal.replace("{", "{{").replace("}", "}}")  # noqa: E731
    whole = "".join(again(literal) + ("" if name is None else f"{{{name}}}") for literal, name in parts)
    assert whole == text
    assert not any(set(name) & set(".[]!:{}") or name.isdigit() or not name for _, name in parts if name is not None)


def pattern(rng: random.Random, folder: Path) -> None:
    """A source pattern: what it gives lies below the root, links followed."""
    root, outside = folder / "root", folder / "outside"
    if not root.is_dir():
        root.mkdir()
        outside.mkdir()
        (root / "rows.csv").write_text("id\n1\n")
        (outside / "secret.csv").write_text("id\n1\n")
        (root / "link.csv").symlink_to(outside / "secret.csv")
        (root / "linked_folder").symlink_to(outside)
        (root / "link").symlink_to("/etc")
        os.mkfifo(root / "fifo")
    text = rng.choice(PATTERNS)
    kind = rng.random()
    if kind < 0.3:
        text = rng.choice(["./", "sub/../", f"{root}/", f"{outside}/", f"{root}/../outside/", "**/", "*/"]) + text
    elif kind < 0.5:
        place = rng.randrange(len(text) + 1)
        text = (
            text[:place] + rng.choice(["*", "?", "[", "]", "/", "..", "\x00", "::", "://", "%2e", "\\"]) + text[place:]
        )
    for found in resolve_source(text, [root]):
        assert Path(found).resolve().is_relative_to(root.resolve()) and Path(found).is_file()


def data(rng: random.Random, folder: Path) -> None:
    """Files of rows, mixed schemas and broken bytes among them: every row is kept or rejected with a reason."""
    for path in folder.glob("rows*"):
        path.unlink()
    kind = rng.choice(["csv", "jsonl", "parquet"])
    files = [_rows_file(rng, folder / f"rows{i}.{kind}", kind) for i in range(rng.choice([1, 1, 2]))]
    settings = CONTRACT | {"source": CONTRACT["source"] | {"format": kind, "train": [f"rows*.{kind}"]}}
    if rng.random() < 0.3:
        settings = settings | {"kind": "generation", "metric": "rouge_l", "labels": None}
    if rng.random() < 0.2:
        settings = settings | {"columns": {"text": "text", "answer": "answer"}}
    quarantine = folder / "quarantine"
    task = examine(TaskContract.model_validate(settings), [folder], quarantine_dir=quarantine)
    counts = task.verdict
    kept = sum(split.num_rows for split in task.splits.values())
    rejected = pq.read_table(task.quarantine).num_rows if task.quarantine else 0
    assert counts.kept == kept and counts.rows_in == kept + rejected
    if all(number is not None for number in files):
        assert counts.rows_in == sum(files), f"{sum(files)} rows were written, {counts.rows_in} are counted"
    for split in task.splits.values():
        split.validate(full=True)
    if task.quarantine:
        assert task.quarantine.is_relative_to(quarantine)


def _rows_file(rng: random.Random, path: Path, kind: str) -> int | None:
    """Write a file of rows; how many there are by the writer's own count, None where its bytes were broken."""
    names = ["id", "text", "answer"]
    if rng.random() < 0.25:
        names = [rng.choice([*names, *NAMES]) for _ in range(rng.randrange(5))]
        names += [name for name in ("id", "text", "answer") if name not in names and rng.random() < 0.8]
    number = rng.choice([0, 1, 5, 40])
    row = lambda i: {  # noqa: E731
        name: {"id": f"r{i}", "text": f"the words of row {i}", "answer": rng.choice(["good", "bad"])}.get(name, "x")
        if rng.random() < 0.9
        else (rng.choice(TEXTS) if kind == "csv" else value(rng))
        for name in names
    }
    rows = [row(i) for i in range(number)]
    if kind == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator=rng.choice(["\n", "\r\n"]))
        writer.writerow(names)
        for entry in rows:
            writer.writerow([entry[name] for name in names])
        content = out.getvalue().encode("utf-8", "surrogatepass")
        if len(names) == 1 or any("\r" in text or text == "" for entry in rows for text in entry.values()):
            number = None  # a line that is blank is no row, and Python's csv does not quote a lone carriage return
    elif kind == "jsonl":
        lines = [json.dumps(entry, ensure_ascii=rng.random() < 0.5) for entry in rows]
        content = "".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass")
        if rng.random() < 0.4:
            content = broken(rng, content)
        path.write_bytes(content)
        return sum(bool(line.strip()) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
    else:
        columns = {}
        for name in dict.fromkeys(names):
            values = [entry[name] for entry in rows]
            try:
                columns[name] = pa.array(values)
                pq.write_table(pa.table({"x": columns[name]}), path)
            except (pa.ArrowException, OverflowError, UnicodeError, TypeError):
                texts = [str(item).encode("utf-8", "surrogatepass") for item in values]
                columns[name] = pa.array(texts, pa.binary())
        table = pa.table(columns)
        if len(set(names)) < len(names) and names:
            table = table.append_column(names[0], table.column(names[0]))
        pq.write_table(table, path)
        content, number = path.read_bytes(), table.num_rows
    if rng.random() < 0.3:
        content, number = broken(rng, content), None
    path.write_bytes(content)
    return number


def adapter(rng: random.Random, folder: Path) -> None:
    """A PEFT folder: tensors of the shapes asked for, finite, or a refusal."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"], "bias": "none"}
    start = "base_model.model.model.layers.0.mlp.up_proj"
    shapes = {f"{start}.lora_A.weight": (2, 4), f"{start}.lora_B.weight": (6, 2)}
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    kind = rng.randrange(6)
    name = rng.choice(list(tensors))
    if kind == 0:
        tensors[name] = torch.ones(rng.choice([(), (0,), (2,), (2, 0), (4, 2), (3, 3), (2, 4, 1), (1, 4), (6, 3)]))
    elif kind == 1:
        types = [
            torch.int64,
            torch.bool,
            torch.float16,
            torch.bfloat16,
            torch.float64,
            torch.uint8,
            torch.float8_e4m3fn,
        ]
        tensors[name] = tensors[name].to(rng.choice(types))
    elif kind == 2:
        tensors[name][0, 0] = rng.choice([math.nan, math.inf, -math.inf, 3e38])
    elif kind == 3:
        tensors[rng.choice([*NAMES, f"{start}.lora_A.bias", "x" * 1000]) or "e"] = torch.ones(1)
    elif kind == 4:
        del tensors[name]
    metadata = (
        {"perennial": rng.choice(["{", "[]", '{"backbone": 1}', "{}", "[" * 5000])} if rng.random() < 0.3 else None
    )
    content = save(tensors, metadata)
    if rng.random() < 0.3:
        content = broken(rng, content)
    if rng.random() < 0.05:
        content = (2**63 - 1).to_bytes(8, "little") + content[8:]
    (folder / "adapter_model.safetensors").write_bytes(content)
    text = json.dumps(mutated(rng, config) if rng.random() < 0.6 else config).encode("utf-8", "surrogatepass")
    text = rng.choice([b"[" * 100_000, b"\xff", b"", b"null"]) if rng.random() < 0.05 else text
    (folder / "adapter_config.json").write_bytes(broken(rng, text) if rng.random() < 0.2 else text)
    read = read_adapter(folder)
    found = from_peft(read.config, read.tensors, SHAPES, 2.0)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == SHAPES
    assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in found.values())


def chain(rng: random.Random, folder: Path) -> None:
    """champion.json, a manifest or both, changed: the chain that was published, or a refusal."""
    work_dir = folder / "work"
    if not work_dir.is_dir():
        manifest = Manifest(**manifest_fields(files={"row.json": sha256_bytes(b"[0.75]")}))
        publish(work_dir, stage(work_dir, manifest, {"row.json": "[0.75]"}), manifest)
    names = ["champion.json", "increments/0001-product_reviews/manifest.json"]
    whole = {name: (work_dir / name).read_bytes() for name in names}
    expected = load_chain(work_dir)
    name = rng.choice(names)
    content = json.loads(whole[name])
    text = json.dumps(mutated(rng, content), separators=(",", ":"), sort_keys=True).encode("utf-8", "surrogatepass")
    text = rng.choice([broken(rng, whole[name]), text, text, b"[" * 100_000, b'{"head":' * 5000])
    try:
        (work_dir / name).write_bytes(text)
        read = load_chain(work_dir)
        assert text == whole[name] and read == expected
    finally:
        (work_dir / name).write_bytes(whole[name])


def bank(rng: random.Random, folder: Path) -> None:
    """A bank file under its own digest with changed bytes: it is what it was, or refused."""
    content = file_bytes({"a.lora_A": torch.ones(2, 3), "b": torch.zeros(1)}, {"role": "x"})
    sha = sha256_bytes(content)
    store = Bank(folder / "bank")
    store.root.mkdir(exist_ok=True)
    changed = broken(rng, content)
    name = rng.choice([sha, sha, sha, sha.upper(), "../" + sha, "", "x" * 64, sha + "\n"])
    store.path(sha).write_bytes(changed)
    tensors = store.get(name)
    assert changed == content and name == sha and sorted(tensors) == ["a.lora_A", "b"]


def outbox(rng: random.Random, folder: Path) -> None:
    """Files of the outbox: each is an event or named as none, and a launch can open it."""
    box = Outbox(folder, "sqlite:///x")
    event = box.append("metrics", {"step": 1, "values": {"loss": 1.0}})
    path = box.folder / f"{event.sequence:010d}.json"
    content = path.read_bytes()
    text = json.dumps(mutated(rng, json.loads(content))).encode("utf-8", "surrogatepass")
    text = rng.choice([broken(rng, content), text, text, b"[" * 100_000, b"\xff", b""])
    path.write_bytes(text)
    events, damaged = read_outbox(folder)
    assert len(events) + len(damaged) == 1
    again = Outbox(folder, "sqlite:///x")
    assert len(again) == len(events)
    for path in box.folder.iterdir():
        path.unlink()


READERS: dict[str, tuple[Callable[[random.Random, Path], None], int]] = {  # with its share of the inputs
    "contract": (contract, 5),
    "stream": (stream, 3),
    "template": (template, 2),
    "pattern": (pattern, 2),
    "data": (data, 4),
    "adapter": (adapter, 3),
    "chain": (chain, 3),
    "bank": (bank, 2),
    "outbox": (outbox, 1),
}
