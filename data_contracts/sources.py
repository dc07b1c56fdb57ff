"""Which files a contract may read: patterns are resolved below the allowed roots and nowhere else."""

import glob
import os
import re
from pathlib import Path
from typing import Any

import fsspec

from data_contracts.credentials import refuse_password
from data_contracts.errors import UserError
from data_contracts.remote import remote_errors, told

_PROTOCOL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_MAX_PATTERN, _MAX_DEPTH = 1024, 100
_LOCAL_PROTOCOLS = ("file", "local")


def resolve_source(pattern: str, roots: list[str | Path]) -> list[str]:
    """The files a pattern names, sorted: absolute local paths or full URIs, all below one of the roots.

    Args:
        pattern: a path, a glob (`*`, `?`, `[ ]`, `**`) or a URI of an fsspec file system. A relative one is tried under
            each root in turn; the first root with a match answers.
        roots: the allowed folders and URI prefixes.

    Raises:
        UserError: `..`, a chained protocol (`a::b`), a path or a symbolic link out of the roots, a folder, or a pattern
            that matches nothing.
    """
    roots = [str(root) for root in roots]
    if not roots:
        raise UserError(f"{pattern!r} cannot be read: no data root is allowed; name one")
    _refuse_tricks(pattern)
    if _PROTOCOL.match(pattern):
        return _below_uri_roots(pattern, roots)
    if os.path.isabs(pattern):
        return _local(pattern, pattern, roots)
    for root in roots:
        if _PROTOCOL.match(root):
            found = _remote_files(root.rstrip("/") + "/" + pattern, root)
        else:
            found = _matches(os.path.join(glob.escape(os.path.abspath(root)), pattern), os.path.join(root, pattern))
        if found:
            return found if _PROTOCOL.match(root) else _local_checked(found, pattern, roots)
    raise UserError(f"{pattern!r} matches no file below {_listed(roots)}; check the name and the data roots")


def source_name(path: str, roots: list[str | Path]) -> str:
    """The file's name below the longest root that holds it, with `/`: free of the machine's own folders."""
    below = []
    for root in map(str, roots):
        if _PROTOCOL.match(path):
            if _PROTOCOL.match(root) and path.startswith(prefix := _uri_prefix(root)):
                below.append(path.removeprefix(prefix))
        elif not _PROTOCOL.match(root) and Path(path).is_relative_to(Path(root).resolve()):
            below.append(Path(path).relative_to(Path(root).resolve()).as_posix())
    return min(below, key=len) if below else path


def _refuse_tricks(pattern: str) -> None:
    if len(pattern) > _MAX_PATTERN or pattern.count("/") > _MAX_DEPTH:
        raise UserError(
            f"{pattern[:40]!r}... has over {_MAX_PATTERN} characters or {_MAX_DEPTH} folders; give it a shorter name"
        )
    refuse_password(pattern, "a contract's source")
    if "::" in pattern:
        raise UserError(f"{pattern!r} chains protocols with '::', which is not allowed; name the file itself")
    if "\x00" in pattern or ".." in re.split(r"[/\\]", re.sub("%2e", ".", pattern, flags=re.IGNORECASE)):
        raise UserError(f"{pattern!r} contains '..', which is not allowed; write the path below a data root")
    protocol = _PROTOCOL.match(pattern)
    if protocol and protocol.group(1).lower() in _LOCAL_PROTOCOLS:
        raise UserError(f"{pattern!r} is a local file written as a URI; write its plain path")


def _below_uri_roots(pattern: str, roots: list[str]) -> list[str]:
    for root in roots:
        if _PROTOCOL.match(root) and pattern.startswith(root.rstrip("/") + "/"):
            found = _remote_files(pattern, root)
            if not found:
                raise UserError(f"{pattern!r} matches no file; check the name")
            return found
    raise UserError(f"{pattern!r} is outside the data roots {_listed(roots)}; move the data or allow its prefix")


def _remote_files(pattern: str, root: str) -> list[str]:
    try:
        file_system, path = fsspec.core.url_to_fs(pattern)
        if glob.has_magic(pattern):
            there = file_system.glob(path, detail=True)
        else:
            there = _named_file(file_system, path)
    except (*remote_errors(), ImportError, ValueError) as error:
        raise UserError(f"{pattern!r} cannot be listed ({told(error)}); check the URI and its access") from None
    found = sorted(file_system.unstrip_protocol(name) for name, about in there.items() if about["type"] == "file")
    prefix = _uri_prefix(root)
    for uri in found:
        if not uri.startswith(prefix):
            raise UserError(f"{pattern!r} leads to {uri}, outside the data root {root}; move the data")
    return found


def _named_file(file_system: Any, path: str) -> dict[str, dict[str, Any]]:
    """What is known of a path, by it; empty where nothing is there. What a server refuses is raised."""
    try:
        return {path: file_system.info(path)}
    except FileNotFoundError:
        return {}


def _uri_prefix(root: str) -> str:
    """A URI root as fsspec writes the files below it, with a final `/`."""
    file_system, path = fsspec.core.url_to_fs(root)
    return file_system.unstrip_protocol(path).rstrip("/") + "/"


def _local(pattern: str, shown: str, roots: list[str]) -> list[str]:
    """Files of an absolute pattern; the place is judged before its existence, so that nothing outside is revealed."""
    anchor = Path(os.path.dirname(re.split(r"[*?\[]", pattern)[0]) or "/")
    if not _inside(anchor.resolve(), roots) and not _inside(Path(pattern).resolve(), roots):
        raise _outside(shown, roots)
    found = _matches(pattern, shown)
    if not found:
        raise UserError(f"{shown!r} matches no file; check the name")
    return _local_checked(found, shown, roots)


def _matches(pattern: str, shown: str) -> list[str]:
    literal = re.sub(r"\[([*?\[])\]", r"\1", pattern)
    if os.path.isdir(literal):
        raise UserError(f"{shown!r} is a folder; name its files, for example {shown.rstrip('/')}/*.parquet")
    if os.path.lexists(literal):
        return [literal]
    return sorted(name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))


def _local_checked(found: list[str], shown: str, roots: list[str]) -> list[str]:
    """Absolute paths with symbolic links resolved, each checked again."""
    resolved = []
    for name in found:
        path = Path(name).resolve()
        if not _inside(path, roots):
            raise UserError(
                f"{shown!r} leads to {os.path.basename(name)}, which lies outside the data roots {_listed(roots)}; "
                "move the data or allow its folder"
            )
        if not path.is_file():
            raise UserError(f"{shown!r} is not a file that can be read; check the name")
        resolved.append(str(path))
    return list(dict.fromkeys(resolved))


def _inside(path: Path, roots: list[str]) -> bool:
    return any(not _PROTOCOL.match(root) and path.is_relative_to(Path(root).resolve()) for root in roots)


def _outside(shown: str, roots: list[str]) -> UserError:
    return UserError(f"{shown!r} is outside the data roots {_listed(roots)}; move the data or allow its folder")


def _listed(roots: list[str]) -> str:
    return ", ".join(roots)
