"""Data, backbone and published work all behind s3://, learned by the command as users submit it."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import yaml

from data_contracts.errors import UserError
from pipeline.backbones import fetch
from pipeline.backbones.fetch import local_backbone
from pipeline.backbones.load import backbone_digest
from pipeline.placement.architecture import load_architecture
from tests.helpers import make_stream, make_task
from tests.jobs.launch import Case, run_many
from tests.store.chains import objects_in, same_work, wrong


@pytest.fixture
def remote_backbone(s3, bucket, backbone_dir, tmp_path, monkeypatch):
    """The URI of the tiny backbone, and an empty cache of this host's."""
    monkeypatch.setenv("PERENNIAL_CACHE", str(tmp_path / "cache"))
    s3.put(f"{backbone_dir}/", f"{bucket}/models/tiny/", recursive=True)
    s3.pipe_file(f"{bucket}/models/tiny/code.py", b"raise SystemExit('code of a checkpoint is never run')")
    return f"{bucket}/models/tiny"


def next_start(uri):
    """What the next job of this host gets."""
    fetch._fetched.cache_clear()
    return Path(local_backbone(uri))


def test_a_backbone_behind_a_uri_is_fetched_once_and_anew_when_it_changed(s3, remote_backbone, backbone_dir):
    with multiprocessing.get_context("fork").Pool(2) as ranks:
        found = set(ranks.map(local_backbone, [remote_backbone] * 2, chunksize=1))
    assert found == {local_backbone(remote_backbone)}
    folder = Path(found.pop())
    assert backbone_digest(remote_backbone) == backbone_digest(str(backbone_dir))
    assert not (folder / "code.py").exists()
    assert load_architecture(remote_backbone) == load_architecture(str(backbone_dir))
    assert sorted(path.suffix for path in folder.parent.iterdir()) == ["", ".lock"]
    weights, stamp = folder / "model.safetensors", (folder / "config.json").stat().st_mtime_ns
    weights.write_bytes(weights.read_bytes()[:-1])  # a cache that lost a byte is not used
    assert next_start(remote_backbone) == folder and (folder / "config.json").stat().st_mtime_ns != stamp
    text = (backbone_dir / "config.json").read_text()
    s3.pipe_file(f"{remote_backbone}/config.json", text.replace("{", "{ ", 1).encode())
    changed = next_start(remote_backbone)
    assert changed != folder and (changed / "config.json").read_text() == text.replace("{", "{ ", 1)


def test_a_uri_without_a_backbone_or_with_a_password_is_refused(s3, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("PERENNIAL_CACHE", str(tmp_path / "cache"))
    s3.pipe_file(f"{bucket}/empty/readme.txt", b"nothing")
    with pytest.raises(UserError, match=f"'{bucket}/empty' holds no config.json"):
        local_backbone(f"{bucket}/empty")
    with pytest.raises(UserError, match=f"'{bucket}/nowhere' cannot be read"):
        local_backbone(f"{bucket}/nowhere")
    with pytest.raises(UserError, match=r"cannot be read .*check the URI"):
        load_architecture(f"{bucket}/nowhere")


def test_a_stream_is_learned_with_everything_on_s3_and_goes_on_on_a_new_machine(s3, remote_backbone, bucket, tmp_path):
    data = tmp_path / "data"
    rows = {"train": 8, "validation": 4, "test": 4}
    tasks = [make_task(data, name, rows=rows) for name in ("first", "second")]
    for task in tasks:
        contract = yaml.safe_load(task.read_text())
        name = contract["task"]
        contract["source"]["train"] = [f"{bucket}/data/{name}/tr*.parquet"]  # a glob of URIs; the others below the root
        task.write_text(yaml.safe_dump(contract, sort_keys=False))
        s3.put(f"{data / name}/", f"{bucket}/data/{name}/", recursive=True)
        shutil.rmtree(data / name)

    def case(name, *options):
        stream = make_stream(tmp_path / f"{name}.yaml", tmp_path / name, remote_backbone, f"{bucket}/data", tasks)
        settings = [f"store={{uri: '{bucket}/work'}}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
        options = [*options, *(part for setting in settings for part in ("--set", setting))]
        return Case("continual", ["--stream", stream, *options])

    lost, new = run_many([case("lost", "--until", "first"), case("new")], tmp_path / "said")
    assert lost.code == new.code == 0, lost.text + new.text
    assert f"{bucket}/work: took over increment 1" in new.stdout and "first: learned already" in new.stdout
    first = same_work(tmp_path / "lost")  # the machine is given up: nothing is read from there
    second = same_work(tmp_path / "new")
    assert {name: data for name, data in second.items() if name in first and name != "champion.json"} == {
        name: data for name, data in first.items() if name != "champion.json"
    }
    assert wrong(tmp_path / "new", f"{bucket}/work") == {}
    assert len(json.loads(second["champion.json"])["bundles"]) == 2
    said = lost.text + new.text
    kept = [path.read_bytes() for path in (tmp_path / "new").rglob("*") if path.is_file()]
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    assert secret not in said and not any(secret.encode() in data for data in kept)
    assert not any(secret.encode() in data for data in objects_in(f"{bucket}/work").values())
