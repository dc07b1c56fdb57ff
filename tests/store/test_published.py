"""Publishing through a store: layout, filling, being behind or ahead, races, damage, removal."""

import json
import multiprocessing
import shutil

import pytest
import torch

from data_contracts.errors import UserError
from jobs import audit as audit_command
from jobs import bank as bank_command
from pipeline.experts.bank import Bank
from pipeline.store.objects import open_objects
from pipeline.store.published import Pointer, Store, open_store
from pipeline.store.reconcile import open_in_step
from pipeline.tracking.audit import audit
from pipeline.tracking.chain import fold, load_chain, publish
from pipeline.tracking.champion import read_champion
from pipeline.tracking.manifest import Manifest
from tests.store.chains import learn, objects_in, published, same_work, wrong


@pytest.fixture(params=["s3", "folder"])
def uri(request, tmp_path):
    return str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("bucket") + "/stream"


def test_a_published_chain_stands_in_the_store_under_its_digests_and_fills_an_empty_work_dir(by_hand, tmp_path, uri):
    first = tmp_path / "first"
    manifests = by_hand.publish_all(first, 1)
    assert open_in_step(first, uri) == [f"{uri}: stored increment 1"]  # named for the first time
    manifests += published(first, uri, by_hand, 3)
    bank = by_hand.files_of(first / "bank")
    expected = {f"bank/{name}": data for name, data in bank.items()}
    for manifest in manifests:
        folder = first / "increments" / manifest.folder
        expected |= {f"increments/{manifest.sha256}/{n}": data for n, data in by_hand.files_of(folder).items()}
    champion = json.loads((first / "champion.json").read_bytes())
    pointer = {"champion": champion, "format": 1, "sweeps": 0}
    expected["champion.json"] = json.dumps(pointer, sort_keys=True, separators=(",", ":")).encode()
    expected["store.json"] = b'{"format":1}'
    assert objects_in(uri) == expected

    second = tmp_path / "second"
    second.mkdir()
    assert open_in_step(second, uri) == [f"{uri}: took over increments 1 to 3"]
    assert open_in_step(second, uri) == open_in_step(first, uri) == []
    assert same_work(first) == same_work(second)
    assert json.loads((second / "tracking.json").read_text())["id"]  # another work_dir than that of the same path there
    assert wrong(second, uri) == {}
    assert json.loads((second / "store.json").read_text()) == {"uri": uri}
    with pytest.raises(UserError, match=f"publishes into {uri} and the stream names no store; set store.uri"):
        open_in_step(second, None)


def test_publishing_asks_the_store_for_what_is_new_alone(by_hand, tmp_path):
    asked = []

    class Counting:
        """Real objects; the names asked for are noted."""

        def __init__(self, objects):
            self.objects, self.uri = objects, objects.uri

        def __getattr__(self, method):
            def call(name, *arguments):
                asked.append((method, name))
                return getattr(self.objects, method)(name, *arguments)

            return call

    store = Store(Counting(open_objects(str(tmp_path / "store"))))
    per_increment = []
    for _ in range(12):
        asked.clear()
        learn(tmp_path / "work", by_hand, f"task_{len(per_increment)}", store)
        per_increment.append(sorted(method for method, _ in asked))
    assert len({tuple(methods) for methods in per_increment[1:]}) == 1
    assert per_increment[1].count("sizes") == 0 and len(per_increment[1]) == len(asked) == 13
    assert audit(tmp_path / "work", store=store)


# ---------------------------------------------------------------- two writers


def writer(work_dir, uri, by_hand, task, ready, said):
    try:
        ready.wait()
        learn(work_dir, by_hand, task, open_store(uri))
        said.put((task, None))
    except UserError as error:
        said.put((task, str(error)))


