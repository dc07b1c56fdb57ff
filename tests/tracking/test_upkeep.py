"""Restoring, retiring and collecting garbage: new entries in the chain, nothing rewritten, nothing removed too much."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest

from data_contracts.errors import UserError
from jobs import bank as command
from pipeline.experts.bank import Bank
from pipeline.increments import standing
from pipeline.stages.validate import refuse_retired
from pipeline.tracking.audit import audit
from pipeline.tracking.chain import fold, load_chain
from pipeline.tracking.champion import read_champion
from pipeline.tracking.history import History
from pipeline.tracking.manifest import Manifest
from pipeline.tracking.reading import as_of
from pipeline.tracking.registry import Registry
from pipeline.tracking.withdrawal import withdrawn_paths
from pipeline.upkeep import collect_garbage, restore, retire
from tests.tracking.chains import Chain, data_of, wrong


@pytest.fixture
def chain(tmp_path, by_hand):
    return Chain(tmp_path, by_hand)


# ---------------------------------------------------------------- restore


def test_a_restored_champion_is_what_it_was_and_nothing_is_rewritten(chain, by_hand):
    work_dir = chain.work_dir
    first = chain.learn("reviews", state={"state": chain.put(50), "router": chain.put(60)})
    chain.learn("tweets", moved={"reviews": {"dedicated": first.bank["dedicated"]}}, state={"router": chain.put(61)})
    third = chain.learn("mails")
    before = by_hand.files_of(work_dir / "increments") | by_hand.files_of(work_dir / "bank")

    change = restore(work_dir, 1).change

    after = by_hand.files_of(work_dir / "increments") | by_hand.files_of(work_dir / "bank")
    added = {name: data for name, data in after.items() if name not in before}
    assert {name: data for name, data in after.items() if name in before} == before
    assert sorted(added) == ["0004-restored.1/manifest.json", "0004-restored.1/run.json"]
    assert json.loads(added["0004-restored.1/manifest.json"]) == {
        "format": 1, "increment": 4, "parent": third.sha256, "verdict": "restored", "to": 1, "task": None,
        "withdrawn": [], "withdrawn_files": {}, "withdrawn_data": [],
    }  # fmt: skip
    champion = read_champion(work_dir)
    assert (champion.head, champion.increment) == (change.sha256, 1)
    assert champion.bundles == {"reviews": first.bundles["reviews"]}
    assert champion.state == {"reviews": first.state}
    assert wrong(work_dir) == {}
    history = History.of(load_chain(work_dir))
    assert (history.length, list(history.learned), history.row) == (4, ["reviews"], {"reviews": 0.5})
    assert history.promoted == first and history.in_effect == {1}
    assert not (work_dir / "inflight").exists()


def test_increments_follow_a_restored_champion_and_earlier_ones_can_be_served(chain):
    chain.learn("reviews")
    tweets = chain.learn("tweets", tasks=["reviews"])
    restore(chain.work_dir, 1)
    mails = chain.learn("mails", tasks=["reviews"])
    again = chain.learn("tweets", tasks=["reviews", "mails"])
    assert (mails.increment, again.increment) == (4, 5)
    assert list(read_champion(chain.work_dir).bundles) == ["reviews", "mails", "tweets"]
    assert as_of(chain.work_dir, 2).bundle("tweets") == tweets.bundles["tweets"]
    assert as_of(chain.work_dir).learned("tweets") == again
    assert [manifest.increment for manifest in as_of(chain.work_dir).chain] == [5, 4, 1]
    with pytest.raises(UserError, match=r"task 'tweets' is not learned .* learned: reviews$"):
        as_of(chain.work_dir, 3).bundle("tweets")
    restore(chain.work_dir, 3)  # as it was after a restoring entry
    assert list(read_champion(chain.work_dir).bundles) == ["reviews"]
    assert fold(load_chain(chain.work_dir)) == read_champion(chain.work_dir)
    assert wrong(chain.work_dir) == {}


def test_restoring_back_and_forth_costs_no_more_each_time(chain):
    first, second = chain.learn("reviews"), chain.learn("tweets")
    for number in range(40):
        restore(chain.work_dir, 1 if number % 2 == 0 else len(load_chain(chain.work_dir)) - 1)
    assert read_champion(chain.work_dir).bundles == first.bundles | second.bundles
    assert History.of(load_chain(chain.work_dir)).length == 42


def test_a_task_of_the_time_after_the_restored_champion_is_new_again(chain):
    chain.learn("reviews")
    manifest = chain.learn("tweets")
    data = {split: record.digest for split, record in manifest.data.items()}
    task = SimpleNamespace(task="tweets", contract=manifest.contract, data_digests=data)
    assert standing(task, History.of(load_chain(chain.work_dir)), manifest.learning_digest) == "learned"
    restore(chain.work_dir, 1)
    assert standing(task, History.of(load_chain(chain.work_dir)), manifest.learning_digest) == "new"


@pytest.mark.parametrize(
    ("number", "message"),
    [(0, "has no increment 0; it has 1 to 3"), (4, "has no increment 4"), (2, "increment 2 was rejected"),
     (3, "there is nothing to restore")],
)  # fmt: skip
def test_what_cannot_be_restored_is_refused(chain, number, message):
    chain.learn("reviews")
    chain.learn("tweets", verdict="rejected")
    chain.learn("tweets")
    with pytest.raises(UserError, match=message):
        restore(chain.work_dir, number)
    assert len(load_chain(chain.work_dir)) == 3


def test_a_champion_whose_files_are_damaged_is_not_restored(chain):
    first = chain.learn("reviews")
    chain.learn("reviews")
    path = chain.bank.path(first.bank["shared"])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{first.bank['shared']}.safetensors: this bank file was altered"):
        restore(chain.work_dir, 1)
    assert len(load_chain(chain.work_dir)) == 2


# ---------------------------------------------------------------- retire


def test_a_retired_task_takes_its_experts_predictions_and_data_along_and_the_chain_verifies(chain, by_hand):
    work_dir = chain.work_dir
    router = chain.put(60, component="router", tasks=["reviews"])
    first = chain.learn("reviews", state={"router": router})
    both = chain.put(61, component="router", tasks=["reviews", "tweets"])
    state = chain.put(51)
    rejected = chain.learn("tweets", verdict="rejected", tasks=["reviews"])
    tweets = chain.learn("tweets", tasks=["reviews"], state={"state": state, "router": both})
    newer = chain.put(62, component="router", tasks=["reviews", "tweets", "mails"])
    mails = chain.learn("mails", tasks=["reviews", "tweets"], state={"router": newer})
    data, kept = data_of(work_dir, "tweets"), data_of(work_dir, "mails")

    done = retire(work_dir, "tweets")

    made = {rejected.bank[n] for n in ("dedicated", "shared")} | {tweets.bank[n] for n in ("dedicated", "shared")}
    assert set(done.change.withdrawn) == made | {state, both, newer}
    assert set(Bank(work_dir / "bank").digests()) == {
        *first.bank.values(),
        mails.bank["dedicated"],
        mails.bank["shared"],
    }
    left = {name for name in by_hand.files_of(work_dir / "increments") if "predictions" in name}
    assert left == {
        "0001-reviews/predictions/reviews.parquet", "0002-tweets/predictions/reviews.parquet",
        "0003-tweets/predictions/reviews.parquet", "0004-mails/predictions/reviews.parquet",
        "0004-mails/predictions/mails.parquet",
    }  # fmt: skip
    assert not any(path.exists() for path in data) and all(path.exists() for path in kept)
    champion = read_champion(work_dir)
    assert champion.bundles == {"reviews": first.bundles["reviews"], "mails": mails.bundles["mails"]}
    assert champion.state == {}  # the newest router knew the task; the older one is not the champion's
    findings = {finding.name: finding for finding in audit(work_dir)}
    assert all(finding.ok for finding in findings.values())
    assert findings["task tweets"].detail == "withdrawn by increment 5 with 12 files, all gone"
    assert (
        findings["bank"].detail.endswith("7 withdrawn")
        and "1 withdrawn" in findings["increments/0004-mails files"].detail
    )
    assert any("router" in note for note in done.notes) and any(note.startswith("mails learned") for note in done.notes)
    chain.learn("chats", tasks=["reviews", "mails"])
    assert wrong(work_dir) == {}
    data[0].parent.mkdir(parents=True, exist_ok=True)  # as a machine has it whose work another one retired
    data[0].touch()
    assert withdrawn_paths(work_dir, load_chain(work_dir)) == [data[0]]
    retire(work_dir, "tweets")
    assert not data[0].exists()


def test_a_task_whose_expert_another_task_is_served_with_is_not_retired(chain, by_hand):
    first = chain.learn("reviews")
    chain.learn("tweets", moved={"reviews": {"dedicated": first.bank["dedicated"]}})
    before = by_hand.files_of(chain.work_dir / "increments") | by_hand.files_of(chain.work_dir / "bank")
    with pytest.raises(
        UserError, match=r"'tweets' cannot be withdrawn: task 'reviews' is served with its shared; restore"
    ):
        retire(chain.work_dir, "tweets")
    assert by_hand.files_of(chain.work_dir / "increments") | by_hand.files_of(chain.work_dir / "bank") == before
    restore(chain.work_dir, 1)  # the remedy it names
    retire(chain.work_dir, "tweets")
    assert wrong(chain.work_dir) == {}
    with pytest.raises(UserError, match=r"increment 2 cannot be restored: it serves task 'reviews' with the shared"):
        restore(chain.work_dir, 2)
    with pytest.raises(
        UserError, match=r"'reviews' cannot be served as of this increment: it had the shared .* 'tweets'"
    ):
        as_of(chain.work_dir, 2).bundle("reviews")


def test_experts_of_the_past_that_other_bundles_sum_up_are_not_withdrawn(chain):
    """As olora, mocl and moses publish: a later bundle names the earlier task's file as past.1."""
    first = chain.learn("reviews")
    past = {"past.1": first.bank["dedicated"]}
    second = Manifest.model_validate(chain.learn("tweets").model_dump())
    chain.learn("mails", moved={"tweets": dict(second.bundles["tweets"]) | past})
    with pytest.raises(UserError, match=r"'reviews' cannot be withdrawn: task 'tweets' is served with its past\.1"):
        retire(chain.work_dir, "reviews")


