"""jobs/onboard.py as a task's owner uses it: from a CSV of one's own to a verdict."""

import csv
import importlib.util
import json
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ROOT / "jobs" / "onboard.py"
SPEC = importlib.util.spec_from_file_location("onboard", COMMAND)
onboard = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(onboard)
OWNED = {"owner": "me@example.com", "description": "d", "language": "en", "licence": "own", "sensitivity": "internal"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A newcomer's folder, which is the current one, with a CSV of 400 rows."""
    monkeypatch.chdir(tmp_path)
    with open("mine.csv", "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["text", "mood"])
        writer.writerows([f"sentence {i}, with a comma", ["sad", "glad"][i % 2]] for i in range(400))
    return tmp_path


def fill(contract: str) -> None:
    text = Path(contract).read_text(encoding="utf-8")
    for name, value in OWNED.items():
        text = re.sub(rf'^{name}: ""  # OWNER:.*$', f"{name}: {value}", text, flags=re.MULTILINE)
    Path(contract).write_text(text, encoding="utf-8")


def test_a_newcomer_comes_from_one_csv_to_a_passing_verdict(folder, capsys):
    assert onboard.main(["draft", "--data", "mine.csv", "--task", "moods", "--out", "moods.yaml"]) == 0
    assert "Fill in the lines marked OWNER" in capsys.readouterr().out
    assert onboard.main(["check", "moods.yaml"]) == 2
    assert "moods.yaml: owner: must not be empty (mend also description" in capsys.readouterr().out
    fill("moods.yaml")
    assert onboard.main(["check", "moods.yaml"]) == 0
    told = capsys.readouterr().out
    assert "PASS: 400 of 400 rows are ready to be learned." in told
    assert "Token lengths: not checked" in told


def test_the_command_runs_without_an_installation_and_ends_with_2_on_a_mistake(folder):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(COMMAND), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    done = run("check", "none.yaml")
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.startswith("none.yaml: cannot be read (No such file or directory); check the path\nFAIL")
    done = run("draft", "--data", "mine.csv", "--task", "../moods")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("task name '../moods' must be") and done.stderr.count("\n") == 1


def test_dirty_data_is_told_by_reason_and_place(folder, capsys):
    onboard.main(["draft", "--data", "mine.csv", "--task", "moods", "--out", "moods.yaml"])
    fill("moods.yaml")
    with open("mine.csv", "ab") as out:
        out.write(b"caf\xe9,sad\nfine,unheard\nSENTENCE  1, not quoted,sad\n" + b",sad\n" * 3)
    assert onboard.main(["check", "moods.yaml"]) == 2
    told = capsys.readouterr().out
    for piece in (
        "the text is not valid UTF-8 [invalid_utf8]; first: mine.csv line 402",
        "the answer is not one of the contract's labels [unknown_label]; first: mine.csv line 403",
        "[malformed]; first: mine.csv line 404",
        "3  the text is empty [empty_text]; first: mine.csv line 405; mine.csv line 406; mine.csv line 407",
        "Problem: 6 of 406 rows were rejected (1.5%",
        "FAIL: the task cannot be learned yet.",
    ):
        assert piece in told, told


def test_every_contract_is_told_also_after_one_that_failed(folder, capsys):
    onboard.main(["draft", "--data", "mine.csv", "--task", "moods", "--out", "moods.yaml"])
    fill("moods.yaml")
    assert onboard.main(["check", "none.yaml", "moods.yaml"]) == 2
    told = capsys.readouterr().out
    assert "FAIL: none.yaml" in told and "PASS: 400 of 400" in told


def test_a_backbone_counts_the_tokens(folder, capsys):
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained("backbone")
    onboard.main(["draft", "--data", "mine.csv", "--task", "moods", "--out", "moods.yaml"])
    fill("moods.yaml")
    assert onboard.main(["check", "moods.yaml", "--backbone", "backbone"]) == 0
    # Text : sentence 7 , with a comma Mood : + the label + the end of the answer
    assert "shortest 12, half below 12, 95% below 12, longest 12" in capsys.readouterr().out
    for nothing in ("none", str(folder)):
        assert onboard.main(["check", "moods.yaml", "--backbone", nothing]) == 2
        assert "backbone" in capsys.readouterr().err


def test_a_draft_never_overwrites_a_file(folder, capsys):
    Path("moods.yaml").write_text("mine")
    assert onboard.main(["draft", "--data", "mine.csv", "--task", "moods", "--out", "moods.yaml"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert Path("moods.yaml").read_text() == "mine"
    assert onboard.main(["draft", "--data", "mine.csv", "--task", "moods", "--out", "none/moods.yaml"]) == 2
    assert "none/moods.yaml cannot be written (No such file or directory); make its folder" in capsys.readouterr().err


def test_data_elsewhere_needs_its_folder_as_root(folder, capsys, monkeypatch):
    (folder / "work").mkdir()
    monkeypatch.chdir(folder / "work")
    assert onboard.main(["draft", "--data", "../mine.csv", "--task", "moods"]) == 2
    assert "outside the data roots" in capsys.readouterr().err
    assert onboard.main(["draft", "--data", "../mine.csv", "--task", "moods", "--root", ".."]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["source"]["train"] == ["mine.csv"]


def test_odcs_prints_a_valid_document(capsys):
    assert onboard.main(["odcs", str(ROOT / "data_contracts" / "tasks" / "product_reviews.yaml")]) == 0
    schema = json.loads((resources.files("open_data_contract_standard") / "schema.json").read_text(encoding="utf-8"))
    document = yaml.safe_load(capsys.readouterr().out)
    jsonschema.validate(document, schema)
    assert (document["apiVersion"], document["name"]) == ("v3.1.0", "product_reviews")
