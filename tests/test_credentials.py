"""Passwords: refused in what is configured, taken out of what is shown; no file and no output of a job holds one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_contracts.credentials import holds_password, shown
from data_contracts.errors import UserError
from jobs import audit as audit_command
from pipeline.config import TrackingConfig, override_config
from pipeline.lock import WorkLock
from pipeline.tracking.courier import short
from pipeline.tracking.mlflow_log import Tracker
from tests.helpers import stream_dict

ROOT = Path(__file__).resolve().parents[1]
CANARY = "c4n/ry@Horse"  # with the characters that a careless pattern stops at

CASES = [
    ("http://me:PW@host:5000", "http://me:***@host:5000"),
    ("https://PW@host/mlflow", "https://***@host/mlflow"),
    ("postgresql+psycopg2://me:PW@db:5432/mlflow", "postgresql+psycopg2://me:***@db:5432/mlflow"),
    ("postgresql://me@db/mlflow?sslmode=require&password=PW", "postgresql://me@db/mlflow?sslmode=require&password=***"),
    ("s3://id:PW@bucket/path", "s3://id:***@bucket/path"),
    ("HTTPS://PW@host/mlflow", "HTTPS://***@host/mlflow"),
    ("https://host/file?X-Amz-Signature=PW&part=1", "https://host/file?X-Amz-Signature=***&part=1"),
]
HARMLESS = [
    "http://host:5000/a@b",
    "http://[::1]:5000/a@b",
    "sqlite:////w/mlflow.db",
    "file:///home/a:b@c/runs",
    "postgresql://me@db/mlflow",
    "s3://bucket/a@b?versionId=3",
    "user@example.com: see http://host:5000, or mail me",
]


@pytest.mark.parametrize(("address", "expected"), CASES)
@pytest.mark.parametrize("password", ["canary", "can:ary", "can@ary", "can@a/ry", "ca/na@ry"])
def test_an_address_is_shown_without_its_password(address, expected, password):
    if "//PW" in address:
        password = "canary"  # a token has none of these signs
    assert shown(f"at {address.replace('PW', password)} now") == f"at {expected} now"


@pytest.mark.parametrize("address", HARMLESS)
def test_what_holds_no_password_is_shown_as_it_is(address):
    assert shown(address) == address and not holds_password(address)


@pytest.mark.parametrize("character", ["a", "?", "://", "=?a", "@"])
def test_a_long_hostile_text_costs_time_in_its_length_alone(character):
    begin = time.perf_counter()
    holds_password(character * (300_000 // len(character)))
    assert time.perf_counter() - begin < 5  # the square of it would be hours


def test_values_of_secret_variables_are_taken_out_of_any_text(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", f"{CANARY}\n")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "visible")
    error = ValueError(f"Invalid header part {f'Bearer {CANARY}' + chr(10)!r}; visible")
    assert CANARY not in short(error) and "Bearer ***" in short(error) and "visible" in short(error)


@pytest.mark.parametrize("key", ["tracking.uri", "tracking.artifact_location", "data_roots", "backbone.path"])
def test_a_stream_with_a_password_in_any_address_is_refused_by_key_with_the_remedy(key, tmp_path):
    address = f"http://me:{CANARY}@host:5000"
    value = f"[{address!r}]" if key == "data_roots" else address
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        override_config(stream_dict(tmp_path, tmp_path, tmp_path, [tmp_path]), [f"{key}={value}"], "s.yaml")
    assert key in str(refused.value) and "Horse" not in str(refused.value)


@pytest.mark.parametrize("override", ["tracking.uri: {}", "tracking.uri=[{}"])
def test_an_override_that_cannot_be_read_is_quoted_without_the_password(override, tmp_path):
    with pytest.raises(UserError, match="--set") as refused:
        override_config({}, [override.format(f"http://me:{CANARY}@host:5000")], "s.yaml")
    assert "Horse" not in str(refused.value)


def test_nothing_is_written_before_a_tracker_refuses_a_password(tmp_path):
    for settings in ({"uri": f"http://me:{CANARY}@host"}, {"artifact_location": f"s3://me:{CANARY}@bucket"}):
        with pytest.raises(UserError, match="leave it out") as refused:
            Tracker(tmp_path / "work", "stream", TrackingConfig(**settings))
        assert "Horse" not in str(refused.value)
    assert not (tmp_path / "work").exists()


def test_the_lock_names_the_holders_command_without_a_password(tmp_path):
    with WorkLock(tmp_path, ["predict.py", "--data", "s3://me:Horse@bucket/rows"]).acquire():
        assert "Horse" not in (tmp_path / "lock.json").read_text()


def test_the_audit_refuses_an_address_with_a_password(tmp_path, capsys):
    assert audit_command.main(["--work-dir", str(tmp_path), "--tracking-uri", f"http://me:{CANARY}@host"]) == 2
    said = capsys.readouterr()
    assert "MLFLOW_TRACKING_PASSWORD" in said.err and "Horse" not in said.err + said.out


def test_telemetry_is_off_wherever_mlflow_is_used():
    """What MLflow itself decides, in a new interpreter that has imported no more than the module that opens clients."""
    text = (
        "import json, pipeline.tracking.registry; from mlflow.telemetry.utils import is_telemetry_disabled; "
        "print(json.dumps(is_telemetry_disabled()))"
    )
    plain = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}  # MLflow knows pytest and CI
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, env=plain, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is True