def test_of_two_writers_after_one_head_one_is_refused_and_goes_on_from_there(by_hand, tmp_path, uri):
    context = multiprocessing.get_context("fork")
    learn(tmp_path / "start", by_hand, "reviews", open_store(uri))
    work_dirs = {task: shutil.copytree(tmp_path / "start", tmp_path / task) for task in ("tweets", "mails")}
    head = read_champion(tmp_path / "start")
    ready, said = context.Barrier(2), context.Queue()
    writers = [
        context.Process(target=writer, args=(folder, uri, by_hand, task, ready, said))
        for task, folder in work_dirs.items()
    ]
    for process in writers:
        process.start()
    outcomes = dict(said.get(timeout=60) for _ in writers)
    for process in writers:
        process.join()
    (winner,) = [task for task, message in outcomes.items() if message is None]
    (loser,) = work_dirs.keys() - {winner}
    assert outcomes[loser] == (
        f"{uri}: another job published increment 2 ({winner}) there meanwhile; run the same command again: it goes on "
        "from there"
    )
    assert read_champion(work_dirs[loser]) == head
    assert [finding for finding in audit(work_dirs[loser]) if not finding.ok] == []
    assert open_store(uri).pointer().champion == read_champion(work_dirs[winner])

    assert open_in_step(work_dirs[loser], uri) == [f"{uri}: took over increment 2"]
    shutil.rmtree(work_dirs[loser] / "inflight")
    learn(work_dirs[loser], by_hand, loser, open_store(uri))
    assert [entry.name for entry in sorted((work_dirs[loser] / "increments").iterdir())] == [
        "0001-reviews", f"0002-{winner}", f"0003-{loser}"
    ]  # fmt: skip
    assert wrong(work_dirs[loser], uri) == {}


def test_the_same_increment_published_twice_at_once_is_one(by_hand, tmp_path, uri):
    for name in ("first", "second"):
        learn(tmp_path / name, by_hand, "reviews", open_store(uri) if name == "first" else Store(open_objects(uri)))
    assert read_champion(tmp_path / "first") == read_champion(tmp_path / "second") == open_store(uri).pointer().champion


def test_work_dirs_that_have_gone_on_apart_are_refused(by_hand, tmp_path, uri):
    learn(tmp_path / "first", by_hand, "reviews", open_store(uri))
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    theirs = learn(tmp_path / "first", by_hand, "tweets", open_store(uri))
    ours = learn(tmp_path / "second", by_hand, "mails")
    before = objects_in(uri)
    with pytest.raises(UserError, match="have gone on apart") as error:
        open_in_step(tmp_path / "second", uri)
    assert f"here increment 2 ({ours.sha256[:12]}) is the newest" in str(error.value)
    assert f"there increment 2 ({theirs.sha256[:12]}); go on in an empty work_dir" in str(error.value)
    assert objects_in(uri) == before and read_champion(tmp_path / "second").head == ours.sha256


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("uri", "what"),
    [("s3", "bank/"), *(("folder", what) for what in ("bank/", "row.json", "manifest.json", "champion.json"))],
    indirect=["uri"],
)
def test_a_flipped_byte_is_refused_when_fetched_and_named_by_the_audit(by_hand, tmp_path, uri, what, capsys):
    work_dir = tmp_path / "work"
    learn(work_dir, by_hand, "reviews", open_store(uri))
    open_in_step(work_dir, uri)
    name = next(name for name in sorted(objects_in(uri)) if what in name)
    objects = open_objects(uri)
    data = bytearray(objects.read(name)[0])
    data[len(data) // 2] ^= 1
    objects.write(name, bytes(data))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"{uri}/{name}: .*(altered|not a valid)"):
        open_in_step(tmp_path / "empty", uri)
    assert read_champion(tmp_path / "empty") is None
    assert any(name in key + detail for key, detail in wrong(work_dir, uri).items())
    assert audit_command.main(["--work-dir", str(work_dir)]) == 1
    assert name in capsys.readouterr().out.replace("\n", "")
    objects.remove(name)  # the remedy that the message names
    assert bank_command.main(["--work-dir", str(work_dir), "sync"]) == 0
    number = 0 if what == "champion.json" else 1  # the pointer is moved, not only stored again
    assert f"{number} objects that it had lost are stored again" in capsys.readouterr().out
    assert wrong(work_dir, uri) == {} and open_in_step(tmp_path / "empty", uri) == [f"{uri}: took over increment 1"]


