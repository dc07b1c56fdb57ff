"""Processes that a benchmark starts: their environment, their launcher, and how one that failed is told."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 1800  # seconds; no measurement takes as long
# what a process group left in the environment would make the child join it
_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "CROSS_RANK")


def child_environment(**variables: str | int) -> dict[str, str]:
    """This process's environment without its process group, with the package to be found, and with `variables`."""
    environment = {name: value for name, value in os.environ.items() if name not in _GROUP}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    return environment | {name: str(value) for name, value in variables.items()}


def run_child(command: Sequence[str | Path], environment: Mapping[str, str]) -> str:
    """Standard error of a command that ends well; RuntimeError with the end of its output otherwise."""
    words = [str(part) for part in command]
    done = subprocess.run(
        words,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=TIMEOUT,
    )
    if done.returncode:
        output = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        raise RuntimeError(f"{' '.join(words[:4])} ended with {done.returncode}:\n{output}")
    return done.stderr


def run_module(module: str, spec: Path, environment: Mapping[str, str], ranks: int = 1) -> dict[str, Any]:
    """The note.json that `module` writes beside its spec, in a new process a rank. Raises RuntimeError as `run_child`.

    More ranks than one are started by DeepSpeed's launcher.
    """
    command: list[str | Path] = [sys.executable, "-m", module, spec]
    if ranks > 1:
        command = [*launcher(ranks), "--module", module, spec]
    run_child(command, environment)
    note = spec.with_name("note.json")
    if not note.is_file():  # the launcher can end well after its ranks did not
        raise RuntimeError(f"{module} ended without a result; its settings are in {spec}")
    return json.loads(note.read_text(encoding="utf-8"))


def launcher(ranks: int) -> list[str]:
    """`deepspeed` of this interpreter, whichever comes first on PATH, with a port that nobody listens on."""
    own = str(Path(sys.executable).parent)
    program = shutil.which("deepspeed", path=os.pathsep.join([own, os.environ["PATH"]])) or "deepspeed"
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    return [program, "--num_accelerators", str(ranks), "--master_port", str(port)]
