"""The manifest: canonical bytes, and nothing in it that could name another path or differ between runs."""

import hashlib
import json

import pytest
from pydantic import ValidationError

from data_contracts.errors import UserError
from pipeline.tracking.manifest import Manifest, parse_manifest


def test_bytes_are_canonical_json_of_all_fields_and_sha256_is_over_them(by_hand):
    fields = by_hand.fields()
    expected = json.dumps(fields | {"format": 1}, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    manifest = Manifest(**fields)
    assert manifest.to_bytes() == expected
    assert manifest.sha256 == hashlib.sha256(expected).hexdigest()
    assert manifest.folder == "0001-product_reviews"


def test_the_folder_of_a_late_increment_has_as_many_digits_as_it_needs(by_hand):
    assert Manifest(**by_hand.fields(increment=12345, parent="0" * 64)).folder == "12345-product_reviews"


def test_equal_values_give_equal_bytes_however_they_were_written(by_hand):
    learning = {"targets": ("up", "down"), "seed": 17}
    digest = hashlib.sha256(b'{"seed":17,"targets":["up","down"]}').hexdigest()
    one = Manifest(**by_hand.fields(learning=learning, learning_digest=digest, row={"tweets": 1}))
    two = Manifest(
        **by_hand.fields(learning={"seed": 17, "targets": ["up", "down"]}, learning_digest=digest, row={"tweets": 1.0})
    )
    assert one.to_bytes() == two.to_bytes()
    assert parse_manifest(one.to_bytes(), "manifest.json") == one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "../other"}, "task"),
        ({"task": "Tweets"}, "task"),
        ({"task": "tweets\n"}, "task"),
        ({"parent": "0" * 64}, "first increment has no parent"),
        ({"increment": 2}, "first increment has no parent"),
        ({"increment": 0}, "increment"),
        ({"increment": 2, "parent": "0" * 63}, "parent"),
        ({"files": {"../champion.json": "0" * 64}}, "not a plain file name"),
        ({"files": {"/etc/passwd": "0" * 64}}, "not a plain file name"),
        ({"files": {"a//b": "0" * 64}}, "not a plain file name"),
        ({"files": {"a\\b": "0" * 64}}, "not a plain file name"),
        ({"files": {".hidden": "0" * 64}}, "not a plain file name"),
        ({"files": {"run.json": "0" * 64}}, "not one of the files"),
        ({"files": {"manifest.json": "0" * 64}}, "not one of the files"),
        ({"files": {"row.json": "X" * 64}}, "row.json"),
        ({"bank": {"a/b": "0" * 64}}, "bank"),
        ({"bank": {"shared": "../../etc/passwd"}}, "bank.shared"),
        ({"bundles": {"a/b": {}}}, "bundles"),
        ({"state": {"prototypes": "0" * 65}}, "state.prototypes"),
        ({"verdict": "maybe"}, "verdict"),
        ({"verdict": "rejected", "bundles": {"tweets": {}}}, "rejected increment moves no bundle"),
        ({"verdict": "rejected", "state": {"prototypes": "0" * 64}}, "rejected increment moves no bundle"),
        ({"row": {"tweets": float("nan")}}, "row.tweets"),
        ({"gate": {"note": float("inf")}}, "gate"),
        ({"gate": {"note": ["/home/user/x"]}}, "path or address '/home/user/x'"),
        ({"gate": {"note": {"uri": "http://host:5000"}}}, "note.uri holds the path or address"),
        ({"learning_digest": "0" * 64}, "learning_digest is not the sha256"),
        ({"started_at": "2026-01-01"}, "started_at"),
        ({"format": 2}, "format"),
    ],
)
def test_a_manifest_is_refused_when(by_hand, changes, message):
    with pytest.raises(ValidationError) as caught:
        Manifest(**by_hand.fields(**changes))
    assert message in str(caught.value)


def test_rows_that_do_not_add_up_are_refused(by_hand):
    data = {"train": {"digest": "0" * 64, "rows_in": 10, "kept": 7, "rejected": {"empty_text": 2}}}
    with pytest.raises(ValidationError, match=r"10 rows in are not 7 kept \+ 2 rejected"):
        Manifest(**by_hand.fields(data=data))


def test_nothing_in_a_manifest_can_be_changed(by_hand):
    with pytest.raises(ValidationError, match="frozen"):
        Manifest(**by_hand.fields()).task = "tweets"


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\xfe", b"[1]", b"not json"])
def test_bytes_that_are_no_manifest_are_a_sentence_with_the_file(damage):
    with pytest.raises(UserError, match=r"^increments/x/manifest\.json: not a valid manifest .*restore it"):
        parse_manifest(damage, "increments/x/manifest.json")


def test_bytes_that_say_the_same_in_another_form_are_refused(by_hand):
    data = Manifest(**by_hand.fields()).to_bytes()
    for other in (data + b"\n", data.replace(b",", b", ", 1), data.replace(b'"increment":1', b'"increment":1.0')):
        with pytest.raises(UserError, match=r"manifest\.json"):
            parse_manifest(other, "manifest.json")


def test_a_row_without_task_ids_stands_in_the_manifest_only_where_it_was_measured(by_hand):
    known = Manifest(**by_hand.fields())
    assert b"row_inferred" not in known.to_bytes()  # a stream without a router writes what it always wrote
    both = Manifest(**by_hand.fields(row_inferred={"product_reviews": 0.5}))
    assert b'"row_inferred":{"product_reviews":0.5}' in both.to_bytes()
    for manifest in (known, both):
        assert parse_manifest(manifest.to_bytes(), "here") == manifest