def test_an_object_that_stands_there_already_is_compared_and_not_believed(by_hand, tmp_path, uri):
    work_dir = tmp_path / "work"
    tensors = {"w": torch.full((2, 2), 1.0)}
    sha = Bank(work_dir / "bank").put(tensors, {"task": "reviews"})  # the expert of increment 1
    objects = open_objects(uri)
    whole = (work_dir / "bank" / f"{sha}.safetensors").read_bytes()
    objects.write(f"bank/{sha}.safetensors", whole[:-1] + b"x")
    with pytest.raises(UserError, match=f"bank/{sha}.safetensors: this object was altered .*; remove that object from"):
        learn(work_dir, by_hand, "reviews", open_store(uri))
    assert read_champion(work_dir) is None and open_store(uri).pointer() == Pointer()
    objects.remove(f"bank/{sha}.safetensors")
    shutil.rmtree(work_dir / "inflight")
    learn(work_dir, by_hand, "reviews", open_store(uri))
    assert wrong(work_dir, uri) == {}


def test_a_store_inside_its_work_dir_is_refused(tmp_path):
    for uri in (tmp_path, tmp_path / "store", f"file://{tmp_path}"):
        with pytest.raises(UserError, match="lies in the work_dir"):
            open_in_step(tmp_path, str(uri))
    assert not list(tmp_path.iterdir())


def test_a_server_that_forgets_conditions_is_refused_before_anything_is_learned(s3, tmp_path):
    s3.mkdir("careless-server")
    with pytest.raises(UserError, match=r"does not keep to the conditions of a write \(If-None-Match, If-Match\)"):
        open_in_step(tmp_path, "s3://careless-server/stream")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- restore, retire, gc


def test_restore_retire_and_gc_hold_for_the_store_and_for_every_work_dir(by_hand, tmp_path, uri, capsys):
    here, there = tmp_path / "here", tmp_path / "there"
    store = open_store(uri)
    run = lambda work_dir, *command: bank_command.main(["--work-dir", str(work_dir), *command])  # noqa: E731
    tweets = learn(here, by_hand, "tweets", store)
    learn(here, by_hand, "mails", store)
    open_in_step(here, uri)
    assert run(there, "sync", uri) == 0 and "took over increments 1 to 2" in capsys.readouterr().out
    assert run(there, "restore", "1") == 0
    assert run(here, "restore", "2") == 0  # takes over the entry of `there` first
    assert [entry.verdict for entry in load_chain(here)] == ["restored", "restored", "promoted", "promoted"]
    assert run(there, "sync") == 0

    names = objects_in(uri).keys()
    own = {f"bank/{sha}.safetensors" for sha in tweets.bank.values()}
    own.add(f"increments/{tweets.sha256}/predictions/tweets.parquet")
    assert own <= names
    assert run(here, "retire", "tweets") == 0
    assert objects_in(uri).keys() == names - own | {
        f"increments/{read_champion(here).head}/{name}" for name in ("manifest.json", "run.json")
    }
    assert f"removed {uri}/{sorted(own)[0]}" in capsys.readouterr().out
    assert run(there, "sync") == 0
    assert same_work(here) == same_work(there)  # what was withdrawn is gone there too
    empty = tmp_path / "empty"
    assert run(empty, "sync", uri) == 0 and same_work(empty) == same_work(here)
    for work_dir in (here, there, empty):
        assert wrong(work_dir, uri) == {}

    objects = open_objects(uri)
    objects.write(f"bank/{'0' * 64}.safetensors", b"left by a refused writer")
    objects.write(f"increments/{'1' * 64}/row.json", b"so is this")
    assert "2 more belong to no increment" in str(audit(here, store=store))
    capsys.readouterr()
    assert run(here, "gc") == 0 and f"{uri}/bank/{'0' * 64}.safetensors\n" in capsys.readouterr().out
    assert objects.size(f"increments/{'1' * 64}/row.json") == 10
    assert run(here, "gc", "--delete") == 0
    assert objects.size(f"bank/{'0' * 64}.safetensors") is objects.size(f"increments/{'1' * 64}/row.json") is None
    learn(there, by_hand, "news", store)
    assert run(here, "gc", "--delete") == 0 and (here / "increments" / "0006-news").is_dir()
    assert wrong(here, uri) == {}


