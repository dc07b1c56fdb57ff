"""The manners of STYLE that a machine can check."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("data_contracts", "pipeline", "jobs", "tests")
LONGEST = 400  # lines a file may have


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_ruff_finds_nothing(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_is_longer_than_the_limit():
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for folder in CODE
        for file in (ROOT / folder).rglob("*.py")
    }
    assert lengths, "no code was found"
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


def test_every_command_runs_from_a_checkout_that_is_not_installed():
    commands = sorted((ROOT / "jobs").glob("*.py"))
    assert len(commands) > 10
    for command in commands:
        before_imports = command.read_text(encoding="utf-8").partition("\nfrom data_contracts")[0]
        assert "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))" in before_imports, command.name
