"""Ranks forked from one process that has imported everything: what `deepspeed --num_accelerators N` starts, without
N + 2 times the imports.

    python tests/forked.py N PORT SCRIPT [ARGUMENT ...]

A rank has the environment and the `--local_rank` that DeepSpeed's launcher gives it. The first rank that fails ends
the others, and its exit code is that of the command. Tests of the launcher itself, and of the commands as users submit
them, start the real one.
"""

import importlib
import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = ("deepspeed", "pipeline.continual", "pipeline.serving")


def main(ranks: int, port: int, script: str, arguments: list[str]) -> int:
    """Fork the ranks and wait for them; the exit code."""
    sys.path.insert(0, str(ROOT))
    for module in IMPORTED:
        importlib.import_module(module)
    sys.stdout.flush()
    return wait_for(start(ranks, port, script, arguments))


def start(
    ranks: int, port: int, script: str, arguments: list[str], first: Callable[[int], None] = lambda rank: None
) -> dict[int, int]:
    """Fork the ranks; {process id: rank}. Each calls `first` with its rank before the script."""
    children = {}
    for rank in range(ranks):
        if (pid := os.fork()) == 0:
            be_rank(rank, ranks, port, script, arguments, first)
        children[pid] = rank
    return children


def wait_for(children: dict[int, int]) -> int:
    """Wait for the ranks' end; the exit code."""
    code = 0
    while children:
        pid, status = os.wait()
        children.pop(pid)
        ended = os.waitstatus_to_exitcode(status)
        if ended and not code:
            code = ended if ended > 0 else 128 - ended
            for other in children:
                os.kill(other, signal.SIGTERM)
    return code


def be_rank(
    rank: int,
    ranks: int,
    port: int,
    script: str,
    arguments: list[str],
    first: Callable[[int], None] = lambda rank: None,
    elsewhere: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Run the script as one rank; does not return. `elsewhere` replaces what is said of a host that has all ranks."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "CROSS_RANK": 0}
    places |= {"CROSS_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **elsewhere}
    os.environ.update({name: str(value) for name, value in places.items()})
    sys.argv = [script, f"--local_rank={places['LOCAL_RANK']}", *arguments]
    code = 1
    try:
        first(rank)
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    number, free_port, program, *rest = sys.argv[1:]
    sys.exit(main(int(number), int(free_port), program, rest))
