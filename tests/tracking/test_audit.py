"""The audit: silent on what is whole; every difference named, and never only the first."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from data_contracts.errors import UserError
from jobs import audit as command
from pipeline.experts.bank import Bank
from pipeline.tracking.audit import audit
from pipeline.tracking.chain import fold
from pipeline.tracking.registry import Registry

REPO = Path(__file__).resolve().parents[2]


def flip(path, position=-1):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def wrong(findings):
    """{name: details} of what differs."""
    found = {}
    for finding in findings:
        if not finding.ok:
            found.setdefault(finding.name, []).append(finding.detail)
    return found


def open_copy(work_dir):
    uri = f"sqlite:///{work_dir}/mlflow.db"
    return MlflowClient(uri, uri)


@pytest.fixture
def chain_only(by_hand, tmp_path):
    """A work_dir of three increments without MLflow, and its manifests."""
    return tmp_path, by_hand.publish_all(tmp_path)


def test_what_is_whole_passes_and_everything_is_listed(registered):
    findings = audit(registered.work_dir, registered.registry)
    assert wrong(findings) == {}
    assert [finding.name for finding in findings] == [
        "increments/0001-product_reviews/manifest.json",
        "increments/0002-tweets/manifest.json",
        "increments/0003-tweets/manifest.json",
        "increments/0001-product_reviews files",
        "increments/0002-tweets files",
        "increments/0003-tweets files",
        "champion.json",
        "bundle of product_reviews",
        "bundle of tweets",
        "bank",
        "MLflow version of 0001-product_reviews",
        "MLflow version of 0002-tweets",
        "MLflow version of 0003-tweets",
        "MLflow alias candidate",
        "MLflow alias champion",
    ]


def test_one_changed_byte_of_any_published_file_is_named(chain_only, by_hand):
    """Every file in turn, first and last byte; run.json is outside the chain."""
    work_dir, _ = chain_only
    published = sorted(by_hand.files_of(work_dir))
    assert len(published) == 3 * 4 + 8 + 1
    for name in published:
        whole = (work_dir / name).read_bytes()
        for position in (0, -1, len(whole) // 2):
            flip(work_dir / name, position)
            found = wrong(audit(work_dir))
            (work_dir / name).write_bytes(whole)
            if name.endswith("run.json"):
                assert found == {}
            elif "manifest.json" in name or name.startswith("bank/") or name == "champion.json":
                assert name in found
            else:
                folder, _, rest = name.removeprefix("increments/").partition("/")
                assert any(rest in detail for detail in found[f"increments/{folder} files"])
    assert wrong(audit(work_dir)) == {}


def test_every_removed_file_is_named(chain_only, by_hand):
    work_dir, _ = chain_only
    for name in by_hand.files_of(work_dir):
        (work_dir / name).rename(work_dir / "away")
        found = wrong(audit(work_dir))
        (work_dir / "away").rename(work_dir / name)
        assert bool(found) != name.endswith("run.json"), name
        file = name if name.startswith("bank/") else name.rpartition("/")[2]
        assert not found or any(file in f"{key} {details}" for key, details in found.items()), name


def test_many_differences_are_all_named_at_once(copied, registered):
    first, _, third = registered.manifests
    flip(copied / "increments" / "0001-product_reviews" / "row.json")
    (copied / "increments" / "0002-tweets" / "extra.txt").write_text("x")
    flip(copied / "bank" / f"{first.bank['gate']}.safetensors")
    (copied / "bank" / f"{third.bank['gate']}.safetensors").unlink()
    flip(copied / "increments" / "0003-tweets" / "manifest.json")
    client = open_copy(copied)
    client.set_model_version_tag("reviews", "2", "verdict", "promoted")
    client.set_registered_model_alias("reviews", "champion", "2")

    found = wrong(audit(copied, Registry(client, "reviews")))

    assert any("row.json was altered" in detail for detail in found["increments/0001-product_reviews files"])
    assert found["increments/0002-tweets files"] == ["extra.txt is not named by the manifest"]
    assert f"bank/{first.bank['gate']}.safetensors" in found
    assert f"bank/{third.bank['gate']}.safetensors" in found
    assert "increments/0003-tweets/manifest.json" in found
    assert any(f"but champion.json names {third.sha256}" in d for d in found["increments/0003-tweets/manifest.json"])
    assert "champion.json" in found
    assert found["MLflow version of 0002-tweets (version 2)"] == ["tag verdict is 'promoted', 'rejected' is expected"]
    assert "MLflow alias champion" in found


def test_a_manifest_rewritten_in_valid_form_breaks_the_links_on_both_sides(chain_only):
    work_dir, manifests = chain_only
    better = manifests[1].model_copy(update={"row": {"tweets": 1.0}})
    (work_dir / "increments" / "0002-tweets" / "manifest.json").write_bytes(better.to_bytes())
    found = wrong(audit(work_dir))
    assert found == {
        "increments/0002-tweets/manifest.json": [
            f"hashes to {better.sha256}, but increments/0003-tweets names {manifests[1].sha256}"
        ]
    }


def test_a_champion_set_back_in_valid_form_is_named(copied, registered):
    (copied / "champion.json").write_bytes(fold(registered.manifests[:2]).to_bytes())
    found = wrong(audit(copied, Registry(open_copy(copied), "reviews")))
    assert "champion.json ends at increment 2" in found["increments/0003-tweets"][0]
    assert "MLflow version 3" in found
    assert found["MLflow alias champion"] == ["names version 3, the chain says 1"]
    assert found["MLflow alias candidate"] == ["names version 3, the chain says 2"]


def test_a_whole_increment_cut_from_the_end_of_the_chain_is_seen_in_mlflow(copied, registered):
    (copied / "champion.json").write_bytes(fold(registered.manifests[:2]).to_bytes())
    for path in sorted((copied / "increments" / "0003-tweets").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (copied / "increments" / "0003-tweets").rmdir()
    assert wrong(audit(copied)) == {}, "the disk alone cannot tell"
    found = wrong(audit(copied, Registry(open_copy(copied), "reviews")))
    assert sorted(found) == ["MLflow alias candidate", "MLflow alias champion", "MLflow version 3"]


def test_a_champion_bundle_swapped_in_valid_form_is_named_by_task_and_role(chain_only):
    work_dir, manifests = chain_only
    champion = fold(manifests)
    rejected = manifests[1].bank["dedicated"]
    bundles = champion.bundles | {"tweets": champion.bundles["tweets"] | {"dedicated": rejected}}
    (work_dir / "champion.json").write_bytes(champion.model_copy(update={"bundles": bundles}).to_bytes())
    found = wrong(audit(work_dir))
    assert list(found) == ["champion.json"]
    assert found["champion.json"][0].startswith(f"bundles tweets dedicated is {rejected}, the chain says")


@pytest.mark.parametrize("version", ["1", "2", "3"])
def test_every_changed_tag_of_a_version_is_named(copied, registered, version):
    client = open_copy(copied)
    registry = Registry(client, "reviews")
    tags = dict(client.get_model_version("reviews", version).tags)
    assert len(tags) in (12, 15)
    for key, value in tags.items():
        client.set_model_version_tag("reviews", version, key, value[:-1] + ("0" if value[-1] != "0" else "1"))
        found = wrong(audit(copied, registry))
        client.set_model_version_tag("reviews", version, key, value)
        folder = registered.manifests[int(version) - 1].folder
        assert any(f"tag {key} is" in d for d in found[f"MLflow version of {folder} (version {version})"]), key
    assert wrong(audit(copied, registry)) == {}


def test_removed_and_added_tags_are_named(copied):
    client = open_copy(copied)
    client.delete_model_version_tag("reviews", "1", "contract_digest")
    client.set_model_version_tag("reviews", "2", "bundle.gate", "0" * 64)
    client.set_model_version_tag("reviews", "3", "reviewed_by", "somebody")
    found = wrong(audit(copied, Registry(client, "reviews")))
    assert sorted(found) == [
        "MLflow version of 0001-product_reviews (version 1)",
        "MLflow version of 0002-tweets (version 2)",
    ]
    assert found["MLflow version of 0001-product_reviews (version 1)"][0].startswith("tag contract_digest is None")
    assert found["MLflow version of 0002-tweets (version 2)"] == [f"tag bundle.gate is '{'0' * 64}', None is expected"]


def test_changed_aliases_tags_and_scores_of_runs_and_versions_are_named(copied, registered):
    client = open_copy(copied)
    registry = Registry(client, "reviews")
    client.set_registered_model_alias("reviews", "champion", "1")
    client.delete_registered_model_alias("reviews", "candidate")
    first, second = registered.run_ids[0], registered.run_ids[1]
    client.set_tag(first, "manifest_sha256", "0" * 64)
    client.log_metric(second, "row.tweets", 0.99, step=9)
    client.create_model_version("reviews", "file:///elsewhere", tags={"work_dir": str(registered.work_dir)})
    assert wrong(audit(copied, registry)) == {
        "MLflow alias champion": ["names version 1, the chain says 3"],
        "MLflow alias candidate": ["names version None, the chain says 3"],
        "MLflow version of 0001-product_reviews (version 1)": [
            f"run: tag manifest_sha256 is '{'0' * 64}', '{registered.manifests[0].sha256}' is expected"
        ],
        "MLflow version of 0002-tweets (version 2)": ["run: metric row.tweets is 0.99, the manifest says 0.5"],
        "MLflow version 4": ["of this work_dir, tagged increment None, is no increment of the chain"],
    }


def test_deleted_versions_and_runs_are_named(copied, registered):
    client = open_copy(copied)
    client.delete_model_version("reviews", "2")
    found = wrong(audit(copied, Registry(client, "reviews")))
    assert found["MLflow version of 0002-tweets"] == [
        f"no version of reviews belongs to {registered.manifests[1].sha256}"
    ]
    client.delete_registered_model("reviews")
    found = wrong(audit(copied, Registry(client, "reviews")))
    assert "MLflow version of 0001-product_reviews" in found
    assert "cannot be compared" in found["MLflow"][0]


def test_bank_files_of_no_increment_pass_when_whole_and_stray_names_are_named(chain_only):
    work_dir, _ = chain_only
    spare = Bank(work_dir / "bank").put({"spare": torch.ones(1)})
    (work_dir / "bank" / ".x.safetensors.ab.tmp").write_text("half-written")
    findings = audit(work_dir)
    assert wrong(findings) == {}
    assert "1 more belong to no increment" in next(finding.detail for finding in findings if finding.name == "bank")
    flip(work_dir / "bank" / f"{spare}.safetensors")
    (work_dir / "bank" / "notes.txt").write_text("x")
    (work_dir / "increments" / "old").mkdir()
    assert sorted(wrong(audit(work_dir))) == [f"bank/{spare}.safetensors", "bank/notes.txt", "increments/old"]


def test_two_folders_of_one_number_and_a_gap_are_named(chain_only):
    work_dir, _ = chain_only
    increments = work_dir / "increments"
    (increments / "0002-tweets").rename(increments / "0004-tweets")
    (increments / "0001-other").mkdir()
    found = wrong(audit(work_dir))
    assert found["increment 1"] == ["one folder is expected, there is 0001-other, 0001-product_reviews"]
    assert found["increment 2"] == ["one folder is expected, there is no folder"]
    assert found["increments/0004-tweets/manifest.json"][0] == "the folder holds the manifest of 0002-tweets"


def test_a_lost_champion_file_is_named_and_the_rest_is_still_checked(chain_only):
    work_dir, manifests = chain_only
    (work_dir / "champion.json").unlink()
    flip(work_dir / "bank" / f"{manifests[0].bank['gate']}.safetensors")
    found = wrong(audit(work_dir))
    assert found["champion.json"] == ["missing, though increments were published"]
    assert f"bank/{manifests[0].bank['gate']}.safetensors" in found


def test_nothing_published_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no champion was published here"):
        audit(tmp_path)


def run_command(work_dir, *options):
    """The command as a user runs it, from another folder, in a Python that has our package nowhere on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(REPO / "jobs" / "audit.py"), "--work-dir", str(work_dir), *options],
        capture_output=True, text=True, cwd="/", env=environment,
    )  # fmt: skip


