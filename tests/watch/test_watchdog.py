"""The watchdog on ranks without torch: who is ended, after how long, and who is named. Limit 4 s, grace 2 s.

Much of it is waiting, so all scenes are played at once, before the first test.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.watch import processes
from pipeline.watch.processes import command

LIMIT, GRACE, SLACK = 4.0, 2.0, 3.0  # seconds; the last for a busy machine
HOST = Path(__file__).with_name("host.py")


class Job:
    """A started job: its launcher, its ranks, and how it ended."""

    def __init__(self, folder: Path, *roles: str, **environment: str) -> None:
        self.folder, self.marker = folder, folder / "marker"
        collective = folder / "torch" / "distributed" / "waiting.py"
        collective.parent.mkdir(parents=True)
        collective.write_text("import time\ntime.sleep(600)\n")
        ours = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE"}
        err = (folder / "err").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, str(HOST), *roles],
            env={name: value for name, value in os.environ.items() if name not in ours}
            | {"LIMIT": str(LIMIT), "GRACE": str(GRACE), "TMPDIR": str(folder), "MARKER": str(self.marker)}
            | {"COLLECTIVE": str(collective), **environment},
            **{"stdout": subprocess.PIPE, "stderr": err, "text": True},
            start_new_session=True,
        )
        err.close()
        lines = [self.process.stdout.readline() for _ in range(1 + len(roles))]
        self.pids = [int(pid) for line in lines if line.startswith("pids") for pid in line.split()[1:]]

    def codes(self, timeout: float = 30.0) -> list[int]:
        """The ranks' exit codes, once all have ended."""
        out, _ = self.process.communicate(timeout=timeout)
        last = out.splitlines()[-1].split()
        assert last[0] == "codes", out
        return [int(code) for code in last[1:]]

    @property
    def said(self) -> str:
        return (self.folder / "err").read_text()

    def left(self) -> list[str]:
        """What still runs of it, or lies in the folder for temporary files, after a second."""
        end = time.monotonic() + 1.5
        while time.monotonic() < end and (left := self._left()):
            time.sleep(0.05)
        return left

    def _left(self) -> list[str]:
        running = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        ours = [f"{pid} {command(pid)}" for pid in running if self._is_ours(pid)]
        return ours + [path.name for path in self.folder.glob("perennial-watch*")]

    def _is_ours(self, pid: int) -> bool:
        found = processes.stat(pid)
        with contextlib.suppress(OSError):
            ours = os.getsid(pid) == self.process.pid or str(self.folder) in " ".join(command(pid))
            return ours and found is not None and found.alive
        return False

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


SCENES = {}


def scene(*roles, **environment):
    """A function that acts on a started job; what it returns is what the test of that name gets, with the job."""

    def keep(act):
        SCENES[act.__name__] = (roles, environment, act)
        return act

    return keep


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """{scene: (its job, what it returned)}, all played at once; afterwards nothing of them runs."""
    jobs = {}
    folders = {name: tmp_path_factory.mktemp(name) for name in SCENES}  # not in threads: the first one makes the root

    def play(name):
        roles, environment, act = SCENES[name]
        jobs[name] = Job(folders[name], *roles, **environment)
        return jobs[name], act(jobs[name])

    with ThreadPoolExecutor(len(SCENES)) as pool:
        coming = {name: pool.submit(play, name) for name in SCENES}
    yield {name: future.result() for name, future in coming.items()}
    for job in jobs.values():
        job.close()


def timed(job, rank, number):
    """Send a signal to a rank; the exit codes and the seconds until all had ended."""
    begin = time.monotonic()
    os.kill(job.pids[rank], number)
    return job.codes(), time.monotonic() - begin


@scene("works", "parent")
def killed(job):
    return *timed(job, 1, signal.SIGKILL), job.left()


def test_a_killed_rank_is_named_and_ends_the_others_within_the_limit(played):
    job, (codes, seconds, left) = played["killed"]
    assert codes == [-9, -9] and seconds < LIMIT
    assert f"process {job.pids[1]}) is gone" in job.said and "rank 1 (host" in job.said
    assert "last seen: parent: step 1" in job.said and "rank 0" not in job.said
    assert left == []  # its child neither


@scene("works", "works")
def stopped(job):
    return *timed(job, 0, signal.SIGSTOP), job.left()


def test_a_stopped_rank_is_named_and_ends_the_job_within_the_limit(played):
    job, (codes, seconds, left) = played["stopped"]
    assert codes == [-9, -9] and 0.7 * LIMIT < seconds < LIMIT + SLACK
    assert "rank 0 (host" in job.said and "was stopped (SIGSTOP)" in job.said and "rank 1" not in job.said
    assert left == []


