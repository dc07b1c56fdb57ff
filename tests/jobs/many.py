"""Run several commands of jobs/ one after another in this process: `python tests/jobs/many.py CASES.json OUT_DIR`.

Importing torch and DeepSpeed once saves most of the time, and every command still goes through its own main(). CASES
is a list of {"job": name, "arguments": [...], "watch": folder or null}. For each, OUT_DIR/<number>.<rank>.json gets
the exit code, what was written to the file descriptors 1 and 2, and on rank 0 the sha256 of every file below `watch`.
Exits as the last command did.
"""

import gc
import importlib
import json
import os
import sys
import traceback
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(cases_file: str, out_dir: str) -> int:
    """Run all cases; returns the last exit code."""
    sys.path.insert(0, str(ROOT))
    rank = int(os.environ.get("RANK", "0"))
    code = 0
    for number, case in enumerate(json.loads(Path(cases_file).read_text())):
        base = f"{out_dir}/{number}.{rank}"
        out, err = Path(f"{base}.out"), Path(f"{base}.err")
        code = captured(case["job"], case["arguments"], out, err)
        files = digests(Path(case["watch"])) if case["watch"] and rank == 0 else {}
        gc.collect()  # engines are cycles of objects: the next command needs their memory
        record = {"code": code, "stdout": out.read_text(), "stderr": err.read_text(), "files": files}
        Path(f"{base}.json").write_text(json.dumps(record))
    return code


def captured(job: str, arguments: list[str], out: Path, err: Path) -> int:
    """Run one command with the standard streams in files; an exception is exit 1 with a traceback, as in a shell."""
    saved = os.dup(1), os.dup(2)
    with open(out, "wb") as stdout, open(err, "wb") as stderr:
        flush()
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
        try:
            return importlib.import_module(f"jobs.{job}").main(arguments)
        except SystemExit as ended:
            return int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            flush()
            for number, descriptor in enumerate(saved, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


def flush() -> None:
    """Nothing stays in Python's buffers."""
    sys.stdout.flush()
    sys.stderr.flush()


def digests(folder: Path) -> dict[str, str]:
    """sha256 by name of every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    last = main(*(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")))
    flush()
    os._exit(last)  # everything is written: taking the interpreter down with all it imported costs seconds
