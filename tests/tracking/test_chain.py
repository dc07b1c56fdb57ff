"""The chain: what the champion is, and that publishing is all or nothing at every moment a process can die."""

import json
import os
import shutil
from pathlib import Path

import pytest

from data_contracts.errors import UserError
from pipeline.tracking.chain import clean_left_overs, fold, load_chain, publish
from pipeline.tracking.champion import read_champion
from pipeline.tracking.manifest import Manifest


def flip(path, position=-1):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_the_champion_is_the_fold_worked_out_by_hand(by_hand, tmp_path):
    first, second, third = by_hand.publish_all(tmp_path)
    reviews, tweets = first.bundles["product_reviews"], third.bundles["tweets"]

    assert json.loads((tmp_path / "champion.json").read_bytes()) == {
        "format": 1,
        "head": third.sha256,
        "increment": 3,
        "bundles": {
            "product_reviews": {
                "dedicated": reviews["dedicated"],
                "shared": tweets["shared"],
                "gate": reviews["gate"],
            },
            "tweets": tweets,
        },
        "state": {"product_reviews": first.state},
    }
    assert fold([third, first, second]) == read_champion(tmp_path)
    assert load_chain(tmp_path) == [third, second, first]


def test_a_rejected_increment_moves_the_head_and_nothing_else(by_hand, tmp_path):
    first, second = by_hand.publish_all(tmp_path, count=2)
    champion = read_champion(tmp_path)
    assert champion.head == second.sha256
    assert champion.increment == 1
    assert champion.bundles == first.bundles
    assert champion.state == {"product_reviews": first.state}


def test_a_chain_that_starts_with_a_rejection_has_no_promoted_increment(by_hand):
    champion = fold([Manifest(**by_hand.fields(verdict="rejected"))])
    assert (champion.increment, champion.bundles, champion.state) == (0, {}, {})


def test_a_task_learned_again_replaces_its_bundle_and_state(by_hand):
    old, new = "1" * 64, "2" * 64
    first = Manifest(
        **by_hand.fields(bundles={"tweets": {"gate": old}}, bank={"gate": old}, state={"s": old}, task="tweets")
    )
    again = by_hand.fields(
        increment=2, parent=first.sha256, task="tweets", bundles={"tweets": {"lora": new}}, bank={"lora": new}
    )
    champion = fold([first, Manifest(**again)])
    assert champion.bundles == {"tweets": {"lora": new}}
    assert champion.state == {}
    assert fold([first, Manifest(**again | {"state": {"s": new}})]).state == {"tweets": {"s": new}}


def test_a_newer_router_takes_the_place_of_the_older_one_wherever_that_stood(by_hand):
    old, new, own = by_hand.sha("old router"), by_hand.sha("new router"), by_hand.sha("own")

    def manifest(number, task, parent, state, verdict="promoted"):
        fields = {"increment": number, "task": task, "parent": parent, "state": state, "verdict": verdict}
        return Manifest(**by_hand.fields(**fields, bank=state))

    first = manifest(1, "tweets", None, {"state": own, "router": old})
    second = manifest(2, "reviews", first.sha256, {"router": new})
    rejected = manifest(2, "reviews", first.sha256, {}, "rejected")
    without = manifest(3, "mails", second.sha256, {})
    assert fold([first, second]).state == {"tweets": {"state": own}, "reviews": {"router": new}}
    assert fold([first, rejected]).state == {"tweets": {"state": own, "router": old}}
    assert fold([first, second, without]).state == {"tweets": {"state": own}, "reviews": {"router": new}}


def test_bundles_and_state_that_an_increment_does_not_change_stay(by_hand):
    old, new = "1" * 64, "2" * 64
    first = Manifest(
        **by_hand.fields(task="tweets", bundles={"tweets": {"gate": old}}, bank={"gate": old}, state={"s": old})
    )
    second = by_hand.fields(
        increment=2,
        parent=first.sha256,
        bundles={"product_reviews": {"gate": new}},
        bank={"gate": new},
        state={"s": new},
    )
    champion = fold([first, Manifest(**second)])
    assert champion.bundles == {"tweets": {"gate": old}, "product_reviews": {"gate": new}}
    assert champion.state == {"tweets": {"s": old}, "product_reviews": {"s": new}}


def test_the_champion_file_is_replaced_and_never_edited(by_hand, tmp_path):
    steps = by_hand.increments(tmp_path)
    manifest, staged = next(steps)
    publish(tmp_path, staged, manifest)
    before = (tmp_path / "champion.json").read_bytes()
    os.link(tmp_path / "champion.json", tmp_path / "same file")
    manifest, staged = next(steps)
    publish(tmp_path, staged, manifest)
    assert (tmp_path / "same file").read_bytes() == before
    assert (tmp_path / "champion.json").read_bytes() != before


def test_before_anything_is_published_there_is_no_champion_and_no_chain(tmp_path):
    assert read_champion(tmp_path) is None
    assert load_chain(tmp_path) == []
    assert clean_left_overs(tmp_path) == []
    assert fold([]) is None


