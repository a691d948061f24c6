"""Bubbles and stages against the papers' formulas, and the played timeline against the bubbles."""

import json
from pathlib import Path

import numpy as np
import pytest

from moestro.core.errors import PlanError
from moestro.plan.layout import SCHEDULES, Layout
from moestro.plan.schedule import bubble_s, cut, in_flight, slowest_stage
from moestro.plan.step import StepTime
from moestro.plan.timeline import play, write_trace

UNIT = StepTime(
    total_s=1.0,
    parts={"gradient reduction": 0.0, "optimiser": 0.0, "fixed": 0.0, "work": 1.0},
    stage_s=3.0,
    forward_share=1 / 3,
    weight_share=1 / 3,
)
"""A stage whose forward takes 1 s, backward 2 s, of which gradients of weights 1 s."""


def layout(schedule: str, *, pp: int = 8, virtual: int = 1, batches: int = 32, data: int = 4) -> Layout:
    code = SCHEDULES.index(schedule)
    return Layout(devices=pp * 2 * data, tp=2, pp=pp, virtual=virtual, sequences=data * batches, schedule=code)


@pytest.mark.parametrize(
    ("schedule", "virtual", "idle"), [("1f1b", 1, 21), ("interleaved", 2, 10.5), ("interleaved", 4, 5.25)]
)
def test_playing_a_step_gives_the_closed_form_exactly(schedule: str, virtual: int, idle: float) -> None:
    asked = layout(schedule, virtual=virtual)
    assert float(bubble_s(asked, 1.0, 2.0, 1.0)) == idle
    assert play(asked, UNIT).step_s == pytest.approx(32 * 3 + idle)


@pytest.mark.parametrize("schedule", ["zero_bubble", "zero_bubble_v", "dualpipe"])
def test_playing_a_zero_bubble_step_is_near_the_closed_form(schedule: str) -> None:
    asked = layout(schedule)
    closed = 32 * 3 + float(bubble_s(asked, 1.0, 2.0, 1.0))
    assert play(asked, UNIT).step_s == pytest.approx(closed, rel=0.04)


@pytest.mark.parametrize("schedule", ["zero_bubble", "zero_bubble_v"])
@pytest.mark.parametrize("ranks", [4, 8])
def test_fewer_micro_batches_than_ranks_leave_bubbles_unfilled(schedule: str, ranks: int) -> None:
    asked = layout(schedule, pp=ranks, batches=ranks // 2, data=1)
    closed = ranks // 2 * 3 + float(bubble_s(asked, 1.0, 2.0, 1.0))
    assert play(asked, UNIT).step_s == pytest.approx(closed)


def test_every_task_is_played_once_and_never_before_what_it_needs() -> None:
    played = play(layout("zero_bubble_v", pp=4, batches=8, data=1), UNIT)
    assert len(set(played.tasks)) == len(played.tasks) == 3 * 8 * 8
    end = {task: played.end_ND[place, 0] for place, task in enumerate(played.tasks)}
    for place, (kind, batch, where) in enumerate(played.tasks):
        if kind == 0 and where:
            assert played.start_ND[place, 0] >= end[0, batch, where - 1] - 1e-9


def test_a_rank_does_one_thing_at_a_time() -> None:
    played = play(layout("interleaved", pp=4, virtual=2, batches=8, data=1), UNIT)
    for rank in range(4):
        here = played.rank_N == rank
        order = np.argsort(played.start_ND[here, 0])
        assert (played.start_ND[here, 0][order][1:] >= played.end_ND[here, 0][order][:-1] - 1e-9).all()


def test_slow_devices_slow_the_step() -> None:
    asked = layout("1f1b", data=64)
    assert play(asked, UNIT, jitter=0.05).step_s > 1.03 * play(asked, UNIT).step_s


def test_the_trace_is_what_perfetto_reads(tmp_path: Path) -> None:
    played = play(layout("1f1b", pp=2, batches=4, data=2), UNIT)
    count = write_trace(tmp_path / "trace.json", played)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X" and event["name"][0] in "FB"]
    assert len(events) == count
    assert len(spans) == 2 * 2 * 4 * 2
    assert max(event["ts"] + event["dur"] for event in spans) == pytest.approx(played.step_s * 1e6)


def test_an_endless_pipeline_is_refused() -> None:
    with pytest.raises(PlanError, match="too long to play"):
        play(layout("1f1b", pp=64, batches=100_000), UNIT)


def test_activations_in_flight() -> None:
    assert float(in_flight(layout("1f1b"), 0)) == 8
    assert float(in_flight(layout("1f1b"), 7)) == 1
    assert float(in_flight(layout("interleaved", virtual=4), 0)) == pytest.approx((2 * 7 + 3 * 8 + 1) / 4)
    assert float(in_flight(layout("dualpipe"), 3)) == 9


def test_an_even_cut_carries_the_head_on_top_and_a_cut_by_cost_does_not() -> None:
    asked = layout("1f1b", pp=4)
    assert float(slowest_stage(asked, 16, 1.0, 2.0)) == 4 + 2
    by_cost = Layout(devices=64, pp=4, by_cost=1.0, sequences=64)
    assert float(slowest_stage(by_cost, 16, 1.0, 2.0)) == 5


def test_the_cut_minimises_the_costliest_stage() -> None:
    assert (
        cut([1.0] * 16, 4, 2.0) == [5, 4, 4, 3]
        or max(*cut([1.0] * 16, 4, 2.0)[:-1], 2 + cut([1.0] * 16, 4, 2.0)[-1]) == 5
    )
    assert sum(cut([3.0, 1, 1, 1, 1, 1, 1, 3], 4)) == 8
    assert len(cut([1.0] * 3, 8)) == 8