def test_a_retired_task_is_refused_in_one_sentence_and_not_learned_again_as_it_was(chain, by_hand):
    chain.learn("reviews")
    tweets = chain.learn("tweets")
    assert as_of(chain.work_dir).serves("tweets")
    retire(chain.work_dir, "tweets")
    for increment in (None, 2):
        at = as_of(chain.work_dir, increment)
        assert not at.serves("tweets") and at.serves("reviews")
        with pytest.raises(UserError, match=r"^task 'tweets' was withdrawn with its experts \(increment 3\)"):
            at.bundle("tweets")
    history = History.of(load_chain(chain.work_dir))
    old = SimpleNamespace(task="tweets", version=tweets.contract.version)
    with pytest.raises(UserError, match=r"withdrawn \(increment 3\); take its contract out .* new version"):
        refuse_retired(old, history)
    refuse_retired(SimpleNamespace(task="tweets", version="2.0.0"), history)
    refuse_retired(SimpleNamespace(task="reviews", version="1.0.0"), history)
    contract = by_hand.fields()["contract"] | {"version": "2.0.0"}
    again = chain.learn("tweets", contract=contract)
    assert as_of(chain.work_dir).bundle("tweets") == again.bundles["tweets"]
    restore(chain.work_dir, 2)
    assert list(read_champion(chain.work_dir).bundles) == ["reviews"]  # the withdrawn one does not come back
    restore(chain.work_dir, 4)
    assert read_champion(chain.work_dir).bundles["tweets"] == again.bundles["tweets"]
    assert wrong(chain.work_dir) == {}


