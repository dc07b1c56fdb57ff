"""Where each rank finds what the work_dir holds. What is published is written by rank 0 alone; hosts that do not see it
need no disk in common.

Who sees the work_dir is found out, not configured: rank 0 puts a file into it, and every rank looks. Ranks that do not
see it use a cache folder of theirs (pipeline/cache.py):

    prepared/<task>/<digest>/   token shards, named as in the work_dir, made from the host's own copy of the data
    quarantine/                 rejected rows, as in the work_dir
    copies-<random>/            a running job's copies of rank 0's files (experts, in-flight state), gone at its end

Nothing in it is needed by a later job; it may be removed whenever no job runs.
"""

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from data_contracts.errors import UserError
from pipeline.cache import cache_folder
from pipeline.files import storage_error, writing
from pipeline.hosts.meeting import Hosts
from pipeline.placement.distributed import World

LOOK_SECONDS = 2.0  # that a file system may take to show one host what another has written
BLOCK = 8 << 20  # bytes of a file that travel at a time
_COPIES = "copies-"
_own: dict[Path, int] = {}  # copies folder of this process -> its lock


@dataclass(frozen=True)
class Storage:
    """One rank's view. `root` is the work_dir or a cache folder; `ranks` are those that share it with this one."""

    hosts: Hosts
    root: Path
    ranks: tuple[int, ...]
    everywhere: bool  # all ranks see the work_dir
    seen: bool  # this one does
    copies: Path  # where this rank reads copies of rank 0's files
    _copied: dict[Path, Path] = field(default_factory=dict)  # the same on every rank, by rank 0's path

    @property
    def world(self) -> World:
        return self.hosts.world

    @property
    def leads(self) -> bool:
        """Whether this rank does what is done once for all that share the root."""
        return self.world.rank == self.ranks[0]

    def once(self, work: Callable[[], Any]) -> Any:
        """`work()` done by one rank of each root, its result on all ranks of that root. Collective; raises as
        `Hosts.on_each`.
        """
        return self.hosts.on_each(lambda: work() if self.leads else None)[self.ranks[0]]

    def share(self, count: int) -> range:
        """Of `count` things that are done once for each root, those that this rank does."""
        return range(self.ranks.index(self.world.rank), count, len(self.ranks))

    def read(self, path: Path, immutable: bool = False) -> Path:
        """Where this rank reads a file of rank 0's: there, where it sees it, or from a copy. Collective.

        A file that is `immutable` is copied once a job. Raises UserError on every rank where the file cannot be read
        or a copy cannot be written.
        """
        if self.everywhere:
            return path
        if not immutable or path not in self._copied:
            self._copied[path] = self._copy(path, len(self._copied))
        return path if self.seen else self.copies / self._copied[path].name

    def _copy(self, path: Path, number: int) -> Path:
        """Send a file from rank 0 to the caches. Every rank goes through all of it, whatever becomes of a disk."""
        size = self.world.on_main(lambda: path.stat().st_size)
        target = self.copies / f"{number}-{path.name}"
        own = path if self.world.is_main else target
        digest, problem, file = sha256(), None, None
        try:
            if self.world.is_main:
                file = open(path, "rb")  # noqa: SIM115
            elif self.leads and not self.seen:
                target.unlink(missing_ok=True)  # it may be mapped: a new file
                file = open(target, "wb")  # noqa: SIM115
        except OSError as error:
            problem = str(storage_error(error, own))
        for start in range(0, size, BLOCK):
            block = torch.zeros(min(BLOCK, size - start), dtype=torch.uint8)
            try:
                if file is not None and self.world.is_main and file.readinto(memoryview(block.numpy())) != len(block):
                    problem = f"{path}: became shorter while it was read"
            except OSError as error:
                problem = str(storage_error(error, own))
            torch.distributed.broadcast(block, src=0, group=self.world.control)
            digest.update(memoryview(block.numpy()))
            try:
                if file is not None and not self.world.is_main and problem is None:
                    file.write(memoryview(block.numpy()))
            except OSError as error:
                problem = str(storage_error(error, own))
        try:
            if file is not None:
                file.close()
        except OSError as error:
            problem = str(storage_error(error, own))
        found = self.world.gather((problem, digest.hexdigest()))
        if problems := dict.fromkeys(problem for problem, _ in found if problem):
            raise UserError("; ".join(problems))
        if len({sha for _, sha in found}) > 1:
            raise UserError(f"{path}: arrived differently on some hosts; check the network, then run again")
        return target


def find_storage(hosts: Hosts, work_dir: Path) -> Storage:
    """Find out which ranks see rank 0's work_dir, and give the others a cache folder. Collective; on one host all
    see it.
    """
    world = hosts.world
    everyone = tuple(range(world.size))
    everywhere = Storage(hosts, work_dir, everyone, True, True, work_dir)
    if not hosts.several:
        return everywhere
    name = world.broadcast(f".seen-{secrets.token_hex(8)}")
    world.on_main(lambda: (work_dir / name).touch())
    sees = world.gather(appears(work_dir / name))
    world.on_main(lambda: (work_dir / name).unlink(missing_ok=True))
    if all(sees):
        return everywhere
    seen = sees[world.rank]
    if world.is_main:
        blind = dict.fromkeys(hosts.names[hosts.of_rank[rank]] for rank in everyone if not sees[rank])
        print(f"{', '.join(blind)}: the work_dir is not seen there, a cache folder takes its place", flush=True)
    roots = hosts.on_each(lambda: work_dir if seen else cache_folder())
    mark = roots[world.rank] / f"{name}-{world.rank}"
    hosts.on_each(lambda: None if seen else mark.touch())
    found = [seen if sees[rank] else not seen and appears(mark.with_name(f"{name}-{rank}"), 0.0) for rank in everyone]
    world.barrier()
    hosts.on_each(lambda: None if seen else mark.unlink(missing_ok=True))
    ranks = tuple(rank for rank in everyone if found[rank])
    folders = hosts.on_each(lambda: new_copies(mark.parent) if not seen and world.rank == ranks[0] else None)
    return Storage(hosts, roots[world.rank], ranks, False, seen, work_dir if seen else folders[ranks[0]])


def appears(path: Path, seconds: float = LOOK_SECONDS) -> bool:
    """Whether a file is seen, at once or within some seconds: network file systems remember for a while that it was not
    there.
    """
    end = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            os.listdir(path.parent)  # has NFS look again
        if path.exists():
            return True
        if time.monotonic() >= end or not path.parent.is_dir():
            return False
        time.sleep(0.1)


def new_copies(root: Path) -> Path:
    """A folder for this job's copies, held by a lock; those of jobs that are gone are removed."""
    with writing(root):
        for left in root.glob(f"{_COPIES}*"):
            with suppress(OSError):
                lock = os.open(left / "lock", os.O_RDWR | os.O_CREAT, 0o600)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left, ignore_errors=True)
                finally:
                    os.close(lock)
        folder = root / f"{_COPIES}{secrets.token_hex(6)}"
        folder.mkdir(mode=0o700)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
    _own[folder] = lock
    return folder


@contextmanager
def copies_removed() -> Iterator[None]:
    """Remove this process's copies after a block."""
    try:
        yield
    finally:
        while _own:
            folder, lock = _own.popitem()
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
