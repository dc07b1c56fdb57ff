"""What one host says of itself: software, memory, disk, and digests of all that must be equal on every host."""

import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from deepspeed.accelerator import get_accelerator

from data_contracts import load_contract
from data_contracts.errors import UserError
from pipeline.backbones.fetch import backbone_bytes
from pipeline.backbones.load import load_tokenizer, pinned_digest
from pipeline.cache import cache_disk
from pipeline.config import StreamConfig
from pipeline.data.ingest import source_digests
from pipeline.experts.attach import ExpertPlan
from pipeline.files import canonical_json, sha256_file, sha256_text
from pipeline.lock import LOCK, WorkLock
from pipeline.placement.learner import check_before_loading
from pipeline.preflight.sizes import source_bytes, written_bytes
from pipeline.tracking.versions import code_digest, library_versions

_CGROUP = Path("/sys/fs/cgroup")
HASHED_PER_SECOND = 20e6  # bytes that the slowest disk still reads: how long the others wait for a host's digests

Facts = dict[str, Any]  # JSON; what could not be found out is {"error": sentence}


def facts_of(config: StreamConfig, plan: ExpertPlan | None, num_ranks: int) -> Facts:
    """Everything that needs no other host, on a host with `num_ranks` ranks. Raises nothing that a user can mend."""
    accelerator = get_accelerator()
    device = accelerator.device_name()
    return {
        "versions": library_versions(),
        "code": code_digest(),
        "stream": told(lambda: stream_digest(config)),
        "device": {
            "name": device,
            "backend": accelerator.communication_backend_name(),
            "count": None if device == "cpu" else accelerator.device_count(),
            "free": free_memory() if device == "cpu" else device_memory(num_ranks),  # of the ranks that share it
        },
        "free_memory": free_memory(),
        "backbone": told(lambda: usable_backbone(config, plan)),
        "tasks": [told(lambda path=path: task_digest(path, config)) for path in config.tasks],
        "written": told(lambda: written_bytes(config, plan, source_bytes(config.tasks, config.data_roots))),
        "cache": told(lambda: {"path": str(cache_disk()), "free": free_disk(cache_disk())}),
    }


def told(work: Callable[[], Any]) -> Any:
    """The result, or {"error": why there is none}."""
    try:
        return work()
    except UserError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"{error.filename or 'a file'}: {error.strerror or error}"}


def stream_digest(config: StreamConfig) -> str:
    """sha256 over what the stream and the DeepSpeed file say that is the same wherever a host keeps its copies."""
    measured = {"spans": config.spans.enabled, "system_metrics": config.tracking.system_metrics}
    said = {"learning": config.learning(), "deepspeed": sha256_file(config.deepspeed), **measured}
    return sha256_text(canonical_json(said))


def usable_backbone(config: StreamConfig, plan: ExpertPlan | None) -> str:
    """The digest of a backbone that the run can load. Raises UserError for one that it cannot."""
    check_before_loading(config, plan)
    load_tokenizer(config.backbone)
    return pinned_digest(config.backbone)


def task_digest(path: str, config: StreamConfig) -> dict[str, Any]:
    """A contract's name and digest, and its files' digests by name. Raises UserError for what cannot be read."""
    contract = load_contract(path)
    files = source_digests(contract, list(config.data_roots))
    return {"task": contract.task, "contract": contract.digest, "files": files}


def hashing_seconds(config: StreamConfig) -> float:
    """How long this host may take for its digests, and to fetch what is behind a URI, at the least speed that is
    reckoned with.
    """
    return (backbone_bytes(config.backbone.path) + source_bytes(config.tasks, config.data_roots)) / HASHED_PER_SECOND


def free_memory() -> int:
    """Bytes of host memory that this host's processes can still have, within their container's limit."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no cgroup, or no limit ("max")
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        counted = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        files = sum(int(counted.get(name, 0)) for name in ("active_file", "inactive_file"))  # given back when needed
        free = min(free, limit - used + files)
    return free


def device_memory(num_ranks: int) -> int:
    """Free bytes of the fullest device that the host's ranks use, times the ranks: the room they have in all."""
    accelerator = get_accelerator()
    devices = range(min(num_ranks, accelerator.device_count()))
    return num_ranks * min((accelerator.available_memory(device) for device in devices), default=0)


def free_disk(path: Path) -> int:
    """Bytes that can be written at `path`, or where it will be made."""
    return psutil.disk_usage(str(existing(path))).free


def existing(path: Path) -> Path:
    """The path itself or the nearest folder above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())


class WorkDir:
    """The work_dir as rank 0's host sees it, and a file in it by which other hosts see whether they share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = existing(path)  # nothing is made that the run does not make
        self.token = self.folder / f".preflight-{secrets.token_hex(6)}"

    def facts(self) -> Facts:
        """Whether it can be written, who holds it, what is free; leaves the token behind until `remove`."""
        found: Facts = {"path": str(self.path), "token": str(self.token), "free": told(lambda: free_disk(self.path))}
        try:
            self.token.write_text("", encoding="utf-8")
        except OSError as error:
            found["error"] = f"{self.folder}: cannot be written ({error.strerror}); choose another work_dir"
        if (self.path / LOCK).exists():
            found["lock"] = told(lambda: WorkLock(self.path).acquire().release())
        return found

    def remove(self) -> None:
        """Take the token away."""
        with suppress(OSError):
            self.token.unlink(missing_ok=True)


def sees(token: str, wait: float = 3.0) -> bool:
    """Whether a file that another host has just made is there; network file systems show it after a moment."""
    end = time.monotonic() + wait
    while not os.path.exists(token):
        if time.monotonic() > end:
            return False
        with suppress(OSError):
            os.listdir(os.path.dirname(token))  # has a network file system look again
        time.sleep(0.1)
    return True