def test_what_was_withdrawn_and_is_still_there_is_named_and_removed_by_the_same_command(chain, monkeypatch):
    tweets = chain.learn("tweets")
    chain.learn("reviews", tasks=["tweets"])
    data_of(chain.work_dir, "tweets")
    kept = shutil.copytree(chain.work_dir, chain.work_dir.parent / "kept")
    retire(chain.work_dir, "tweets")
    for folder in ("bank", "increments", "prepared", "quarantine"):
        shutil.copytree(kept / folder, chain.work_dir / folder, dirs_exist_ok=True)
    names = {
        *(f"bank/{sha}.safetensors" for sha in tweets.bank.values()),
        *(f"increments/{folder}/predictions/tweets.parquet" for folder in ("0001-tweets", "0002-reviews")),
        f"prepared/tweets/{'a' * 64}", f"quarantine/tweets/{'b' * 64}.parquet",
    }  # fmt: skip
    found = wrong(chain.work_dir)
    assert names <= set(found) and all("withdrawn with task 'tweets' and is still there" in found[n] for n in names)
    assert set(collect_garbage(chain.work_dir, delete=False)) == names
    assert set(retire(chain.work_dir, "tweets").removed) == names
    assert len(load_chain(chain.work_dir)) == 3
    assert wrong(chain.work_dir) == {}


