"""A launcher for the tests of the watchdog: starts a rank a role, waits for all, tells their exit codes.

    python host.py ROLE [ROLE ...]

Unlike a real launcher it ends nobody: what ends is ended by the watchdog. FIRST_RANK is the number of the first rank,
0 unless there are other hosts.
"""

import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    roles = sys.argv[1:]
    size = os.environ.get("WORLD_SIZE", str(len(roles)))
    first = int(os.environ.get("FIRST_RANK", "0"))
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("play.py")), role],
            env=os.environ
            | {"RANK": str(first + rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_SIZE": str(len(roles))},
        )
        for rank, role in enumerate(roles)
    ]
    print("pids", *[rank.pid for rank in ranks], flush=True)
    print("codes", *[rank.wait() for rank in ranks], flush=True)
