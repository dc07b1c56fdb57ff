"""Small chains made by hand, one MLflow database for all tests, and a way to die at a chosen moment."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.config import TrackingConfig
from pipeline.experts.bank import Bank
from pipeline.tracking.chain import publish
from pipeline.tracking.manifest import Manifest
from pipeline.tracking.mlflow_log import Tracker
from pipeline.tracking.registry import Registry, open_client

LEARNING = {"method": {"name": "moe_cl", "rank": 8}, "seed": 17}


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_fields(**changes):
    """A valid first increment, as keyword arguments; `changes` replace fields."""
    fields = {
        "increment": 1,
        "task": "product_reviews",
        "parent": None,
        "contract": {
            "version": "1.0.0",
            "digest": sha("contract"),
            "labels": {"bad": " bad"},
            "prompt": "Review: {text}",
        },
        "data": {
            "train": {"digest": sha("train"), "rows_in": 10, "kept": 7, "rejected": {"empty_text": 2, "leak": 1}},
            "test": {"digest": sha("test"), "rows_in": 4, "kept": 4, "rejected": {}},
        },
        "learning": LEARNING,
        "learning_digest": sha(json.dumps(LEARNING, sort_keys=True, separators=(",", ":"))),
        "training": {"steps": 3, "rows_consumed": 21},
        "backbone": {"digest": sha("backbone"), "model_type": "llama", "dtype": "bfloat16"},
        "method": "moe_cl",
        "verdict": "promoted",
        "bundles": {},
        "bank": {},
        "state": {},
        "row": {"product_reviews": 0.75},
        "validation_row": {"product_reviews": 0.5},
        "files": {},
        "gate": {"min_metric": {"value": 0.75, "limit": 0.4, "passed": True}},
        "versions": {"torch": "2.13.0", "code": sha("code")},
    }
    return fields | changes


def stage(work_dir, manifest, contents):
    """Write an increment's files where publish expects them."""
    staged = Path(work_dir) / "inflight" / f"publish-{manifest.increment}"
    for name, text in contents.items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_text(text)
    (staged / "run.json").write_text('{"host":"somewhere"}')
    return staged


def increments(work_dir):
    """Three increments by hand: reviews promoted, tweets rejected, tweets promoted (shared of reviews moves).

    Yields (manifest, staged folder) one after another; the bank is filled as they come.
    """
    bank = Bank(Path(work_dir) / "bank")
    put = lambda name, value: bank.put({name: torch.full((2, 3), value)}, {"role": name})  # noqa: E731
    contents = {"row.json": "[0.75]", "predictions/product_reviews.parquet": "rows"}
    files = {name: sha(text) for name, text in contents.items()}

    roles = {"dedicated": put("dedicated", 1.0), "shared": put("shared", 2.0), "gate": put("gate", 3.0)}
    state = {"prototypes": put("prototypes", 4.0)}
    first = Manifest(
        **manifest_fields(bundles={"product_reviews": roles}, bank=roles | state, state=state, files=files)
    )
    yield first, stage(work_dir, first, contents)

    second = Manifest(
        **manifest_fields(
            increment=2,
            task="tweets",
            parent=first.sha256,
            verdict="rejected",
            bank={"dedicated": put("dedicated", 5.0)},
            files=files,
            row={"product_reviews": 0.25, "tweets": 0.5},
        )
    )
    yield second, stage(work_dir, second, contents)

    roles_3 = {"dedicated": put("dedicated", 6.0), "shared": put("shared", 7.0), "gate": put("gate", 8.0)}
    third = Manifest(
        **manifest_fields(
            increment=3,
            task="tweets",
            parent=second.sha256,
            bundles={"tweets": roles_3, "product_reviews": roles | {"shared": roles_3["shared"]}},
            bank=roles_3,
            files=files,
            row={"product_reviews": 0.75, "tweets": 0.625},
        )
    )
    yield third, stage(work_dir, third, contents)


def publish_all(work_dir, count=3):
    """Publish the first `count` increments; returns their manifests in order."""
    manifests = []
    for manifest, staged in increments(work_dir):
        if manifest.increment > count:
            break
        publish(work_dir, staged, manifest)
        manifests.append(manifest)
    return manifests


def files_of(folder):
    """{relative name: bytes} of everything below a folder."""
    folder = Path(folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def die_at(step, action):
    """Run `action` in a child that is killed just before its `step`-th file-system operation; True if it was."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event, _):
            nonlocal count
            if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
                count += 1
                if count > step:
                    os._exit(9)

        try:
            sys.addaudithook(hook)
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.fixture(scope="session")
def by_hand():
    """The helpers of this file."""
    return SimpleNamespace(
        fields=manifest_fields,
        increments=increments,
        publish_all=publish_all,
        files_of=files_of,
        die_at=die_at,
        sha=sha,
        sha_of=lambda data: hashlib.sha256(data).hexdigest(),
    )


@pytest.fixture(scope="session")
def registered(tmp_path_factory):
    """The three increments published and registered in MLflow; not to be changed."""
    work_dir = tmp_path_factory.mktemp("registered")
    tracker = Tracker(work_dir, "reviews", TrackingConfig())
    manifests, run_ids = [], []
    for manifest, staged in increments(work_dir):
        tracker.increment(manifest.increment, manifest.task, "inputs")
        publish(work_dir, staged, manifest)
        run_ids.append(tracker.run_id())
        tracker.published(manifest, (), "inputs")
        manifests.append(manifest)
    tracker.close()
    assert tracker.waiting == 0
    client = open_client(tracker.uri)
    return SimpleNamespace(
        work_dir=work_dir,
        manifests=manifests,
        run_ids=run_ids,
        uri=tracker.uri,
        client=client,
        registry=Registry(client, "reviews"),
        experiment_id=client.get_experiment_by_name("perennial").experiment_id,
    )


@pytest.fixture
def copied(registered, tmp_path):
    """A copy of the registered work_dir, database included, to be damaged."""
    shutil.copytree(registered.work_dir, tmp_path / "work")
    return tmp_path / "work"
