"""A rank of the tests of the watchdog: no torch, half a second of imports. Started by `host.py`.

    python play.py ROLE

`works` reports for ever; `computes` and `sleeps` report once and then do as they say; `waits` sleeps in a place that
looks like a collective; `holds` keeps the interpreter to itself; `deaf` is not moved by a request to stop; `fails`
raises; `short` is done at once; `parent` has a child that sleeps. All but `deaf` end with 75 when they are to stop.
With MEETING, a file that all hosts see, their watchdogs get in touch.
"""

import ctypes
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.training.stop import EXIT_STOPPED, StopFlag
from pipeline.watch import rank as watch


def play() -> int:
    """Do as the role says; the exit code."""
    role = sys.argv[1]
    stop = StopFlag()
    stop.listen()
    stop.marker = lambda message: Path(os.environ["MARKER"]).write_text(message)
    watch.set_limits(float(os.environ["LIMIT"]), float(os.environ["GRACE"]))
    if "MEETING" in os.environ:
        meet(Path(os.environ["MEETING"]))
    watch.report(f"{role}: step 1")
    print(f"{os.environ['RANK']} ready", flush=True)
    if role == "short":
        return 0
    if role == "fails":
        raise RuntimeError("a rank's own error")
    if role == "parent":
        subprocess.Popen(["sleep", "600"])
    if role == "holds":
        ctypes.PyDLL(None).sleep(600)
    if role == "sleeps":
        time.sleep(600)
    if role == "waits":
        runpy.run_path(os.environ["COLLECTIVE"])
    while not stop.requested or role == "deaf":
        if role == "computes":
            sum(range(200_000))
        else:
            if role in ("works", "parent"):
                watch.report()
            time.sleep(0.05)
    return EXIT_STOPPED


def meet(place: Path) -> None:
    """Connect the watchdogs of the hosts in HOSTS, of which this is number HOST."""
    own = int(os.environ["HOST"])
    record = {"token": "a token of the tests", "hosts": os.environ["HOSTS"].split(","), "own": own}
    if own == 0:
        watch.join_watchdogs(record)
        place.with_suffix(".new").write_text(str(watch.link_port()))
        place.with_suffix(".new").rename(place)
        return
    while not place.is_file():
        time.sleep(0.02)
    watch.join_watchdogs(record | {"address": os.environ["MASTER_ADDR"], "port": int(place.read_text())})


if __name__ == "__main__":
    sys.exit(watch.watched(play))
