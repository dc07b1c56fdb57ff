"""The process group of a job: started from the launcher's, SLURM's or no environment at all; small object exchanges."""

import ctypes
import logging
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops import __compatible_ops__

from data_contracts.errors import UserError
from pipeline.files import storage_error
from pipeline.hosts.joining import wait_for_all_ranks
from pipeline.hosts.launcher import map_slurm

CPU_WORK_TIMEOUT = 24 * 3600  # seconds a rank may wait for others that validate or prepare data


@dataclass(frozen=True)
class World:
    """This process among the ranks."""

    rank: int
    size: int
    device: torch.device
    control: Any = None  # gloo group for small objects and for waiting on CPU work, apart from the device collectives

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank (picklable, from our own processes only)."""
        holder = [value]
        if self.size > 1:
            torch.distributed.broadcast_object_list(holder, src=0, group=self.control)
        return holder[0]

    def on_main(self, work: Callable[[], Any], gathered: Iterable[Any] = ()) -> Any:
        """`work()` done on rank 0, its result on every rank; a UserError is raised on every rank alike, and so
        is what the disk refuses.

        `gathered` is what `work` draws from, if that is gathered from all ranks as it is drawn: every rank goes
        through all of it, whatever becomes of `work`.
        """
        result, error = None, None
        if self.is_main:
            try:
                result = work()
            except UserError as raised:
                error = raised
            except OSError as raised:  # a full or failing disk, where nothing nearer said which
                error = storage_error(raised)
        for _ in gathered:
            pass
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self.control)
        return values

    def sum(self, values: list[float]) -> list[float]:
        """Elementwise sum over the ranks, in fp64."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor on the CPU over the ranks; the tensor itself may be overwritten."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor, group=self.control)
        return tensor

    def broadcast_tensors(self, tensors: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """Rank 0's tensors, on CPU, on every rank; the other ranks pass None."""
        if self.size == 1:
            return tensors or {}
        shapes = self.broadcast(
            {name: (t.shape, t.dtype) for name, t in tensors.items()} if tensors is not None else None
        )
        received = {}
        for name, (shape, dtype) in shapes.items():
            tensor = tensors[name].contiguous() if self.is_main else torch.empty(shape, dtype=dtype)
            torch.distributed.broadcast(tensor, src=0, group=self.control)
            received[name] = tensor
        return received

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            torch.distributed.barrier(group=self.control)


def read_places() -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT where the launcher did not: from SLURM's variables,
    else for a world of one.
    """
    map_slurm(os.environ)
    for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, default)
    os.environ.setdefault("MASTER_PORT", "29500" if int(os.environ["WORLD_SIZE"]) > 1 else "0")


def start_world(timeout_seconds: int = 1800) -> World:
    """Join the job's process group; without a launcher this is a world of one.

    Backend and device come from DeepSpeed's accelerator (nccl on CUDA, gloo on CPU).
    """
    read_places()
    # DeepSpeed 0.19 still calls collectives by names that torch 2.13 calls old
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator = get_accelerator()
    # DeepSpeed would compile a shared-memory op for CPU ranks; training is the same to the bit without it
    __compatible_ops__["deepspeed_shm_comm"] = False
    if hasattr(torch.compiler, "set_default_backend"):  # from torch 2.13
        # DeepSpeed decorates its Muon optimizer with torch.compile in every process, which imports all of Inductor;
        # nothing of this pipeline is compiled
        torch.compiler.set_default_backend("eager")
    if accelerator.device_name() == "cpu":
        keep_freed_memory()
    else:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    backend = accelerator.communication_backend_name()
    try:
        met = wait_for_all_ranks()
        deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=timeout_seconds), verbose=False)
        del met
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        raise UserError(
            f"port {port} is taken, perhaps by another job on this host; name a free one with deepspeed --master_port"
        ) from error
    size = dist.get_world_size()
    control = None
    if size > 1:
        control = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=CPU_WORK_TIMEOUT))
    return World(dist.get_rank(), size, torch.device(accelerator.current_device_name()), control)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of giving it back to the system, on a machine whose tensors it allocates.

    By default every tensor above 128 KB is mapped afresh and each of its pages faults once, which costs a fourth of
    an expert network's time. A process then holds what it held at its peak, until `return_freed_memory`. A library
    without `mallopt` is left alone.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # from malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, 32 << 20)  # the largest that glibc takes
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 64 << 20)


def return_freed_memory() -> None:
    """Give what is freed back to the system, between increments: the next one need not hold what the last one held at
    its peak. A library without `malloc_trim` is left alone.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