def test_the_command_prints_a_table_and_exits_0_on_what_is_whole(registered):
    result = run_command(registered.work_dir)
    assert result.returncode == 0, result.stderr
    assert "15 checked, all agree" in result.stdout
    assert "increments/0003-tweets/manifest.json" in result.stdout
    assert "DIFFERS" not in result.stdout


def test_the_command_exits_1_and_names_what_differs(copied, registered, capsys):
    name = f"bank/{registered.manifests[0].bank['gate']}.safetensors"
    flip(copied / name)
    assert command.main(["--work-dir", str(copied)]) == 1
    printed = capsys.readouterr().out
    assert name in printed
    assert "DIFFERS" in printed
    assert "1 differ" in printed


def test_the_command_finds_mlflow_by_uri_and_says_when_it_cannot(by_hand, registered, tmp_path, capsys):
    by_hand.publish_all(tmp_path)
    assert command.main(["--work-dir", str(tmp_path)]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "name the MLflow server with --tracking-uri" in printed
    assert "1 differ" in printed
    assert command.main(["--work-dir", str(tmp_path), "--tracking-uri", registered.uri]) == 0
    assert command.main(["--work-dir", str(tmp_path), "--tracking-uri", "nonsense://x"]) == 1
    assert "cannot be compared" in capsys.readouterr().out


def test_the_command_prints_one_sentence_and_exits_2_without_a_champion(tmp_path, capsys):
    assert command.main(["--work-dir", str(tmp_path / "empty")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "no champion was published here" in printed.err


def test_what_is_found_on_disk_is_never_read_as_markup(chain_only, capsys):
    work_dir, _ = chain_only
    path = work_dir / "increments" / "0001-product_reviews" / "manifest.json"
    content = json.loads(path.read_bytes()) | {"method": "[/bold]"}
    path.write_text(json.dumps(content | {"[red]x[/nope]": 1}))
    assert command.main(["--work-dir", str(work_dir)]) == 1
    assert "[red]x[/nope]" in capsys.readouterr().out.replace("\n", "")
