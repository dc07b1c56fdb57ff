"""What counts as progress, and who is at fault, on looks worked out by hand: one a second, a limit of 60 s."""

import pytest

from pipeline.watch.judge import Sight, Watched, fault, standstill, suspects
from pipeline.watch.processes import Process

SAYS = {"rank": 0, "world_size": 2, "host": "n1", "doing": "step 3", "reports": 1, "ended": None}


def watched(looks, rank=0, says=None):
    """A rank after looks of (what it says more, what is seen), one a second."""
    told = SAYS | {"rank": rank} | (says or {})
    seen = Watched(Process(100 + rank, 1), told)
    for more, sight in looks:
        seen.observe(1.0, told | more, sight)
    return seen


def asleep(seconds, **says):
    return [(says, Sight("S", 5.0, 100))] * seconds


@pytest.mark.parametrize(
    ("looks", "quiet"),
    [
        (asleep(61), 60.0),
        ([({"reports": n}, Sight("S", 5.0, 100)) for n in range(61)], 0.0),
        ([({}, Sight("D", 5.0, 100))] * 61, 0.0),  # a disk's answer is awaited
        ([({}, Sight("R", 5.0, 100))] * 61, 0.0),  # a processor is awaited
        ([({}, Sight("R" if n % 2 else "S", 5.0, 100)) for n in range(61)], 60.0),  # it wakes up now and then
        ([({}, Sight("S", 5.0 + 0.01 * n, 100)) for n in range(61)], 60.0),  # 1 % of a core: idle threads
        ([({}, Sight("S", 5.0, 100 + 50 * n)) for n in range(61)], 60.0),  # 50 bytes a second: idle threads
        ([({}, Sight("S", 5.0, 100 + (n // 30) * 2**20)) for n in range(61)], 0.0),  # 1 MB every 30 s
    ],
)
def test_a_rank_is_quiet_without_reports_work_transfers_and_waiting_for_disk_or_processor(looks, quiet):
    assert watched(looks).quiet_for == quiet


def test_work_of_three_percent_of_a_core_keeps_a_rank_from_being_quiet_for_long():
    assert watched([({}, Sight("S", 5.0 + 0.03 * n, 100)) for n in range(600)]).quiet_for < 5


def test_only_a_rank_that_has_been_quiet_for_four_fifths_of_the_limit_is_suspected():
    assert suspects([watched(asleep(48))], 60.0) == []  # quiet since the first look, 47 s ago
    assert len(suspects([watched(asleep(49))], 60.0)) == 1
    assert suspects([watched(asleep(1000))], None) == []
    assert suspects([watched(asleep(1000, ended=0))], 60.0) == []


def places(**waits):
    return {int(rank[1:]): {"waits": where, "at": "somewhere"} for rank, where in waits.items()}


def test_who_stands_outside_a_collective_is_at_fault_and_not_those_that_wait_for_it():
    ranks = [watched(asleep(49)), watched(asleep(49), 1)]
    verdict = standstill(ranks, ranks, places(r0="ranks", r1=""))
    assert [rank.says["rank"] for rank in verdict.culprits] == [1]
    assert verdict.line == (
        "rank 1 (host n1, process 101) has stood still for 48 s at somewhere, last seen: step 3 (49 s ago); "
        "the job ends, the same command continues it"
    )
    silent = standstill(ranks, ranks, places(r0="ranks"))
    assert silent.culprits == (ranks[1],) and "for 48 s and gives no answer" in silent.line


def test_all_ranks_in_collectives_are_a_fault_of_the_one_that_reported_first_and_only_when_all_are_here():
    late = watched([({"reports": 2 if n > 2 else 1}, Sight("S", 5.0, 100)) for n in range(60)])
    ranks = [late, watched(asleep(60), 1)]
    both = places(r0="ranks", r1="ranks")
    assert standstill(ranks, ranks, both).culprits == (ranks[1],)
    assert standstill(ranks, ranks[1:], both) is None  # the other one is at work
    assert standstill(ranks, ranks, places(r0="bounded", r1="ranks")) is None
    four = [watched(asleep(60), rank, {"world_size": 4}) for rank in (0, 1)]
    assert standstill(four, four, both) is None  # they may wait for ranks of another host


def test_a_rank_that_is_gone_without_a_last_word_is_at_fault_at_once_and_one_that_is_through_is_not():
    gone = watched([({}, Sight("S")), ({}, Sight(""))], 1)
    assert fault([watched(asleep(2)), gone], None, 30.0).culprits == (gone,)
    assert fault([watched(asleep(2)), watched([({"ended": 0}, Sight(""))], 1)], None, 30.0) is None
    assert fault([watched(asleep(2)), watched([({"ended": 75}, Sight(""))] * 99, 1)], None, 30.0) is None


def test_a_stopped_rank_is_at_fault_after_four_fifths_of_the_limit():
    stopped = [({}, Sight("T", 5.0, 100))]
    assert fault([watched(stopped * 47)], 60.0, 30.0) is None
    assert "was stopped (SIGSTOP) for 48 s" in fault([watched(stopped * 48)], 60.0, 30.0).line
    assert fault([watched(stopped * 1000)], None, 30.0) is None


def test_who_does_not_follow_a_failed_rank_is_ended_after_the_grace_time():
    failed = watched([({"ended": 1}, Sight(""))] * 30, 1)
    assert fault([watched(asleep(30)), failed], 60.0, 31.0) is None
    assert "ended with exit code 1 and the others did not follow" in fault([watched(asleep(30)), failed], 60.0, 30).line


def test_a_process_that_stays_after_its_command_is_through_is_ended_unless_it_is_still_busy():
    assert "is through, exit code 0, but its process stays" in fault([watched(asleep(32, ended=0))], 60.0, 30.0).line
    busy = [({"ended": 0}, Sight("S", 5.0 + n, 100)) for n in range(100)]
    assert fault([watched(busy)], 60.0, 30.0) is None