def test_an_unknown_task_is_refused_with_the_tasks_there_are(chain):
    chain.learn("reviews")
    with pytest.raises(UserError, match=r"task 'tweets' was never learned .* there are: reviews"):
        retire(chain.work_dir, "tweets")


def test_a_stream_whose_only_task_is_retired_serves_nothing_and_goes_on(chain):
    chain.learn("reviews")
    retire(chain.work_dir, "reviews")
    with pytest.raises(UserError, match=r"every task .* is withdrawn"):
        as_of(chain.work_dir)
    chain.learn("tweets")
    assert list(read_champion(chain.work_dir).bundles) == ["tweets"]
    assert wrong(chain.work_dir) == {}


@pytest.mark.parametrize("action", [lambda work: restore(work, 1), lambda work: retire(work, "tweets")])
def test_a_kill_at_any_moment_leaves_the_change_whole_or_not_at_all_and_the_command_goes_on(
    chain, by_hand, tmp_path, action
):
    chain.learn("reviews")
    chain.learn("tweets", tasks=["reviews"])
    start = shutil.copytree(chain.work_dir, tmp_path / "start")
    action(chain.work_dir)
    done = read_champion(chain.work_dir)
    for step in range(60):
        work_dir = shutil.copytree(start, tmp_path / f"killed-{step}")
        killed = by_hand.die_at(step, lambda work_dir=work_dir: action(work_dir))
        assert fold(load_chain(work_dir)) == read_champion(work_dir)
        assert read_champion(work_dir) in (read_champion(start), done)
        try:
            action(work_dir)
        except UserError as error:
            assert "nothing to restore" in str(error)
        assert read_champion(work_dir) == done
        collect_garbage(work_dir, delete=True)
        assert wrong(work_dir) == {} and not list(work_dir.rglob(".*"))
        if not killed:
            break
    assert not killed and step > 10


# ---------------------------------------------------------------- gc


