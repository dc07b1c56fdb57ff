"""Objects of a store: created once, replaced only as they were read; alike on S3 and in a folder."""

import multiprocessing
import os

import pytest

from data_contracts.errors import UserError
from data_contracts.sources import resolve_source
from pipeline.config import override_config
from pipeline.store import objects as module
from pipeline.store.objects import open_objects
from tests.helpers import stream_dict


@pytest.fixture(params=["s3", "folder"])
def objects(request, tmp_path):
    if request.param == "folder":
        return open_objects(str(tmp_path / "store"))
    return open_objects(request.getfixturevalue("bucket") + "/some/prefix")


def test_an_object_is_created_once_and_replaced_only_by_who_has_read_it(objects):
    assert objects.read("a") is None and objects.size("a") is None and objects.sizes("deep") == {}
    assert objects.create("a", [b"one", b" two"]) and not objects.create("a", [b"other"])
    data, version = objects.read("a")
    assert data == b"one two" == b"".join(objects.blocks("a")) and objects.size("a") == 7
    assert not objects.replace("a", b"blind", None)
    assert objects.replace("a", b"new", version)
    assert not objects.replace("a", b"late", version)
    assert objects.read("a")[0] == b"new"
    assert not objects.replace("b", b"x", version) and objects.read("b") is None
    assert objects.replace("b", b"x", None) and not objects.replace("b", b"y", None)
    objects.write("deep/er/c", b"1")
    objects.write("deep/er/c", b"22")
    assert objects.create("deep/d", [])
    assert objects.sizes("deep") == {"deep/er/c": 2, "deep/d": 0}
    objects.remove("deep/er/c")
    objects.remove("deep/er/c")
    assert objects.sizes("deep") == {"deep/d": 0}


def test_a_large_object_goes_up_in_parts_and_a_failing_one_leaves_nothing(objects, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 5 << 20)  # the least that S3 takes as a part
    data = os.urandom(12 << 20)

    def failing():
        yield data[: 6 << 20]
        raise UserError("the file was altered")

    with pytest.raises(UserError, match="the file was altered"):
        objects.create("large", failing())
    assert objects.size("large") is None and objects.sizes("") == {}
    assert objects.create("large", [data[: 7 << 20], data[7 << 20 :]])
    assert b"".join(objects.blocks("large")) == data
    assert not objects.create("large", [data])
    if hasattr(objects, "_fs"):
        assert "Uploads" not in objects._fs.call_s3("list_multipart_uploads", Bucket=objects._bucket)


def race(uri, number, ready, won):
    objects = open_objects(uri)
    _, version = objects.read("pointer")
    ready.wait()
    mine = objects.create(f"name-{number % 2}", [b"%d" % number]), objects.replace("pointer", b"%d" % number, version)
    won.put((number, *mine))


def test_of_four_processes_at_once_two_create_two_names_and_one_moves_the_pointer(objects):
    context = multiprocessing.get_context("fork")
    objects.write("pointer", b"start")
    ready, won = context.Barrier(4), context.Queue()
    racers = [context.Process(target=race, args=(objects.uri, number, ready, won)) for number in range(4)]
    for racer in racers:
        racer.start()
    results = [won.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    created = [number for number, made, _ in results if made]
    moved = [number for number, _, done in results if done]
    assert sorted(number % 2 for number in created) == [0, 1] and len(moved) == 1
    assert objects.read("pointer")[0] == b"%d" % moved[0]
    assert {int(objects.read(f"name-{number % 2}")[0]) for number in range(2)} == set(created)


@pytest.mark.parametrize(
    ("uri", "message"),
    [("memory://x", "of memory:// neither conditional creation nor compare-and-swap is known"),
     ("s3://", "names no bucket"),
     ("s3://me:word@bucket/x", "holds a password or a token")],
)  # fmt: skip
def test_what_cannot_be_a_store_is_refused(s3, uri, message):
    with pytest.raises(UserError, match=message) as error:
        open_objects(uri)
    assert "word" not in str(error.value).replace("password", "")


@pytest.mark.parametrize("key", ["store.uri", "backbone.path", "data_roots"])
def test_a_stream_with_a_password_in_a_uri_is_refused_without_repeating_it(tmp_path, key):
    stream = stream_dict(tmp_path, tmp_path, tmp_path, [tmp_path / "task.yaml"])
    uri = '"s3://me:word@bucket/x"'
    override = f"{key}=[{uri}]" if key == "data_roots" else f"{key}={uri}"
    with pytest.raises(UserError, match=r"holds a password or a token.*set it in the environment") as error:
        override_config(stream, [override], "stream.yaml")
    assert "me:word" not in str(error.value) and key in str(error.value)
    with pytest.raises(UserError, match="a contract's source: holds a password or a token"):
        resolve_source("s3://me:word@bucket/x.parquet", ["s3://bucket"])


def test_a_bucket_that_is_not_there_and_a_server_that_does_not_answer_are_said(s3, bucket, monkeypatch):
    with pytest.raises(UserError, match=r"bucket does not exist.*make the bucket or correct its name"):
        open_objects(f"{bucket}-not/x").read("a")
    s3.clear_instance_cache()  # what follows is said to another server
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:word@127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match=r"cannot be reached .*check the address, the network and") as error:
        open_objects(f"{bucket}/x").read("a")
    s3.clear_instance_cache()
    assert "word" not in str(error.value)