def test_what_a_writer_is_about_to_point_to_is_not_lost_to_one_who_removes(by_hand, tmp_path, uri):
    work_dir = tmp_path / "work"
    learn(work_dir, by_hand, "reviews", open_store(uri))
    shutil.copytree(work_dir, tmp_path / "other")
    store, other, removed = Store(open_objects(uri)), Store(open_objects(uri)), []
    move = store.objects.replace

    def move_late(name, data, version):
        if name == "champion.json" and not removed:  # all of the increment stands, and nothing leads to it yet
            assert bank_command.main(["--work-dir", str(tmp_path / "other"), "sync", uri]) == 0
            head = read_champion(tmp_path / "other").head
            reached = {name for name in objects_in(uri) if head in name or name.startswith("bank/")}
            news = [n for n in other.names() if n not in reached or n.split("/")[1][:64] not in known]
            removed.extend(other.sweep(head, lambda: news))
        return move(name, data, version)

    known = {path.stem for path in (work_dir / "bank").iterdir()} | {read_champion(work_dir).head}
    store.objects.replace = move_late
    learn(work_dir, by_hand, "tweets", store)
    assert len(removed) == 6  # two bank files, manifest, run record, row and predictions: all were there and went
    assert wrong(work_dir, uri) == {} and store.pointer().sweeps == 1


def test_a_killed_removal_holds_writers_off_until_it_is_finished(by_hand, tmp_path, uri, capsys):
    work_dir = tmp_path / "work"
    learn(work_dir, by_hand, "reviews", open_store(uri))
    open_in_step(work_dir, uri)
    store = open_store(uri)
    pointer = store.pointer()
    left = Pointer(pointer.champion, 0, {"host": "gone", "pid": 1, "since": "then", "command": "removing objects"})
    assert store.objects.replace("champion.json", left.to_bytes(), pointer.version)
    message = r"a job is removing objects there \(host gone, process 1, since then.*--break-lock gc --delete"
    with pytest.raises(UserError, match=message):
        open_in_step(work_dir, uri)
    with pytest.raises(UserError, match=message):
        learn(work_dir, by_hand, "tweets", store)
    run = lambda *command: bank_command.main(["--work-dir", str(work_dir), *command])  # noqa: E731
    assert run("gc", "--delete") == 2
    assert run("--break-lock", "gc", "--delete") == 0
    learn(work_dir, by_hand, "tweets", store)
    assert wrong(work_dir, uri) == {} and fold(load_chain(work_dir)) == store.pointer().champion


def test_a_manifest_that_no_longer_follows_the_store_is_not_uploaded(by_hand, tmp_path, uri):
    learn(tmp_path / "first", by_hand, "reviews", open_store(uri))
    before = objects_in(uri)
    with pytest.raises(UserError, match=r"another job published increment 1 \(reviews\) there meanwhile"):
        learn(tmp_path / "second", by_hand, "tweets", open_store(uri))
    assert objects_in(uri) == before and not (tmp_path / "second" / "champion.json").exists()
    staged = next((tmp_path / "second" / "inflight").iterdir())
    manifest = Manifest.model_validate_json((staged / "manifest.json").read_bytes())
    with pytest.raises(UserError, match="there meanwhile"):
        publish(tmp_path / "second", staged, manifest, open_store(uri))