@scene("waits", "sleeps")
def sleeping(job):
    return job.codes(), job.left()


@scene("waits", "holds")
def holding(job):
    return job.codes(), job.left()


@pytest.mark.parametrize(("wedged", "at"), [("sleeping", "play (tests/watch/play.py:"), ("holding", "gives no answer")])
def test_a_rank_that_stands_still_is_told_from_those_that_wait_for_it(played, wedged, at):
    job, (codes, left) = played[wedged]
    assert codes == [-9, -9] and left == []
    assert "rank 1 (host" in job.said and at in job.said and "rank 0" not in job.said


def waits_and_lives(job):
    time.sleep(3 * LIMIT)
    return job.process.poll()


@scene("waits", "computes")
def waiting_for_a_computing_one(job):
    return waits_and_lives(job)


@scene("waits", "works")
def waiting_for_a_reporting_one(job):
    return waits_and_lives(job)


@scene("waits", WORLD_SIZE="2")
def waiting_for_another_host(job):
    return waits_and_lives(job)


@pytest.mark.parametrize(
    "healthy", ["waiting_for_a_computing_one", "waiting_for_a_reporting_one", "waiting_for_another_host"]
)
def test_nobody_is_ended_while_a_rank_works_or_waits_for_one_on_another_host(played, healthy):
    job, code = played[healthy]
    assert code is None and job.said == ""


@scene("waits", "waits")
def waiting_for_each_other(job):
    return job.codes()


def test_all_ranks_waiting_for_each_other_is_a_standstill(played):
    job, codes = played["waiting_for_each_other"]
    assert codes == [-9, -9] and "torch/distributed/waiting.py" in job.said


@scene("works", "works")
def suspended(job):
    os.killpg(job.process.pid, signal.SIGSTOP)
    time.sleep(2 * LIMIT)
    os.killpg(job.process.pid, signal.SIGCONT)
    time.sleep(1)
    lives = job.process.poll() is None
    os.kill(job.pids[0], signal.SIGTERM)
    return lives, job.codes()


def test_a_whole_job_that_is_suspended_is_left_alone(played):
    job, (lives, codes) = played["suspended"]
    assert lives and job.said == "" and codes == [75, 75]


def signalled(job, number):
    for _ in range(3):
        os.kill(job.pids[1], number)
        time.sleep(0.01)
    return job.codes(), job.left()


@scene("works", "works")
def terminated(job):
    return signalled(job, signal.SIGTERM)


@scene("works", "works")
def interrupted(job):
    return signalled(job, signal.SIGINT)


@pytest.mark.parametrize("name", ["terminated", "interrupted"])
def test_a_signal_to_one_rank_stops_all_and_a_second_one_harms_nobody(played, name):
    job, (codes, left) = played[name]
    assert codes == [75, 75] and job.said == "" and left == [] and not job.marker.exists()


@scene("works", "deaf")
def deaf(job):
    return timed(job, 0, signal.SIGTERM)


def test_a_rank_that_comes_to_no_next_step_leaves_with_75_and_a_marker_within_the_grace_time(played):
    job, (codes, seconds) = played["deaf"]
    assert codes == [75, 75] and seconds < GRACE + SLACK
    assert job.marker.read_text() == "deaf: step 1: stopped before it was done; the same command continues"


@scene("works", "holds")
def stuck(job):
    return *timed(job, 0, signal.SIGTERM), job.left()


def test_a_rank_that_cannot_even_leave_is_killed_after_the_grace_time(played):
    job, (codes, seconds, left) = played["stuck"]
    assert codes == [75, -9] and seconds < GRACE + SLACK and left == []
    assert "not ended 2 s after the request to stop: rank 1" in job.said


@scene("works", "works")
def orphaned(job):
    job.process.kill()
    job.process.wait()
    return job.left()


def test_ranks_stop_when_the_process_that_started_them_is_gone(played):
    job, left = played["orphaned"]
    assert left == [] and "the launcher of this host (process" in job.said and "is gone" in job.said


@scene("works", "fails")
def failed(job):
    return job.codes()


def test_ranks_that_do_not_follow_a_failed_one_are_ended(played):
    job, codes = played["failed"]
    assert codes == [-9, 1]
    assert "rank 1 (host" in job.said and "ended with exit code 1 and the others did not follow" in job.said


@scene("short", "short")
def done(job):
    return job.codes(), job.left()


def test_a_job_that_ends_well_leaves_nothing_and_says_nothing(played):
    job, (codes, left) = played["done"]
    assert codes == [0, 0] and job.said == "" and left == []
