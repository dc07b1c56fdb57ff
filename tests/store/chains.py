"""Increments put together by hand and published into a store, and what a store holds."""

import json
from pathlib import Path

import torch

from pipeline.experts.bank import Bank
from pipeline.store.objects import open_objects
from pipeline.store.published import open_store
from pipeline.tracking.audit import audit
from pipeline.tracking.chain import publish
from pipeline.tracking.champion import read_champion
from pipeline.tracking.manifest import Manifest


def learn(work_dir, by_hand, task, store=None):
    """Publish the next increment: two bank files of its own, a row and predictions."""
    number = len(list((work_dir / "increments").glob("*"))) + 1
    bank, champion = Bank(work_dir / "bank"), read_champion(work_dir)
    values = {"dedicated": float(number), "shared": -float(number)}
    own = {role: bank.put({"w": torch.full((2, 2), value)}, {"task": task}) for role, value in values.items()}
    contents = {"row.json": f"[{number}]", f"predictions/{task}.parquet": f"rows of {task}"}
    manifest = Manifest(
        **by_hand.fields(
            increment=number,
            task=task,
            parent=champion.head if champion else None,
            bundles={task: own},
            bank=own,
            files={name: by_hand.sha(text) for name, text in contents.items()},
            row={task: 0.5},
        )
    )
    staged = work_dir / "inflight" / f"publish-{number}"
    for name, text in contents.items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_text(text)
    (staged / "run.json").write_text(json.dumps({"task": task}))
    publish(work_dir, staged, manifest, store)
    return manifest


def published(work_dir, uri, by_hand, count):
    """Publish the chain made by hand into a store, from where the work_dir stands up to its increment `count`."""
    done = len(list((work_dir / "increments").glob("*")))
    manifests = []
    for manifest, staged in by_hand.increments(work_dir):
        if done < manifest.increment <= count:
            publish(work_dir, staged, manifest, open_store(uri))
            manifests.append(manifest)
    return manifests


def objects_in(uri):
    """{name: bytes} of all that stands in a store."""
    objects = open_objects(uri)
    names = [name for name in objects.sizes("") if not Path(name).name.startswith(".")]
    return {name: objects.read(name)[0] for name in names}


def same_work(work_dir):
    """{name: bytes} of what a work_dir has published."""
    files = [path for name in ("bank", "increments") for path in (work_dir / name).rglob("*") if path.is_file()]
    return {path.relative_to(work_dir).as_posix(): path.read_bytes() for path in [*files, work_dir / "champion.json"]}


def wrong(work_dir, uri):
    """What the audit finds of a work_dir and its store."""
    return {f.name: f.detail for f in audit(work_dir, store=open_store(uri)) if not f.ok}