def test_garbage_is_named_first_and_only_what_nothing_reaches_is_removed(chain, by_hand, capsys):
    work_dir = chain.work_dir
    chain.learn("reviews")
    chain.learn("tweets", verdict="rejected")
    chain.learn("tweets")
    restore(work_dir, 1)
    published = by_hand.files_of(work_dir)
    spare = chain.put(99)
    strays = [f"bank/{spare}.safetensors", "bank/.x.tmp", ".champion.json.ab.tmp", "inflight/publish-9/row.json",
              "prepared/tweets/.abc.1234/train.arrow", "quarantine/tweets/.q.parquet.1.tmp",
              "increments/0005-mails/row.json"]  # fmt: skip
    for name in strays[1:]:
        (work_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (work_dir / name).write_text("half")
    data = data_of(work_dir, "mails")
    (work_dir / "inflight" / "state.safetensors").write_text("an increment at work")
    kept = published | {"inflight/state.safetensors": b"an increment at work"}
    everything = by_hand.files_of(work_dir)

    assert command.main(["--work-dir", str(work_dir), "gc"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert by_hand.files_of(work_dir) == everything
    assert sorted(printed[:-1]) == sorted(
        ["inflight/publish-9", "prepared/tweets/.abc.1234", "increments/0005-mails"]
        + [name for name in strays if not name.startswith(("inflight", "prepared", "increments"))]
    )
    assert printed[-1] == "7 files and folders that nothing reaches would be removed (--delete removes them)"
    assert command.main(["--work-dir", str(work_dir), "gc", "--delete"]) == 0
    left = by_hand.files_of(work_dir)
    assert {name: data for name, data in left.items() if not name.startswith(("prepared", "quarantine"))} == kept
    assert all(path.exists() for path in data)
    assert "7 files and folders that nothing reaches removed" in capsys.readouterr().out
    assert command.main(["--work-dir", str(work_dir), "gc"]) == 0
    assert capsys.readouterr().out == "everything is reached\n"


def test_garbage_of_a_damaged_chain_is_not_collected(chain):
    chain.learn("reviews")
    chain.learn("tweets")
    spare = chain.put(99)
    path = chain.work_dir / "increments" / "0001-reviews" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"kept":7', b'"kept":8'))
    with pytest.raises(UserError, match=r"0001-reviews/manifest\.json"):
        collect_garbage(chain.work_dir, delete=True)
    assert Bank(chain.work_dir / "bank").has(spare)


# ---------------------------------------------------------------- the command, and MLflow


def test_the_command_registers_changes_and_the_audit_agrees(copied, capsys):
    from mlflow import MlflowClient

    for path in copied.glob("increments/*/run.json"):
        path.write_text(json.dumps({"config": {"stream": "reviews", "tracking": {}}, "inputs_key": "inputs"}))
    assert command.main(["--work-dir", str(copied), "restore", "1"]) == 0
    printed = capsys.readouterr().out
    assert "increment 4: the champion is as it was after increment 1" in printed and "MLflow" not in printed
    uri = f"sqlite:///{copied}/mlflow.db"
    registry = Registry(MlflowClient(uri, uri), "reviews")
    assert registry.aliases() == {"candidate": 4, "champion": 4}
    assert registry.versions()[-1].tags["task"] == "restored.1"
    assert wrong(copied, registry) == {}
    assert command.main(["--work-dir", str(copied), "retire", "tweets"]) == 0
    assert "increment 5: task tweets withdrawn" in capsys.readouterr().out
    assert registry.aliases() == {"candidate": 5, "champion": 5}
    assert wrong(copied, registry) == {}
    registry.client.set_model_version_tag("reviews", "5", "parent", "0" * 64)
    assert list(wrong(copied, registry)) == ["MLflow version of 0005-retired.tweets (version 5)"]


def test_mlflow_out_of_reach_stops_no_change_and_is_said(chain, capsys):
    chain.learn("reviews")
    chain.learn("tweets")
    assert command.main(["--work-dir", str(chain.work_dir), "restore", "1"]) == 0
    assert "MLflow was not told" in capsys.readouterr().out
    assert read_champion(chain.work_dir).increment == 1


@pytest.mark.parametrize("arguments", [["restore", "7"], ["retire", "nobody"], ["retire", "../x"]])
def test_a_users_mistake_is_one_sentence_and_exit_2(chain, capsys, arguments):
    chain.learn("reviews")
    assert command.main(["--work-dir", str(chain.work_dir), *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert command.main(["--work-dir", str(chain.work_dir / "nowhere"), *arguments]) == 2
    assert "is not there" in capsys.readouterr().err
    assert not (chain.work_dir / "lock.json").exists()
    assert os.listdir(chain.work_dir / "increments") == ["0001-reviews"]
