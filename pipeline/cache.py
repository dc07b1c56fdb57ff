"""Where a host keeps what can be made or fetched again: backbones from behind a URI, and, on a host that does not see
the work_dir, token shards and copies of rank 0's files.
"""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from data_contracts.errors import UserError

CACHE = "PERENNIAL_CACHE"  # the variable that names the folder


def cache_folder() -> Path:
    """`$PERENNIAL_CACHE`; else `perennial` in `$XDG_CACHE_HOME` or ~/.cache, or, where that cannot be written, below
    the folder of temporary files, and only if it is this user's own. Made where it is missing.

    Raises UserError where none can be written.
    """
    named, folders = _choices()
    for folder in folders:
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK) and (named or folder.stat().st_uid == os.getuid()):
                return folder
    raise _refused(folders[0])


def cache_disk() -> Path:
    """The folder on the way to `cache_folder` that is there already; nothing is made. Raises UserError as it does."""
    _, folders = _choices()
    for folder in folders:
        there = next(place for place in (folder, *folder.parents) if place.is_dir())
        if os.access(there, os.W_OK | os.X_OK):
            return there
    raise _refused(folders[0])


def _choices() -> tuple[bool, list[Path]]:
    """Whether the user named the folder; the folders to try."""
    if named := os.environ.get(CACHE):
        return True, [Path(named).expanduser().absolute()]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    bases = (home, os.path.join(tempfile.gettempdir(), f"cache-{os.getuid()}"))
    return False, [Path(base).absolute() / "perennial" for base in bases]


def _refused(folder: Path) -> UserError:
    return UserError(f"{folder}: cannot be written; set {CACHE} to a folder of your own on this host")