def test_a_published_folder_holds_what_was_staged_and_the_manifest(by_hand, tmp_path):
    (first,) = by_hand.publish_all(tmp_path, count=1)
    assert by_hand.files_of(tmp_path / "increments") == {
        "0001-product_reviews/manifest.json": first.to_bytes(),
        "0001-product_reviews/row.json": b"[0.75]",
        "0001-product_reviews/predictions/product_reviews.parquet": b"rows",
        "0001-product_reviews/run.json": b'{"host":"somewhere"}',
    }
    assert not (tmp_path / "inflight" / "publish-1").exists()


def test_publishing_the_head_again_changes_nothing(by_hand, tmp_path):
    manifests = by_hand.publish_all(tmp_path, count=2)
    before = by_hand.files_of(tmp_path)
    publish(tmp_path, tmp_path / "inflight" / "publish-2", manifests[-1])
    assert by_hand.files_of(tmp_path) == before


@pytest.mark.parametrize("count", [0, 2], ids=["first", "third"])
def test_a_kill_at_any_moment_of_publishing_leaves_the_old_champion_or_the_new_one_whole(by_hand, tmp_path, count):
    """Killed before every single file-system operation in turn; each time the next publish then succeeds."""
    start = tmp_path / "start"
    steps = by_hand.increments(start)
    for _ in range(count):
        manifest, staged = next(steps)
        publish(start, staged, manifest)
    manifest, staged = next(steps)
    old = read_champion(start)

    outcomes = []
    for step in range(100):
        work_dir = tmp_path / f"killed-{step}"
        shutil.copytree(start, work_dir)
        staged_here = work_dir / staged.relative_to(start)
        killed = by_hand.die_at(step, lambda work=work_dir, stage=staged_here: publish(work, stage, manifest))

        champion = read_champion(work_dir)
        chain = load_chain(work_dir)
        assert champion == fold(chain)
        if champion == old:
            outcomes.append("old")
            assert len(chain) == count
            shutil.rmtree(staged_here, ignore_errors=True)
            shutil.copytree(start / staged.relative_to(start), staged_here)
            publish(work_dir, staged_here, manifest)
            champion = read_champion(work_dir)
        else:
            outcomes.append("new")
        assert champion.head == manifest.sha256
        assert [link.increment for link in load_chain(work_dir)] == list(range(count + 1, 0, -1))
        clean_left_overs(work_dir)
        assert [path for path in work_dir.rglob(".*") if "inflight" not in path.parts] == []
        assert len(list((work_dir / "increments").iterdir())) == count + 1
        if not killed:
            break
    assert not killed, "publish has more steps than this test tries"
    assert "old" in outcomes
    assert outcomes == sorted(outcomes, reverse=True), "the champion changes once, and stays"
    assert len(outcomes) > 10


def test_left_overs_of_a_killed_publish_are_removed_and_named(by_hand, tmp_path):
    by_hand.publish_all(tmp_path, count=1)
    (tmp_path / "increments" / "0002-tweets" / "predictions").mkdir(parents=True)
    (tmp_path / "increments" / "0002-tweets" / "manifest.json").write_text("{}")
    (tmp_path / ".champion.json.ab12.tmp").write_text("half")
    (tmp_path / "bank" / ".x.safetensors.ab12.tmp").write_text("half")
    before = read_champion(tmp_path)

    assert clean_left_overs(tmp_path) == [
        ".champion.json.ab12.tmp",
        "bank/.x.safetensors.ab12.tmp",
        "increments/0002-tweets",
    ]
    assert clean_left_overs(tmp_path) == []
    assert load_chain(tmp_path)[0].increment == 1
    assert read_champion(tmp_path) == before


def test_published_increments_are_not_taken_for_left_overs_when_the_champion_file_is_lost(by_hand, tmp_path):
    manifests = by_hand.publish_all(tmp_path)
    before = by_hand.files_of(tmp_path / "increments")
    (tmp_path / "champion.json").unlink()
    again = Manifest(**by_hand.fields(task="editorials"))
    staged = tmp_path / "inflight" / "publish-1"
    staged.mkdir(parents=True)
    with pytest.raises(UserError, match=r"champion\.json: missing, but increments/ holds 0001-.*0003-tweets; restore"):
        publish(tmp_path, staged, again)
    assert by_hand.files_of(tmp_path / "increments") == before

    (tmp_path / "champion.json").write_bytes(fold(manifests[:1]).to_bytes())
    with pytest.raises(UserError, match="its head is increment 1, but increments/ holds 0002-tweets, 0003-tweets"):
        clean_left_overs(tmp_path)
    assert by_hand.files_of(tmp_path / "increments") == before


