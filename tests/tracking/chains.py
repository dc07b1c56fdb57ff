"""Chains put together increment by increment, as a method with pinned experts leaves them."""

import torch

from pipeline.experts.bank import Bank
from pipeline.tracking.audit import audit
from pipeline.tracking.chain import publish
from pipeline.tracking.champion import read_champion
from pipeline.tracking.manifest import Manifest


def wrong(work_dir, registry=None):
    return {finding.name: finding.detail for finding in audit(work_dir, registry) if not finding.ok}


class Chain:
    """A work_dir whose increments are put together one by one, as a method with pinned experts leaves them."""

    def __init__(self, work_dir, by_hand):
        self.work_dir, self.by_hand, self.parent, self.number = work_dir, by_hand, None, 0
        self.bank = Bank(work_dir / "bank")

    def put(self, value, **note):
        return self.bank.put({"w": torch.full((2, 2), float(value))}, note)

    def learn(self, task, verdict="promoted", moved=None, state=None, tasks=(), **fields):
        """An increment with an expert of its own; `moved` are the bundles of earlier tasks that move."""
        self.number = len(list((self.work_dir / "increments").glob("*"))) + 1
        self.parent = champion.head if (champion := read_champion(self.work_dir)) else None
        expert = self.put(self.number, task=task)
        shared = self.put(-self.number, task=task)
        own = {"dedicated": expert, "shared": shared}
        contents = {f"predictions/{name}.parquet": f"rows of {name} {self.number}" for name in (task, *tasks)}
        contents |= {"row.json": str(self.number)}
        promoted = verdict == "promoted"
        manifest = Manifest(
            **self.by_hand.fields(
                increment=self.number,
                task=task,
                parent=self.parent,
                verdict=verdict,
                bundles={task: own} | {name: own | bundle for name, bundle in (moved or {}).items()}
                if promoted
                else {},
                bank=own | (state or {}),
                state=(state or {}) if promoted else {},
                files={name: self.by_hand.sha(text) for name, text in contents.items()},
                row={task: 0.5, **dict.fromkeys(tasks, 0.25)},
                **fields,
            )
        )
        staged = self.work_dir / "inflight" / f"publish-{self.number}"
        for name, text in contents.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).write_text(text)
        (staged / "run.json").write_text("{}")
        publish(self.work_dir, staged, manifest)
        return manifest


def data_of(work_dir, task):
    """Prepared shards and quarantine as the data stages leave them."""
    shards = work_dir / "prepared" / task / ("a" * 64)
    shards.mkdir(parents=True)
    (shards / "meta.json").write_text("{}")
    quarantine = work_dir / "quarantine" / task / f"{'b' * 64}.parquet"
    quarantine.parent.mkdir(parents=True)
    quarantine.write_text("rows")
    return [shards, quarantine]
