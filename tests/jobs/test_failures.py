"""A rank that dies, stops or stands still ends the whole job in time and is named; a request to stop reaches all ranks
whoever gets it; no process is left; and the relaunch ends as if nothing had happened. Two ranks.
"""

import re

import pytest

from tests.helpers import make_stream
from tests.jobs.failures import GRACE, KINDS, LIMIT, Outcome, break_job, published, table
from tests.jobs.launch import Case, run_many
from tests.jobs.many import digests
from tests.jobs.streams import LEARNING

SLACK = 10.0  # seconds for the launcher, which looks after its ranks once a second, on a busy machine


def check(outcome: Outcome) -> None:
    """What holds of every kind of failure and of stop."""
    kind = outcome.kind
    assert outcome.left == [], outcome.text
    assert not [name for name in outcome.files if name.startswith(("champion.json", "increments/", "finished.json"))]
    assert len(outcome.said) <= 1 and re.match(kind.named or "$", "".join(outcome.said)), outcome.text
    if kind.stops:
        assert re.fullmatch(r"increment 1 first: stopped at step \d+ of 18; the same command continues", outcome.marker)
        assert "inflight/state.safetensors" in outcome.files and outcome.seconds < GRACE + SLACK
    else:
        assert outcome.code != 0 and outcome.marker == "" and outcome.seconds < LIMIT + SLACK, outcome.text


@pytest.mark.timeout(1800)  # set-up is several launches, each with a shorter limit of its own
def test_a_rank_that_stands_still_and_a_killed_deepspeed_end_the_job_and_leave_no_process(broken):
    for outcome in broken:
        check(outcome)


@pytest.mark.timeout(1800)
def test_the_relaunch_after_either_ends_with_the_very_same_experts_and_manifest(broken, learned, on_two_ranks):
    for outcome in broken:
        relaunch = on_two_ranks.done[outcome.kind.name]
        assert relaunch.code == 0, relaunch.text
        assert published(digests(outcome.work_dir)) == published(learned.after_first)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_every_kind_of_failure_and_stop_ends_the_job_in_time_and_is_continued_to_the_same_end(inputs, tmp_path, capsys):
    work_dir = tmp_path / "unbroken"
    contracts = [inputs.contract("first")]
    stream = make_stream(tmp_path / "stream.yaml", work_dir, inputs.backbone, inputs.root, contracts, **LEARNING)
    unbroken = Case("continual", ("--stream", stream), work_dir)
    outcomes = [break_job(kind, stream, tmp_path / str(number)) for number, kind in enumerate(KINDS)]
    whole, *relaunched = run_many([unbroken, *(o.relaunch for o in outcomes)], tmp_path / "out", ranks=2)
    same = [done.code == 0 and published(done.files) == published(whole.files) for done in relaunched]
    with capsys.disabled():
        print(table(outcomes, same))
    for outcome in outcomes:
        check(outcome)
    assert published(whole.files) and all(same), [done.text for done in relaunched if done.code]
    codes = {outcome.kind.name: outcome.code for outcome in outcomes}
    assert codes["SIGTERM to a rank"] == codes["SIGINT to a rank"] == 75
