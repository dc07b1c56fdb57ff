"""The clock of a start, and imports without garbage collection."""

import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.startup import StartClock, imports_without_collections, process_began

ROOT = Path(__file__).resolve().parents[1]
# what learning a first step needs none of; rank 0 or the end of an increment does
LATE = ("sklearn", "matplotlib", "nltk", "rouge_score", "rich")


def test_a_process_began_when_it_was_started():
    before = time.time()
    code = "from pipeline.startup import process_began; print(process_began())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert before - 0.05 <= float(done.stdout) <= time.time()
    assert process_began() < before


def test_phases_follow_one_another_up_to_the_end_of_the_first_step(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("pipeline.startup.process_began", lambda: 90.0)
    monkeypatch.setattr("pipeline.startup.time.time", lambda: now[0])
    clock = StartClock()
    clock.passed("imports")
    now[0] = 104.0
    clock.passed("engine")
    now[0] = 110.0
    clock.stop(step_seconds=2.5)
    assert not clock.running
    parts = [["imports", 10.0], ["engine", 4.0], ["opening", 3.5], ["first step", 2.5]]
    assert clock.record() == {"began": 90.0, "phases": parts}
    assert clock.line() == (
        "first step done 20.0 s after the process began: imports 10.0, engine 4.0, opening 3.5, first step 2.5"
    )


def test_garbage_is_not_collected_while_packages_are_imported_and_is_again_afterwards():
    with pytest.raises(ImportError), imports_without_collections():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    gc.unfreeze()


def test_a_start_imports_nothing_that_only_the_end_of_an_increment_needs():
    code = f"import sys, json, pipeline.continual; print(json.dumps([m for m in {LATE} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout.splitlines()[-1]) == []
