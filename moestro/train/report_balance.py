"""The report's section on balance between ranks: what dispatch sent, how even ranks were, what moved, what that saved.

    History -> balance_charts, balance_words      both empty where all experts were on one rank

Dimension key:  N steps   L sparse layers
"""

from itertools import pairwise
from statistics import median

import numpy as np

from moestro.core.axes import Axis
from moestro.core.charts import Chart, Series, line_chart, timeline
from moestro.core.events import Event
from moestro.core.units import bytes_text, duration_text
from moestro.train.history import History, smoothed
from moestro.train.report_charts import Run, raw_and_smooth

MB = 1e6


def decisions(history: History) -> list[Event]:
    """What the rebalancer decided."""
    return [event for event in history.of_kind("balance") if "reason" in event]


def balance_charts(run: Run) -> list[Chart]:
    """Imbalance of ranks, bytes between nodes and inside them, when experts moved, predicted times."""
    history = run.history
    step_N, over_NL = history.steps(), history.column("rank_imbalance")
    if not over_NL.size:
        return []
    charts = [
        line_chart(
            "Busiest rank over the mean",
            [
                *raw_and_smooth("mean of layers", step_N, over_NL.mean(1), "c0"),
                Series(name="worst layer", x=step_N, y=smoothed(over_NL.max(1), 9), colour="c1"),
            ],
            x=run.x,
            y=Axis(low=1),
            note="Rows of experts; 1 is even.",
        )
    ]
    sent = {name: history.column(f"{name}_bytes") / MB for name in ("between", "inside")}
    series = [
        Series(name=f"{name} nodes", x=step_N, y=sent_N, colour=colour)
        for (name, sent_N), colour in zip(sent.items(), ("c1", "c2"), strict=True)
        if sent_N.size and sent_N.any()
    ]
    if series:
        note = "Rows of tokens on their way to experts and back, forward; the backward pass sends as many again."
        charts.append(line_chart("Sent by dispatch", series, x=run.x, y=Axis(unit="MB a step", low=0), note=note))
    return charts + _predicted(run)


def _predicted(run: Run) -> list[Chart]:
    found = decisions(run.history)
    if not found:
        return []
    at = [event["step"] for event in found]
    series = [
        Series(name="first placement", x=at, y=[event["first_ms"] for event in found], colour="c1"),
        Series(name="placement in force", x=at, y=[sum(event["now_ms"]) for event in found], colour="c0"),
    ]
    y = Axis(label="exchange and experts of all layers", unit="ms", low=0)
    charts = [line_chart("Predicted time of a step", series, x=run.x, y=y)]
    if known := foretold(run.history):
        at_N, expected_N, measured_N = zip(*known, strict=True)
        series = [
            Series(name="predicted", x=at_N, y=expected_N, colour="c1"),
            Series(name="measured", x=at_N, y=measured_N, colour="c0"),
        ]
        note = "Predicted when a placement came into force, and the median of the steps under it."
        charts.append(line_chart("Whole step", series, x=run.x, y=Axis(unit="ms", low=0), note=note))
    moved = [event["step"] for event in found if event["moved"]]
    rows = {"experts copied": ("c0", moved), "shares only": ("c5", [step for step in at if step not in set(moved)])}
    return [*charts, timeline("Decisions", {name: row for name, row in rows.items() if row[1]}, x=run.x)]


def foretold(history: History) -> list[tuple[int, float, float]]:
    """Step of a decision, milliseconds that it predicted for a whole step, and the measured ones until the next."""
    return [
        (decision["step"], decision["expected_ms"], later["measured_ms"])
        for decision, later in pairwise(decisions(history))
        if "expected_ms" in decision and "measured_ms" in later
    ]


def balance_words(run: Run) -> list[str]:
    """Sentences: what moved, what it cost and is reckoned to have saved, and what went wrong."""
    history = run.history
    problems = [event["problem"] for event in history.of_kind("balance") if "problem" in event]
    found = decisions(history)
    if not found:
        return problems
    moving = [event for event in found if event["moved"]]
    copied, moved_bytes = sum(event["moved"] for event in found), sum(event["moved_bytes"] for event in found)
    spent_s = sum(event["seconds"] for event in found)
    known = [measured / expected for _, expected, measured in foretold(history)]
    whole = f"Whole steps took {median(known):.2f} times what was predicted, in the median." if known else ""
    return [
        f"{len(found)} decisions, {len(moving)} of them moved experts: {copied} copied, {bytes_text(moved_bytes)} with "
        f"their optimiser state. Deciding and starting moves took {duration_text(spent_s)}.",
        f"By the cost model the placements saved {duration_text(max(saved_s(run), 0.0))} over the first one so far.",
        *([whole] if whole else []),
        *problems,
    ]


def saved_s(run: Run) -> float:
    """Predicted: from each decision to the next, what a step took less than under the first placement."""
    found = decisions(run.history)
    at = np.array([event["step"] for event in found] + [run.last_step], dtype=float)
    gain_s = np.array([event["first_ms"] - sum(_in_force_ms(event)) for event in found]) / 1e3
    return float((np.diff(at) * gain_s).sum())


def _in_force_ms(event: Event) -> list[float]:
    """Of every layer after a decision."""
    layers = zip(event["now_ms"], event["planned_ms"], event["moves"], strict=True)
    return [planned if moves else now for now, planned, moves in layers]