def test_a_process_that_publishes_on_sees_what_others_did_to_increments(by_hand, tmp_path):
    pairs = by_hand.increments(tmp_path)
    manifest, staged = next(pairs)
    publish(tmp_path, staged, manifest)
    (tmp_path / "increments" / "0002-left_over").mkdir()
    manifest, staged = next(pairs)
    publish(tmp_path, staged, manifest)
    assert sorted(os.listdir(tmp_path / "increments")) == ["0001-product_reviews", manifest.folder]

    (tmp_path / "increments" / "0007-published").mkdir()
    manifest, staged = next(pairs)
    with pytest.raises(UserError, match="its head is increment 2, but increments/ holds 0007-published"):
        publish(tmp_path, staged, manifest)
    (tmp_path / "increments" / "0007-published").rmdir()
    publish(tmp_path, staged, manifest)
    assert [entry.increment for entry in load_chain(tmp_path)] == [3, 2, 1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda staged: (staged / "row.json").unlink(), "row.json is missing"),
        (lambda staged: flip(staged / "row.json"), "row.json was altered"),
        (lambda staged: (staged / "extra.txt").write_text("x"), "extra.txt is not named by the manifest"),
        (lambda staged: (staged / "link").symlink_to("/etc/passwd"), "link is not named by the manifest"),
        (lambda staged: (staged / "manifest.json").write_text("{}"), "manifest.json was altered"),
    ],
)
def test_staged_files_that_disagree_with_the_manifest_are_not_published(by_hand, tmp_path, damage, message):
    manifest, staged = next(by_hand.increments(tmp_path))
    damage(staged)
    with pytest.raises(UserError, match=f"increment 1 is not published: .*{message}"):
        publish(tmp_path, staged, manifest)
    assert read_champion(tmp_path) is None
    assert not (tmp_path / "increments").exists()


def test_an_increment_with_an_altered_or_missing_bank_file_is_not_published(by_hand, tmp_path):
    manifest, staged = next(by_hand.increments(tmp_path))
    path = tmp_path / "bank" / f"{manifest.bank['shared']}.safetensors"
    flip(path)
    with pytest.raises(UserError, match=f"{manifest.bank['shared']}.safetensors: this bank file was altered"):
        publish(tmp_path, staged, manifest)
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        publish(tmp_path, staged, manifest)
    assert read_champion(tmp_path) is None


def test_an_increment_that_does_not_follow_the_head_is_not_published(by_hand, tmp_path):
    by_hand.publish_all(tmp_path, count=1)
    for changes in ({"increment": 1}, {"increment": 2, "parent": "0" * 64}, {"increment": 3, "parent": "0" * 64}):
        with pytest.raises(UserError, match="does not follow the chain's head, which is increment 1"):
            publish(tmp_path, tmp_path / "inflight" / "x", Manifest(**by_hand.fields(task="tweets", **changes)))


def test_the_chain_names_the_manifest_in_which_one_byte_was_changed(by_hand, tmp_path):
    manifests = by_hand.publish_all(tmp_path)
    for manifest, who in zip(manifests, ["increment 2 names", "increment 3 names", "champion.json names"], strict=True):
        path = tmp_path / "increments" / manifest.folder / "manifest.json"
        whole = path.read_bytes()
        for position in range(0, len(whole), 97):
            flip(path, position)
            with pytest.raises(UserError, match=f"{manifest.folder}/manifest.json: the manifest .* that {who}"):
                load_chain(tmp_path)
            path.write_bytes(whole)
    assert load_chain(tmp_path)


def test_every_changed_byte_of_the_champion_file_is_found(by_hand, tmp_path):
    by_hand.publish_all(tmp_path)
    path = tmp_path / "champion.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        flip(path, position)
        with pytest.raises(UserError, match=r"champion\.json"):
            load_chain(tmp_path)
        path.write_bytes(whole)


def test_a_swapped_bundle_in_the_champion_file_is_named_by_task_and_role(by_hand, tmp_path):
    first, _, third = by_hand.publish_all(tmp_path)
    old, new = third.bundles["tweets"]["gate"], first.bundles["product_reviews"]["gate"]
    path = tmp_path / "champion.json"
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))
    with pytest.raises(UserError, match=f"bundles tweets gate is {new}, the chain says {old}"):
        load_chain(tmp_path)


def test_a_renamed_increment_folder_is_named(by_hand, tmp_path):
    by_hand.publish_all(tmp_path, count=1)
    (tmp_path / "increments" / "0001-product_reviews").rename(tmp_path / "increments" / "0001-tweets")
    with pytest.raises(UserError, match="0001-tweets: this folder holds the manifest of 0001-product_reviews"):
        load_chain(tmp_path)


def test_a_champion_file_with_a_path_for_a_digest_is_refused(by_hand, tmp_path):
    by_hand.publish_all(tmp_path, count=1)
    path = tmp_path / "champion.json"
    content = json.loads(path.read_bytes())
    for change in (
        {"head": "../" * 21 + "x"},
        {"bundles": {"../x": {}}},
        {"bundles": {"tweets": {"gate": "/etc/passwd"}}},
    ):
        path.write_text(json.dumps(content | change, sort_keys=True, separators=(",", ":")))
        with pytest.raises(UserError, match=r"champion\.json: not a valid champion file"):
            read_champion(tmp_path)


def test_relative_and_absolute_work_dirs_are_the_same(by_hand, tmp_path, monkeypatch):
    by_hand.publish_all(tmp_path, count=2)
    monkeypatch.chdir(tmp_path)
    assert load_chain(Path(".")) == load_chain(tmp_path)
