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
    if named := os.environ.get(CACHE):
        folder = Path(named).expanduser().absolute()
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
        raise UserError(f"{folder}: cannot be written; set {CACHE} to a folder of your own on this host")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for base in (home, os.path.join(tempfile.gettempdir(), f"cache-{os.getuid()}")):
        folder = Path(base).absolute() / "perennial"
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK) and folder.stat().st_uid == os.getuid():
                return folder
    raise UserError(f"{home}/perennial: cannot be written; set {CACHE} to a folder of your own on this host")
