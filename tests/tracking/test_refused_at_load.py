"""One changed byte in any published file: the audit names it, and whoever would use the file refuses it by its name.

Fifty random offsets of every kind of file; run.json alone, which holds what differs between runs, is outside the chain.
"""

import io
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_contracts import load_contract
from data_contracts.errors import UserError
from pipeline.evaluation.review_cost import ScoredRows, review_record
from pipeline.experts.bank import Bank
from pipeline.placement.distributed import World
from pipeline.report import final_report
from pipeline.review import compare_reviews
from pipeline.serving import Served
from pipeline.stages.job import Job
from pipeline.tracking.audit import audit
from pipeline.tracking.chain import load_chain, publish
from pipeline.tracking.champion import read_champion
from pipeline.tracking.history import History
from pipeline.tracking.manifest import Manifest
from pipeline.tracking.reading import as_of
from pipeline.upkeep import restore
from tests.helpers import make_task
from tests.tracking.chains import Chain

OFFSETS = 50
ROWS = {"row_id": ["1", "2"], "answer": ["a", "b"], "score": [0.9, 0.8], "reference": ["a", "b"]}


@pytest.fixture(scope="module")
def published(tmp_path_factory, by_hand):
    """Two increments of one task and a restored champion, with every kind of file a run publishes; every test puts back
    what it changes.
    """
    folder = tmp_path_factory.mktemp("published")
    contract = load_contract(make_task(folder / "data", "first", turn=0))
    scored = ScoredRows.of(ROWS["answer"], ROWS["score"], ROWS["reference"])
    table = io.BytesIO()
    pq.write_table(pa.table(ROWS), table)
    chain = Chain(folder / "work", by_hand)
    for number in (1, 2):
        row = {"task": "first", "baselines": {}, "test": {"first": 0.5}}
        contents = {
            "row.json": json.dumps(row | {"increment": number}).encode(),
            "contract.json": json.dumps(contract.model_dump(mode="json", by_alias=True)).encode(),
            "review.json": json.dumps({"first": review_record(scored, scored, ["a", "b"], 0.9, "digest")}).encode(),
            "predictions/first.parquet": table.getvalue(),
            "predictions_inferred/first.parquet": table.getvalue(),
            "report.png": b"\x89PNG" + bytes(60),
        }
        bundle = {"adapter": chain.put(number, task="first")}
        champion = read_champion(chain.work_dir)
        manifest = Manifest(
            **by_hand.fields(
                increment=number,
                task="first",
                parent=champion.head if champion else None,
                bundles={"first": bundle},
                bank=bundle | {"state": chain.put(10 + number)},
                files={name: by_hand.sha_of(data) for name, data in contents.items()},
                row={"first": 0.5},
                validation_row={"first": 0.5},
            )
        )
        staged = chain.work_dir / "inflight" / f"publish-{number}"
        for name, data in contents.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).write_bytes(data)
        publish(chain.work_dir, staged, manifest)
    restore(chain.work_dir, 1)
    assert all(finding.ok for finding in audit(chain.work_dir))
    return chain.work_dir


def serve_contract(work_dir, name):
    return Served(SimpleNamespace(work_dir=work_dir, world=World(0, 1, None)), as_of(work_dir)).contract("first")


def report(work_dir, name):
    config = SimpleNamespace(work_path=lambda: work_dir, method={"name": "m"}, stream="s")
    final_report(config, History.of(load_chain(work_dir)), "uri")


def review(work_dir, name):
    return compare_reviews(work_dir, 1, 2, "first")


def read_bank(work_dir, name):
    return Bank(work_dir / "bank").get(Path(name).stem)


def open_bank(work_dir, name):
    """As training and serving open it."""
    world = SimpleNamespace(on_main=lambda work: work())
    return Job.open_bank(SimpleNamespace(storage=None, world=world, bank=Bank(work_dir / "bank")), Path(name).stem)


def follow(work_dir, name):
    """As the next increment, serving and every command begin."""
    return as_of(work_dir)


def read_metadata(work_dir, name):
    return Bank(work_dir / "bank").metadata(Path(name).stem)


KINDS = {
    "champion": ("champion.json", [follow]),
    "head": ("increments/0003-restored.1/manifest.json", [follow]),
    "manifest": ("increments/0001-first/manifest.json", [follow, report, review]),
    "row": ("increments/0001-first/row.json", [report]),
    "thresholds": ("increments/0001-first/review.json", [report, review]),
    "contract": ("increments/0001-first/contract.json", [serve_contract]),
    "prediction": ("increments/0002-first/predictions/first.parquet", [review]),
    "routed prediction": ("increments/0001-first/predictions_inferred/first.parquet", []),
    "picture": ("increments/0001-first/report.png", []),
    "bank": ("bank/*.safetensors", [read_bank, open_bank, read_metadata]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_byte_is_named_by_the_audit_and_refused_where_the_file_is_used(published, kind, capsys):
    pattern, users = KINDS[kind]
    draw = random.Random(kind)
    paths = sorted(published.glob(pattern))
    for use in users:
        use(published, paths[0])  # whole, it is used
    for _ in range(OFFSETS):
        path = draw.choice(paths)
        whole = path.read_bytes()
        place, change = draw.randrange(len(whole)), draw.randrange(1, 256)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
        try:
            differing = [f"{finding.name} {finding.detail}" for finding in audit(published) if not finding.ok]
            folder, _, inside = path.relative_to(published).as_posix().removeprefix("increments/").partition("/")
            assert any(folder in said and inside in said for said in differing), (place, differing)
            for use in users:
                with pytest.raises(UserError) as refused:
                    use(published, path)
                assert path.name in str(refused.value), (use, place)
        finally:
            path.write_bytes(whole)
    assert all(finding.ok for finding in audit(published))
