"""Whom the others waited for, on times worked out by hand; the picture and the trace of such a run."""

import json

import pytest

from data_contracts.errors import UserError
from pipeline.spans.picture import draw, whole_step
from pipeline.spans.read import chrome_trace, read_spans
from pipeline.spans.slowest import rank_times, report, slowest, verdict


def step(rank, number, seconds, detailed=False, **sums):
    place = {"rank": rank, "host": f"host{rank}", "increment": 1, "step": number}
    return {"name": "step", "start": 100.0 + number, "seconds": seconds, **place, "sums": sums, "detailed": detailed}


def run(own, data=0.0):
    """Two steps of 1 s on three ranks; rank r works own[r] seconds and is in collectives for the rest."""
    return [
        step(rank, number, 1.0, data=data, forward=0.5, backward=0.5 - data, gather=0.6 * (1 - o), wait=0.4 * (1 - o))
        for rank, o in enumerate(own)
        for number in (1, 2)
    ]


def test_the_rank_with_the_most_work_of_its_own_is_the_slowest():
    ranks = rank_times(run([0.5, 0.9, 0.4]))
    assert slowest(ranks).rank == 1
    assert ranks[1].own == pytest.approx(2 * 0.9) and ranks[2].in_collectives == pytest.approx(2 * 0.6)
    text = verdict(ranks)
    assert text.startswith("slowest: rank 1 on host1, 0.9000 s of its own work a step;")
    assert "the others did theirs in 0.4500 s" in text and "55% of the time (it: 10%)" in text


def test_ranks_that_are_alike_have_no_slowest():
    ranks = rank_times(run([0.50, 0.52, 0.51]))
    assert slowest(ranks) is None and verdict(ranks).startswith("no rank kept the others waiting")


def test_the_report_has_rates_shares_and_the_wait_for_data():
    text = report(rank_times(run([0.5, 0.9, 0.4], data=0.25)))
    assert "waiting for data: 25.0% of the ranks' time" in text
    first = text.splitlines()[1].split()
    assert first[:5] == ["0", "host0", "2", "1.00", "1.0000"]
    assert "all_to_all" not in text, "a kind that nobody had gets no column"


def test_files_of_all_ranks_are_read_together_and_damaged_lines_left_out(tmp_path):
    lines = run([0.5, 0.9])
    for rank in (0, 1):
        own = [json.dumps(line) for line in lines if line["rank"] == rank]
        (tmp_path / f"rank{rank:05d}.jsonl").write_text("\n".join([*own, '{"name": "step", "st', "7", ""]))
    assert len(read_spans([tmp_path])) == 4 and len(read_spans([tmp_path], 1)) == 4
    with pytest.raises(UserError, match="there are those of 1"):
        read_spans([tmp_path], 3)


def test_the_picture_shows_the_median_whole_step_and_not_the_first(tmp_path):
    whole = [step(0, 1, 9.0, True), step(0, 50, 1.0, True), step(0, 100, 3.0, True), step(0, 150, 2.0, True)]
    assert whole_step(whole) == (1, 150)
    assert whole_step(whole[:1]) == (1, 1) and whole_step([step(0, 1, 1.0)]) is None
    span = {"name": "forward", "start": 200.0, "seconds": 1.0, "rank": 0, "host": "a", "increment": 1, "step": 150}
    draw([*whole, span], tmp_path / "t.png")
    draw([step(0, 1, 1.0)], tmp_path / "no_whole_step.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    (event,) = [event for event in chrome_trace([span])["traceEvents"] if event["ph"] == "X"]
    assert (event["ts"], event["dur"], event["pid"]) == (200e6, 1e6, 0)
