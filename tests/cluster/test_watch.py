"""The watchdogs of two and three hosts, on ranks without torch: a job ends on all hosts, and each says whose fault it
was. Limit 4 s, grace 2 s.

Much of it is waiting, so all scenes are played at once, each on hosts of its own, before the first test.
"""

import contextlib
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cluster import cluster as hosts_of

LIMIT, GRACE = 4.0, 2.0
HOST = hosts_of.ROOT / "tests" / "watch" / "host.py"
SCENES = {}
pytestmark = pytest.mark.skipif(bool(hosts_of.missing()), reason=hosts_of.missing() or "can be made")


class Job:
    """A job of one rank a host, each with the role of its host."""

    def __init__(self, cluster: hosts_of.Cluster, roles: tuple[str, ...]) -> None:
        self.cluster = cluster
        names = ",".join(f"{host.name} (rank {number})" for number, host in enumerate(cluster.hosts))
        common = {"LIMIT": str(LIMIT), "GRACE": str(GRACE), "WORLD_SIZE": str(len(roles)), "HOSTS": names}
        common |= {"MEETING": str(cluster.shared / "meeting"), "MASTER_ADDR": cluster[0].address}
        waiting = cluster.shared / "torch" / "distributed" / "waiting.py"
        waiting.parent.mkdir(parents=True)
        waiting.write_text("import time\ntime.sleep(600)\n")
        common |= {"COLLECTIVE": str(waiting)}
        self.before = [set(host.processes()) for host in cluster.hosts]
        self.errors = [cluster.shared / f"{host.name}.err" for host in cluster.hosts]
        self.launchers = []
        for number, (host, role) in enumerate(zip(cluster.hosts, roles, strict=True)):
            own = {"FIRST_RANK": str(number), "HOST": str(number), "MARKER": str(cluster.shared / f"stopped{number}")}
            with open(self.errors[number], "wb") as error:
                streams = {"stdout": subprocess.PIPE, "stderr": error, "text": True}
                self.launchers.append(host.start("python", HOST, role, environment=common | own, **streams))
        for launcher in self.launchers:  # "pids ..." and, of all that does not fail at once, "ready"
            launcher.stdout.readline()
        end = time.monotonic() + 20
        while not all(self.link_made()) and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(1.5)  # the watchdogs hear of each other

    def link_made(self) -> list[bool]:
        """Whether the watchdog of each host has been told of the others."""
        return [any((host.disk / "tmp").glob("perennial-watch-*/link")) for host in self.cluster.hosts]

    def signal(self, host: int, number: int) -> None:
        """Send a signal to the rank of a host."""
        (pid,) = self.cluster[host].pids("play.py")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def seconds(self, hosts: tuple[int, ...], timeout: float = 20.0) -> list[float]:
        """Seconds from now to the end of the last process of each host; `timeout` where there is none."""
        begin = time.monotonic()
        ends: dict[int, float] = {}
        while len(ends) < len(hosts) and time.monotonic() - begin < timeout:
            for host in hosts:
                if host not in ends and not set(self.cluster[host].processes()) - self.before[host]:
                    ends[host] = time.monotonic() - begin
            time.sleep(0.25)
        return [ends.get(host, timeout) for host in hosts]

    def said(self, host: int) -> str:
        return self.errors[host].read_text()

    def codes(self, host: int) -> str:
        """What the launcher of a host says of its ranks' ends."""
        return self.launchers[host].communicate(timeout=20)[0].splitlines()[-1]


def scene(*roles):
    """A function that acts on a started job; what it returns is what the test of that name gets, with the job."""

    def keep(act):
        SCENES[act.__name__] = (roles, act)
        return act

    return keep


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """{scene: (its job, what it returned)}; afterwards nothing of them runs."""
    folder = tmp_path_factory.mktemp("hosts")
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(SCENES)) as pool:
        clusters = {
            name: stack.enter_context(hosts_of.cluster(folder / name, len(roles)))
            for name, (roles, _) in SCENES.items()
        }

        def play(name):
            roles, act = SCENES[name]
            job = Job(clusters[name], roles)
            return job, act(job)

        coming = {name: pool.submit(play, name) for name in SCENES}
        yield {name: future.result() for name, future in coming.items()}


@scene("waits", "works")
def killed(job):
    job.signal(1, signal.SIGKILL)
    return job.seconds((0, 1))


@scene("waits", "works")
def paused(job):
    job.signal(1, signal.SIGSTOP)
    return job.seconds((0, 1))


@scene("waits", "sleeps")
def asleep(job):
    return job.seconds((0, 1))


@scene("waits", "waits", "waits")
def all_waiting(job):
    return job.seconds((0, 1, 2))


@scene("works", "works", "works")
def cut_off(job):
    job.cluster.link(2, up=False)
    return job.seconds((0, 1, 2))


@scene("works", "works")
def host_lost(job):
    job.cluster.link(1, up=False)
    job.cluster[1].kill()
    return job.seconds((0,))


