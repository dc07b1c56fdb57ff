"""The machine and the software that figures belong to, without its name or paths; memory of this process."""

import os
import platform
import resource
from pathlib import Path
from typing import Any

import torch

from pipeline.tracking.versions import code_digest, library_versions, package_version

PEERS = ("peft", "accelerate", "pydantic", "tokenizers")  # versions that the manifest's list lacks


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads that torch uses, memory, system, accelerators."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def describe_software() -> dict[str, str]:
    """Library versions and the digest of this code."""
    return {**library_versions(), **{name: package_version(name) for name in PEERS}, "code": code_digest()}


def peak_bytes() -> int:
    """Largest resident memory of this process since it began.

    The kernel's VmHWM where there is one: ru_maxrss of a child also remembers the parent that started it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def load_average() -> float:
    """Processes that wanted a core over the last minute: above one a core, figures are not of a quiet machine."""
    return round(os.getloadavg()[0], 2)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()
