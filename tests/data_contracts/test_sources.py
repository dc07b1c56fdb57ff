"""A contract reads below the allowed roots and nowhere else."""

import fsspec
import pytest

from data_contracts import UserError
from data_contracts.sources import resolve_source, source_name


@pytest.fixture
def roots(tmp_path):
    """data/ with a.csv, b.csv, sub/c.csv, and two links that lead to outside/secret.csv."""
    data, outside = tmp_path / "data", tmp_path / "outside"
    (data / "sub").mkdir(parents=True)
    outside.mkdir()
    for file in (data / "a.csv", data / "b.csv", data / "sub" / "c.csv", outside / "secret.csv"):
        file.write_text("x")
    (data / "link.txt").symlink_to(outside / "secret.csv")
    (data / "folder").symlink_to(outside)
    return [tmp_path / "empty", data]


def test_relative_names_and_globs_are_found_below_the_roots(roots):
    data = roots[1].resolve()
    assert resolve_source("a.csv", roots) == [str(data / "a.csv")]
    assert resolve_source("*.csv", roots) == [str(data / "a.csv"), str(data / "b.csv")]
    assert resolve_source("sub/*.csv", roots) == [str(data / "sub" / "c.csv")]
    assert resolve_source(str(data / "sub" / "c.csv"), roots) == [str(data / "sub" / "c.csv")]


def test_the_first_root_with_a_match_answers(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.csv").write_text(name)
    assert resolve_source("a.csv", [tmp_path / "one", tmp_path / "two"]) == [
        str((tmp_path / "one" / "a.csv").resolve())
    ]


def test_a_link_inside_the_roots_is_followed(roots):
    (roots[1] / "alias.csv").symlink_to(roots[1] / "a.csv")
    assert resolve_source("alias.csv", roots) == [str((roots[1] / "a.csv").resolve())]


def test_a_name_with_glob_characters_is_found_as_it_is_written(roots):
    (roots[1] / "a[1].csv").write_text("x")
    assert resolve_source("a[1].csv", roots) == [str((roots[1] / "a[1].csv").resolve())]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("../outside/secret.csv", r"contains '\.\.'"),
        ("sub/../../outside/secret.csv", r"contains '\.\.'"),
        ("sub\\..\\a.csv", r"contains '\.\.'"),
        ("sub/%2E%2e/a.csv", r"contains '\.\.'"),
        ("link.txt", "outside the data roots"),
        ("folder/secret.csv", "outside the data roots"),
        ("folder/*.csv", "outside the data roots"),
        ("/etc/passwd", "outside the data roots"),
        ("/etc/*", "outside the data roots"),
        ("zip://a.csv::a.zip", "chains protocols"),
        ("simplecache::s3://bucket/a.csv", "chains protocols"),
        ("file:///etc/passwd", "plain path"),
        ("s3://bucket/a.csv", "outside the data roots"),
        ("sub", "is a folder"),
        ("none.csv", "matches no file"),
        ("*.parquet", "matches no file"),
        ("a.csv\x00", "not allowed"),
    ],
)
def test_what_is_not_a_file_below_the_roots_is_refused_by_name(roots, pattern, said):
    with pytest.raises(UserError, match=said) as caught:
        resolve_source(pattern, roots)
    assert repr(pattern) in str(caught.value) or pattern in str(caught.value)


def test_an_absolute_path_outside_is_refused_whether_or_not_it_exists(roots, tmp_path):
    for name in ("secret.csv", "nothing.csv"):
        with pytest.raises(UserError, match="outside the data roots"):
            resolve_source(str(tmp_path / "outside" / name), roots)


def test_a_uri_must_lie_below_a_uri_root():
    memory = fsspec.filesystem("memory")
    for name in ("/bank/data/a.csv", "/bank/data/b.csv", "/bank/database/c.csv", "/bank/other/d.csv"):
        memory.pipe(name, b"x")
    roots = ["memory://bank/data"]
    assert [source_name(uri, roots) for uri in resolve_source("*.csv", roots)] == ["a.csv", "b.csv"]
    assert [source_name(uri, roots) for uri in resolve_source("memory://bank/data/b.csv", roots)] == ["b.csv"]
    for outside in ("memory://bank/other/d.csv", "memory://bank/database/c.csv", "memory://bank/data/../other/d.csv"):
        with pytest.raises(UserError):
            resolve_source(outside, roots)
    with pytest.raises(UserError, match="matches no file"):
        resolve_source("memory://bank/data/none.csv", roots)


def test_a_file_is_named_below_its_root(roots):
    (path,) = resolve_source("sub/c.csv", roots)
    assert source_name(path, roots) == "sub/c.csv"
    assert source_name(path, [*roots, roots[1] / "sub"]) == "c.csv"


def test_without_a_root_nothing_is_read():
    with pytest.raises(UserError, match="no data root"):
        resolve_source("a.csv", [])


def test_a_root_that_refuses_does_not_let_the_next_one_answer(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("text,label\n")
    roots = ["memory://bucket/data", str(tmp_path)]
    assert resolve_source("a.csv", roots) == [str(tmp_path / "a.csv")]  # nothing of this name is there

    def refuses(*_, **__):
        raise PermissionError(13, "Access denied")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.info", refuses)
    with pytest.raises(UserError, match=r"memory://bucket/data/a\.csv' cannot be listed \(Access denied\)"):
        resolve_source("a.csv", roots)
