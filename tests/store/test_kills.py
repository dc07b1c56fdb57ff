"""A writer killed with SIGKILL at any moment: the next job goes on and ends as if nothing had happened."""

import os
import shutil
import signal
import sys

import pytest

from jobs import bank as bank_command
from pipeline.store.published import open_store
from pipeline.store.reconcile import open_in_step
from pipeline.tracking.chain import clean_left_overs, load_chain
from pipeline.tracking.champion import read_champion
from tests.store.chains import learn, objects_in, same_work, wrong

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.link")
REQUESTS = ("socket.connect",)  # the server takes one request a connection


def killed_before(step, action, counted=(*CHANGES, *REQUESTS, "open")):
    """Run `action` in a child that gets SIGKILL before its `step`-th change to a disk or request. The number of steps
    there are where it came to its end, else None.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event, arguments):
            nonlocal count
            if event in counted and (event != "open" or not set(arguments[1] or "r").isdisjoint("wxa")):
                count += 1
                if count > step:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            action()
            os.write(writer, str(count).encode())
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(writer)
    with open(reader) as said:
        number = said.read()
    assert code == (0 if number else -signal.SIGKILL)
    return int(number) if number else None


def goes_on(work_dir, uri, by_hand):
    """What the next job does, until tweets is learned. Says whether the killed one had come as far as the pointer."""
    clean_left_overs(work_dir)
    came = open_store(uri).pointer().champion
    open_in_step(work_dir, uri)
    assert wrong(work_dir, uri) == {} and read_champion(work_dir) == came
    shutil.rmtree(work_dir / "inflight", ignore_errors=True)
    if len(load_chain(work_dir)) == 2:
        return "after"
    learn(work_dir, by_hand, "tweets", open_store(uri))
    return "before"


def kill_at(steps, place, by_hand, tmp_path, **counted):
    """Kill writers before the steps that `steps` chooses of so many; each work_dir and store must end as an unbroken
    run's. Says of each kill whether it came before or after the pointer had moved.
    """
    start, whole = tmp_path / "start", tmp_path / "whole"
    learn(start, by_hand, "reviews")
    shutil.copytree(start, whole)
    open_in_step(whole, f"{place}/whole")
    publishing = lambda work_dir, uri: lambda: learn(work_dir, by_hand, "tweets", open_store(uri))  # noqa: E731
    total = killed_before(10**9, publishing(whole, f"{place}/whole"), **counted)
    shutil.rmtree(whole / "inflight")
    expected, expected_objects = same_work(whole), objects_in(f"{place}/whole")
    assert wrong(whole, f"{place}/whole") == {}
    outcomes = []
    for step in steps(total):
        work_dir, uri = shutil.copytree(start, tmp_path / f"{step}"), f"{place}/{step}"
        open_in_step(work_dir, uri)
        assert killed_before(step, publishing(work_dir, uri), **counted) is None
        outcomes.append(goes_on(work_dir, uri, by_hand))
        assert same_work(work_dir) == expected and objects_in(uri) == expected_objects
    return outcomes


def every(stride, last):
    """Chooses every `stride`-th step, and all of the `last` ones."""
    return lambda total: [*range(0, total - last, stride), *range(total - last, total)]


def check(outcomes, number, after):
    """Of the kills, the last `after` came when the pointer had moved."""
    assert outcomes == ["before"] * (len(outcomes) - after) + ["after"] * after and len(outcomes) >= number


def test_a_writer_killed_while_it_publishes_leaves_what_the_next_one_finishes(by_hand, tmp_path):
    check(kill_at(every(6, 7), str(tmp_path / "store"), by_hand, tmp_path), 16, 3)


def test_a_writer_killed_between_its_requests_leaves_what_the_next_one_finishes(by_hand, tmp_path, bucket):
    outcomes = kill_at(every(12, 3), bucket, by_hand, tmp_path, counted=(*REQUESTS, "os.rename"))
    check(outcomes, 4, 2)  # killed before the folder got its new name, and before champion.json did


@pytest.mark.long
@pytest.mark.parametrize("place", ["folder", "s3"])
def test_a_writer_killed_before_any_step_leaves_what_the_next_one_finishes(by_hand, tmp_path, place, request):
    place = str(tmp_path / "store") if place == "folder" else request.getfixturevalue("bucket")
    check(kill_at(every(1, 0), place, by_hand, tmp_path), 35, 3)


def change_killed_at(stride, place, by_hand, tmp_path, action):
    """Kill jobs/bank.py before every `stride`-th step of an action and before its last, and give the command again.
    Says of each kill whether the store was marked by a removal, and the second command's exit code.
    """
    start = tmp_path / "start"
    for task in ("reviews", "tweets", "mails"):
        learn(start, by_hand, task)
    run = lambda work_dir, *command: bank_command.main(["--work-dir", str(work_dir), *command])  # noqa: E731
    whole = shutil.copytree(start, tmp_path / "whole")
    open_in_step(whole, f"{place}/whole")
    total = killed_before(10**9, lambda: run(whole, *action))
    ours, outcomes = objects_in(f"{place}/whole"), []
    for step in {*range(0, total, stride), total - 1}:
        work_dir, uri = shutil.copytree(start, tmp_path / f"{step}"), f"{place}/{step}"
        open_in_step(work_dir, uri)
        assert killed_before(step, lambda work_dir=work_dir: run(work_dir, *action)) is None
        marked = open_store(uri).pointer().sweeping is not None
        if marked:
            assert run(work_dir, "gc", "--delete") == 2 and run(work_dir, "--break-lock", "gc", "--delete") == 0
        outcomes.append((marked, run(work_dir, *action)))
        assert run(work_dir, "gc", "--delete") == 0
        assert wrong(work_dir, uri) == {}
        theirs = objects_in(uri)
        assert theirs.keys() == ours.keys()
        differ = {name for name in ours if ours[name] != theirs[name]}
        assert all(name == "champion.json" or name.endswith("run.json") for name in differ)  # removals, times
    return outcomes


@pytest.mark.parametrize(
    ("place", "stride"),
    [("folder", 9), pytest.param("folder", 1, marks=pytest.mark.long), pytest.param("s3", 1, marks=pytest.mark.long)],
)
@pytest.mark.parametrize("action", [("retire", "tweets"), ("restore", "1")])
def test_a_change_killed_before_any_step_is_finished_by_the_same_command(
    by_hand, tmp_path, action, place, stride, request
):
    place = str(tmp_path / "store") if place == "folder" else request.getfixturevalue("bucket")
    outcomes = change_killed_at(stride, place, by_hand, tmp_path, action)
    assert len(outcomes) > 20 / stride
    assert {code for _, code in outcomes} == ({0} if action[0] == "retire" else {0, 2})  # 2: it is restored already
    assert any(marked for marked, _ in outcomes) == (action[0] == "retire")