@scene("works", "works")
def stopped(job):
    job.signal(1, signal.SIGTERM)
    return job.seconds((0, 1))


@scene("waits", "fails")
def failed(job):
    return job.seconds((0, 1))


@scene("works", "works")
def cable_out_for_a_moment(job):
    job.cluster.link(1, up=False)
    time.sleep(1.5)
    job.cluster.link(1, up=True)
    time.sleep(2 * LIMIT)
    running = [bool(host.pids("play.py")) for host in job.cluster.hosts]
    job.signal(0, signal.SIGTERM)
    return running, job.seconds((0, 1))


@scene("waits", "computes")
def waiting_for_a_host_at_work(job):
    time.sleep(2.5 * LIMIT)
    return [bool(host.pids("play.py")) for host in job.cluster.hosts]


@scene("works", "works")
def strangers(job):
    """Speak to the watchdog of node1 as somebody on node2 who has no token."""
    port = (next((job.cluster[0].disk / "tmp").glob("perennial-watch-*/port"))).read_text()
    script = job.cluster.shared / "stranger.py"
    script.write_text(
        "import json, socket, sys\n"
        "for garbage in (b'', b'\\n', b'x' * 200_000, b'{}\\n', json.dumps({'verdict': 'mine', 'host': 1}).encode()):\n"
        "    s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)\n"
        "    s.recv(100)\n"
        "    try:\n"
        "        s.sendall(b'0' * 64 + b' ' + garbage + b'\\n'); s.recv(100)\n"
        "    except OSError:\n"
        "        pass\n"
        "print('said all')\n"
    )
    done = job.cluster[1].run("python", script, job.cluster[0].address, port)
    time.sleep(1.5 * LIMIT)
    return done.stdout, [bool(host.pids("play.py")) for host in job.cluster.hosts]


def test_a_killed_rank_ends_the_job_on_both_hosts_and_both_name_it(played):
    job, seconds = played["killed"]
    assert max(seconds) < LIMIT
    for host in (0, 1):
        assert "rank 1 (host node2, process" in job.said(host) and "is gone, killed or crashed" in job.said(host)


def test_a_paused_rank_ends_the_job_on_both_hosts_and_both_name_it(played):
    job, seconds = played["paused"]
    assert max(seconds) < LIMIT + 2
    for host in (0, 1):
        assert "rank 1 (host node2, process" in job.said(host) and "was stopped (SIGSTOP)" in job.said(host)


def test_a_rank_that_sleeps_ends_the_job_on_both_hosts(played):
    job, seconds = played["asleep"]
    assert max(seconds) < LIMIT + 2
    assert "rank 1 (host node2, process" in job.said(0) and "has stood still" in job.said(0)


def test_ranks_of_three_hosts_that_all_wait_for_each_other_end(played):
    job, seconds = played["all_waiting"]
    assert max(seconds) < LIMIT + 3
    for host in (0, 1, 2):
        assert "has stood still, as all ranks of all hosts" in job.said(host)


def test_a_host_that_is_cut_off_ends_the_job_on_all_three_and_is_named_by_those_that_are_left(played):
    job, seconds = played["cut_off"]
    assert max(seconds) < LIMIT + 2
    for host in (0, 1):
        assert "host node3 (rank 2) is cut off or gone" in job.said(host)
    assert "host node1 (rank 0) is cut off or gone" in job.said(2)


def test_a_host_whose_power_fails_ends_the_job_on_the_other_one(played):
    job, seconds = played["host_lost"]
    assert max(seconds) < LIMIT + 2
    assert "host node2 (rank 1) is cut off or gone" in job.said(0)


def test_a_request_to_stop_on_one_host_stops_the_other_too(played):
    job, seconds = played["stopped"]
    assert max(seconds) < GRACE + 2
    assert [job.codes(host) for host in (0, 1)] == ["codes 75", "codes 75"]
    assert "told by another host: rank 1 (host node2, process" in job.said(0)


def test_the_others_of_a_host_that_failed_do_not_outlive_it_by_more_than_the_grace_time(played):
    job, seconds = played["failed"]
    assert max(seconds) < GRACE + 3
    assert "host node2 (rank 1) ended with exit code 1" in job.said(0)


def test_a_cable_that_is_out_for_a_moment_changes_nothing(played):
    job, (running, seconds) = played["cable_out_for_a_moment"]
    assert running == [True, True], job.said(0) + job.said(1)
    assert max(seconds) < GRACE + 2
    assert "cut off" not in job.said(0) + job.said(1)


def test_a_host_that_waits_for_one_at_work_is_left_alone(played):
    job, running = played["waiting_for_a_host_at_work"]
    assert running == [True, True], job.said(0) + job.said(1)


def test_strangers_cannot_end_a_job(played):
    job, (told, running) = played["strangers"]
    assert told == "said all\n"
    assert running == [True, True], job.said(0) + job.said(1)
    assert "mine" not in job.said(0) + job.said(1)
