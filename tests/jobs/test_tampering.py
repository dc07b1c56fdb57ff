"""One changed byte anywhere in what is published makes jobs/audit.py exit 1 and name the place."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs import audit
from tests.jobs.many import digests

pytestmark = pytest.mark.timeout(1800)  # set-up is several launches, each with a shorter limit of its own


@pytest.fixture(scope="module")
def copy(learned, tmp_path_factory) -> Path:
    """A copy of the learned work_dir; every test puts back what it changes."""
    assert learned.second.code == 0, learned.second.text
    return Path(shutil.copytree(learned.work_dir, tmp_path_factory.mktemp("copy") / "work"))


@pytest.fixture(scope="module")
def client(copy):
    """MLflow's own client on the copy's database."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{copy / 'mlflow.db'}"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture(scope="module")
def published(copy) -> list[str]:
    """Every published file but run.json, which holds what differs between runs and is outside the chain."""
    names = [name for name in digests(copy) if name.startswith(("increments/", "bank/", "champion.json"))]
    return [name for name in names if not name.endswith("/run.json")]


def audited(work_dir: Path, capsys) -> tuple[int, list[str]]:
    """Exit code of the command and the lines of its table that differ."""
    code = audit.main(["--work-dir", str(work_dir)])
    return code, [line for line in capsys.readouterr().out.splitlines() if line.startswith("DIFFERS")]


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    """The file with other content, for a while."""
    before = path.read_bytes()
    assert content != before
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def place_of(name: str) -> str:
    """How the audit names the place of a published file."""
    if name.startswith("increments/") and not name.endswith("/manifest.json"):
        return name.split("/")[1]
    return name


def test_a_copy_elsewhere_passes(copy, capsys):
    assert audited(copy, capsys) == (0, [])


@pytest.mark.parametrize("where", ["middle", "last"])
def test_one_flipped_bit_in_any_published_file_is_named(copy, published, where, capsys):
    missed = []
    kinds = {Path(name).name for name in published}
    assert {"champion.json", "manifest.json", "row.json", "contract.json", "report.png", "first.parquet"} <= kinds
    for name in published:
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2 if where == "middle" else -1] ^= 1
        with changed(copy / name, bytes(data)):
            code, differing = audited(copy, capsys)
        if code != 1 or not any(place_of(name) in line for line in differing):
            missed.append((name, code, differing))
    assert missed == []
    assert audited(copy, capsys) == (0, [])


def test_a_missing_file_is_named(copy, published, capsys):
    missed = []
    for name in published:
        hidden = (copy / name).rename(copy / "hidden")
        code, differing = audited(copy, capsys)
        hidden.rename(copy / name)
        if code != 1 or not any(place_of(name) in line for line in differing):
            missed.append((name, code, differing))
    assert missed == []


def test_a_score_raised_consistently_inside_a_manifest_is_named_by_the_next_link(copy, capsys):
    path = copy / "increments" / "0002-second" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["row"]["second"] = 1.0
    with changed(path, json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()):
        code, differing = audited(copy, capsys)
    assert code == 1
    assert any("0002-second/manifest.json" in line and "0003-third" in line for line in differing), differing


def test_every_changed_tag_of_a_registered_version_is_named(copy, client, capsys):
    ours = ("stream", "work_dir")
    version = client.get_model_version("tiny", "2")
    for key, value in version.tags.items():
        if key in ours:
            continue
        flipped = chr(ord(value[0]) ^ 1) + value[1:]
        client.set_model_version_tag("tiny", "2", key, flipped)
        code, differing = audited(copy, capsys)
        client.set_model_version_tag("tiny", "2", key, value)
        assert code == 1 and any(f"tag {key} is" in line for line in differing), (key, differing)
    assert audited(copy, capsys) == (0, [])


def test_a_deleted_tag_a_moved_alias_and_a_changed_run_are_named(copy, client, capsys):
    version = client.get_model_version("tiny", "3")
    client.delete_model_version_tag("tiny", "3", "contract_digest")
    code, differing = audited(copy, capsys)
    assert code == 1 and any("contract_digest" in line for line in differing)
    client.set_model_version_tag("tiny", "3", "contract_digest", version.tags["contract_digest"])

    client.set_registered_model_alias("tiny", "champion", "1")
    code, differing = audited(copy, capsys)
    assert code == 1 and any("alias champion" in line for line in differing)
    client.set_registered_model_alias("tiny", "champion", "3")

    sha = client.get_run(version.run_id).data.tags["manifest_sha256"]
    client.set_tag(version.run_id, "manifest_sha256", "0" * 64)
    code, differing = audited(copy, capsys)
    assert code == 1 and any("0003-third" in line and "run" in line for line in differing)
    client.set_tag(version.run_id, "manifest_sha256", sha)
    assert audited(copy, capsys) == (0, [])
