"""The README's commands, run as written on a tiny backbone (the two make commands are shown on a fresh clone)."""

import csv
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.helpers import make_task, save_backbone

ROOT = Path(__file__).resolve().parents[1]
DEMO_TASKS = ("product_reviews", "tweets", "movie_reviews", "editorials")


def readme_commands() -> list[str]:
    """Every indented line of the README that starts a job, in order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^ {4,}((?:python|deepspeed) jobs/.+)$", text, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout after `python jobs/demo.py`, with a tiny backbone and tiny data."""
    place = tmp_path_factory.mktemp("readme")
    for name in ("jobs", "pipeline", "deepspeed_configs"):
        (place / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "data_contracts", place / "data_contracts")
    for contract in (place / "data_contracts" / "tasks").glob("*.yaml"):  # the tiny tokenizer cuts words finer
        contract.write_text(contract.read_text().replace("max_answer_tokens: 4", "max_answer_tokens: 12"))
    save_backbone(place / "demo" / "backbone")
    for task in DEMO_TASKS:
        make_task(place / "demo" / "data", task, rows={"train": 60, "validation": 24, "test": 24})
    make_task(place / "source", "tickets", rows={"train": 400, "validation": 1, "test": 1})
    rows = pq.read_table(place / "source" / "tickets" / "train.parquet").to_pylist()
    write_csv(place / "tickets.csv", [("ticket", "message", "team"), *((r["id"], r["text"], r["label"]) for r in rows)])
    write_csv(place / "new.csv", [("text",), *((row["text"],) for row in rows[:9]), ("",)])
    return place


def write_csv(path: Path, rows: list[tuple[str, ...]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def run(command: str, place: Path) -> str:
    """Run one command line in `place`; returns its output, fails with it on another exit code than 0."""
    with socket.socket() as free:  # other tests may launch at the same time
        free.bind(("127.0.0.1", 0))
        command = command.replace("deepspeed ", f"deepspeed --master_port {free.getsockname()[1]} ", 1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        shlex.split(command),
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, f"{command}\n{output}"
    return output


@pytest.mark.timeout(600)
def test_readme_commands_work_in_the_order_they_stand(place: Path) -> None:
    outputs = {}
    for command in readme_commands():
        outputs[command.split()[1] + " " + command.split()[2]] = run(command, place)
        if " draft " in command:  # step 2: fill in the marked lines
            contract = (place / "tickets.yaml").read_text(encoding="utf-8")
            assert contract.count("# OWNER") == 5
            (place / "tickets.yaml").write_text(
                re.sub(r'^(\w+): ""', lambda line: f"{line[1]}: internal", contract, flags=re.MULTILINE),
                encoding="utf-8",
            )
    assert "PASS" in outputs["jobs/onboard.py check"]
    assert "ACC" in outputs["jobs/continual.py --stream"] and "zero_shot" in outputs["jobs/continual.py --stream"]
    assert "10 rows in, 9 answered, not answered: 1 empty_text" in outputs["jobs/predict.py --work-dir"]
    assert pq.read_table(place / "answers.parquet")["answer"].to_pylist()[:9] != [None] * 9
    (line,) = [line for line in outputs["jobs/evaluate.py --work-dir"].splitlines() if line.startswith("  tweets")]
    now, recorded = line.split()[-2:]
    assert now == recorded, "the recomputed score is the recorded one"


def test_readme_names_six_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^\d\. \[([\w/.]+)\]\(([\w/.]+)\)", text, flags=re.MULTILINE)
    assert len(named) == 6
    assert all(label == path and (ROOT / path).is_file() for label, path in named)
