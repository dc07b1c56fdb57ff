"""Feed hostile and broken inputs to every reader.

    python -m tests.fuzz.driver [--count 20000] [--seed 1] [--reader NAME] [--only SEED]

Each input has a number of its own, from which it can be made again: `--reader data --only 1234`. Prints, by reader, how
many inputs were taken, refused and found to crash, hang (over ten seconds) or write where they must not. Exit 1 where
something was found.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data_contracts import UserError
from tests.fuzz.readers import READERS

SECONDS = 10  # of one input


@dataclass
class Result:
    """What became of a reader's inputs."""

    taken: int = 0
    refused: int = 0
    finds: dict[int, str] = field(default_factory=dict)  # number of the input -> what happened


class Hang(BaseException):
    """An input took too long."""


def run(reader: str, count: int, seed: int) -> Result:
    """Feed `count` inputs, numbered from `seed * 1,000,000`, to a reader."""
    result = Result()
    first = seed * 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, first + count):
            feed(reader, number, Path(folder), result)
    return result


def feed(reader: str, number: int, folder: Path, result: Result) -> None:
    """Make input `number` of a reader and note what becomes of it."""
    own = folder / "in" / reader
    own.mkdir(parents=True, exist_ok=True)
    before = {path.name for path in folder.iterdir()}

    def hang(*_):
        raise Hang(f"over {SECONDS} s")

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        READERS[reader][0](random.Random(f"{reader} {number}"), own)
        result.taken += 1
    except UserError as error:
        result.refused += 1
        if not str(error).strip() or len(str(error)) > 20_000:
            result.finds[number] = f"a refusal of {len(str(error))} characters"
    except (Exception, Hang) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        result.finds[number] = f"{type(error).__name__}: {str(error)[:200]!r} ({place.filename}:{place.lineno})"
        shutil.rmtree(own, ignore_errors=True)
    finally:
        signal.alarm(0)
    if {path.name for path in folder.iterdir()} != before:
        result.finds[number] = "wrote outside its folder"


def main(arguments: list[str] | None = None) -> int:
    """Run the readers asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description="Feed hostile and broken inputs to every reader.")
    parser.add_argument("--count", type=int, default=20_000, help="inputs over all readers")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--reader", choices=READERS, help="this one alone")
    parser.add_argument("--only", type=int, help="this input alone, by its number")
    options = parser.parse_args(arguments)
    names = [options.reader] if options.reader else list(READERS)
    shares = sum(READERS[name][1] for name in names)
    total: Counter = Counter()
    for name in names:
        if options.only is not None:
            READERS[name][0](random.Random(f"{name} {options.only}"), Path(tempfile.mkdtemp()))
            continue
        result = run(name, -(-options.count * READERS[name][1] // shares), options.seed)
        inputs = result.taken + result.refused + len(result.finds)
        total.update(inputs=inputs, finds=len(result.finds))
        print(f"{name:10} {inputs:6} inputs, {result.taken} taken, {result.refused} refused, {len(result.finds)} finds")
        for number, what in list(result.finds.items())[:20]:
            print(f"  {name} {number}: {what}")
    print(f"{total['inputs']} inputs, {total['finds']} finds")
    return 1 if total["finds"] else 0


if __name__ == "__main__":
    sys.exit(main())
