"""Whatever is read from outside becomes a result or a refusal in words. `make fuzz` is the long version."""

import csv
import string

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_contracts import UserError, load_contract
from data_contracts.contract import TaskContract
from data_contracts.sources import resolve_source
from data_contracts.template import parse_template
from data_contracts.yaml_text import parse_yaml
from pipeline.config import load_stream
from pipeline.data.ingest import examine
from pipeline.experts.peft_format import from_peft
from pipeline.placement.architecture import load_architecture
from pipeline.training.adapter_folder import read_adapter
from tests.fuzz.driver import run
from tests.fuzz.readers import CONTRACT, LAUGHS, READERS, SHAPES, STREAM

few = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_takes_or_refuses_what_it_is_given(reader):
    result = run(reader, 40, seed=0)
    assert result.finds == {}
    assert result.taken + result.refused == 40


# What the fuzzer has found, each as it was mended.


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("owner: 2020-13-45\n", "month must be in 1..12"),
        ("owner: !!timestamp 'a'\n", "not of the kind"),
        ("owner: !!int 'a'\n", "not of the kind"),
        ("owner: !!float 'a'\n", "not of the kind"),
        ("owner: 1" + "0" * 5000 + "\n", "4300 digits"),
        ("owner: 0x" + "f" * 5000 + "\n", "more than 64 bits"),
        ("owner: 9223372036854775808\n", "more than 64 bits"),
        ("[" * 1200, "nested too deeply"),
        ("{a: " * 2000, "nested too deeply"),
    ],
)
def test_yaml_that_its_parser_chokes_on_is_refused_in_a_contract_a_stream_and_an_override(tmp_path, text, said):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    for read in (load_contract, load_stream):
        with pytest.raises(UserError, match=said) as raised:
            read(path)
        assert str(path) in str(raised.value)
    path.write_text(yaml.safe_dump(STREAM))
    with pytest.raises(UserError, match=said):
        load_stream(path, ["seed=" + text.removeprefix("owner: ")])
    assert parse_yaml("9223372036854775807") == 2**63 - 1


def test_a_small_file_of_aliases_that_stands_for_400_million_values_is_refused_at_once(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(LAUGHS + "task: *j\nprompt: *j\n")
    with pytest.raises(UserError) as raised:
        load_contract(path)
    assert len(str(raised.value)) < 2000
    path.write_text(
        yaml.safe_dump({k: v for k, v in STREAM.items() if k != "method"}) + LAUGHS + "method: {name: *j}\n"
    )
    with pytest.raises(UserError) as raised:
        load_stream(path)
    assert len(str(raised.value)) < 2000


def test_a_stream_file_of_two_megabytes_is_not_read(tmp_path):
    (tmp_path / "stream.yaml").write_text("#" * 2_000_000)
    with pytest.raises(UserError, match="too large for a stream"):
        load_stream(tmp_path / "stream.yaml")


@pytest.mark.parametrize("pattern", ["a/" * 2000, "x" * 5000, "*/" * 101])
def test_a_pattern_longer_than_any_path_is_refused(tmp_path, pattern):
    with pytest.raises(UserError, match="shorter name"):
        resolve_source(pattern, [tmp_path])


def test_json_nested_too_deeply_is_refused_wherever_json_is_read(tmp_path):
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read"):
        read_adapter(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not valid JSON"):
        load_architecture(str(tmp_path))


@pytest.mark.parametrize("changes", [{"lora_alpha": 10**400}, {"r": 10**400}, {"lora_alpha": 1e300}])
def test_an_adapter_whose_scale_is_no_number_is_refused(changes):
    start = "base_model.model.model.layers.0.mlp.up_proj"
    tensors = {f"{start}.lora_A.weight": torch.ones(2, 4), f"{start}.lora_B.weight": torch.ones(6, 2)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | changes
    with pytest.raises(UserError, match="positive numbers"):
        from_peft(config, tensors, SHAPES, 2.0)


# Claims about all inputs.


@few
@given(st.text(max_size=40))
def test_a_prompt_is_its_literals_and_plain_names_or_refused(text):
    try:
        parts = parse_template(text)
    except UserError:
        return
    braces = str.maketrans({"{": "{{", "}": "}}"})
    assert text == "".join(a.translate(braces) + ("" if b is None else f"{{{b}}}") for a, b in parts)


@few
@given(st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=8), st.text(".[]!", min_size=1))
def test_a_prompt_field_that_reaches_into_its_value_is_always_refused(name, reach):
    for field in (f"{name}{reach}", f"{name}.__class__", f"{name}[0]", f"{name}!r", f"{name}:>9", "0", ""):
        with pytest.raises(UserError):
            parse_template("{" + field + "}")


@few
@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_no_contract(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bytes\.yaml"):
        load_contract(path)


cells = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@few
@given(st.lists(st.tuples(cells, cells, cells), max_size=12), st.sampled_from(["csv", "parquet"]))
def test_every_row_of_a_file_is_kept_or_quarantined_and_a_formula_is_only_text(tmp_path_factory, rows, kind):
    """Rows in are counted by the test's own writer; `=1+1` and the like come out as they went in."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [(f"i{n}{a}", f"=1+1 {b}", c) for n, (a, b, c) in enumerate(rows)]
    if kind == "csv":
        rows = [tuple(cell.replace("\r", " ") for cell in row) for row in rows]
        with open(folder / "rows.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("id", "text", "answer"), *rows])
    else:
        columns = zip(*rows, strict=True) if rows else ([], [], [])
        arrays = [pa.array(list(column), pa.string()) for column in columns]
        pq.write_table(pa.table(arrays, names=["id", "text", "answer"]), folder / "rows.parquet")
    source = CONTRACT["source"] | {"format": kind, "train": [f"rows.{kind}"]}
    task = examine(TaskContract.model_validate(CONTRACT | {"source": source}), [folder], quarantine_dir=folder / "q")
    kept = [text for split in task.splits.values() for text in split.column("text").to_pylist()]
    rejected = pq.read_table(task.quarantine).num_rows if task.quarantine else 0
    assert task.verdict.rows_in == len(rows) == len(kept) + rejected
    assert all(text.startswith("=1+1") for text in kept)
