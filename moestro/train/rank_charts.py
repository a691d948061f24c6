"""Where each rank's time goes, for a run's report and for the terminal: own work, messages, waiting for others.

    Run -> rank_charts -> core.charts.Chart        Run -> balance_text, table        nothing for a run on one rank

The numbers are `dist.timeline`'s, logged as events of the kind "timeline". Of many ranks some are drawn, evenly picked.

Dimension key:  N steps   B stretches of steps   W ranks   P parts of a step
"""

import numpy as np
from numpy.typing import NDArray

from moestro.core.axes import Axis
from moestro.core.bars import Stack, stacked_bars
from moestro.core.charts import Chart, Key, Series, Shades, heat_map, stacked_area
from moestro.train.history import Numbers, bin_means
from moestro.train.report_charts import MOST_COLUMNS, MOST_ROWS, Run, picked

PARTS = ("compute", "exchange", "reduction", "idle")
"""As in `dist.timeline`."""
NAMES = {
    "compute": "own work",
    "exchange": "exchange of tokens",
    "reduction": "sums of gradients",
    "idle": "waiting for others",
}
COLOURS = {"compute": "c0", "exchange": "c1", "reduction": "c2", "idle": "axis"}
MOST_BARS = 16
"""Ranks with a bar of their own."""


def times_of(run: Run) -> tuple[Numbers, NDArray[np.float64]]:
    """step_N and second_NWP; of a run that went on with other ranks, the steps with as many as it has now."""
    events = run.history.of_kind("timeline")
    ranks = len(events[-1]["compute_s"]) if events else 0
    kept = [event for event in events if len(event["compute_s"]) == ranks]
    second_NPW = np.array([[event[f"{part}_s"] for part in PARTS] for event in kept], dtype=float)
    step_N = np.array([event["step"] for event in kept], dtype=float)
    return step_N, second_NPW.reshape(len(kept), len(PARTS), ranks).transpose(0, 2, 1)


def usual(second_NWP: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over steps, without the first where there are several: it compiles and allocates."""
    return np.asarray(second_NWP[1 if len(second_NWP) > 2 else 0 :].mean(0))


def rank_charts(run: Run) -> list[Chart]:
    """A bar per rank, parts over time, and when which rank waited; empty where there is one rank."""
    step_N, second_NWP = times_of(run)
    if not second_NWP.size:
        return []
    charts = [_bars(usual(second_NWP))]
    return (
        [*charts, _over_time(run, step_N, second_NWP), _waiting(run, step_N, second_NWP)] if len(step_N) > 1 else charts
    )


def _bars(second_WP: NDArray[np.float64]) -> Chart:
    drawn = picked(len(second_WP), MOST_BARS)
    share_P = second_WP.sum(0) / second_WP.sum()
    parts = [Key(NAMES[part], COLOURS[part], value=f"{share:.1%}") for part, share in zip(PARTS, share_P, strict=True)]
    rows = [
        Stack(
            name=f"rank {rank}",
            values=(1e3 * second_WP[rank]).tolist(),
            value=f"{second_WP[rank, 0] / second_WP[rank].sum():.0%} own work",
        )
        for rank in drawn
    ]
    some = f" {len(drawn)} of {len(second_WP)} ranks." if len(drawn) < len(second_WP) else ""
    note = f"Mean of all steps but the first.{some}"
    x = Axis(label="time of a step", unit="ms", low=0)
    return stacked_bars("Where each rank's time goes", rows, parts, x=x, note=note)


def _over_time(run: Run, step_N: Numbers, second_NWP: NDArray[np.float64]) -> Chart:
    end_B, mean_BP = bin_means(step_N, second_NWP.mean(1), run.last_step, MOST_COLUMNS)
    kept_B = ~np.isnan(mean_BP[:, 0])
    share_BP = 100 * mean_BP[kept_B] / mean_BP[kept_B].sum(1, keepdims=True)
    series = [
        Series(name=NAMES[part], x=end_B[kept_B], y=share_BP[:, place], colour=COLOURS[part])
        for place, part in enumerate(PARTS)
    ]
    y = Axis(label="share of step time", unit="%", low=0, high=100)
    return stacked_area("Own work, messages and waiting", series, x=run.x, y=y, note="Mean of all ranks.")


def _waiting(run: Run, step_N: Numbers, second_NWP: NDArray[np.float64]) -> Chart:
    drawn = picked(second_NWP.shape[1], MOST_ROWS)
    _, mean_BWP = bin_means(step_N, second_NWP[:, drawn], run.last_step, MOST_COLUMNS // 2)
    share_WB = 100 * (mean_BWP[:, :, PARTS.index("idle")] / mean_BWP.sum(2)).T
    high = float(np.clip(np.ceil(np.nanmax(share_WB) / 10) * 10, 10, 100))
    return heat_map(
        "Which rank waits",
        share_WB,
        x=run.x,
        rows=[str(rank) for rank in drawn],
        shades=Shades(kind="amount", high=high, label="% of its step time"),
        row_height=min(max(190 / len(drawn), 4), 48),
        row_label="rank",
        note=f"The darkest: {high:.0f} % of its step time. Pale rows are the ones others wait for.",
    )


def balance_text(run: Run) -> str:
    """In words: how much of the ranks' time is waiting, and for whom; empty where there is one rank."""
    _, second_NWP = times_of(run)
    if not second_NWP.size:
        return ""
    second_WP = usual(second_NWP)
    idle_W = second_WP[:, PARTS.index("idle")]
    share = idle_W.sum() / second_WP.sum()
    busiest = int(second_WP[:, 0].argmax())
    over = second_WP[busiest, 0] / second_WP[:, 0].mean() - 1
    return (
        f"Ranks wait for each other {share:.1%} of the time. Rank {busiest} has most work of its own, "
        f"{over:.0%} more than the mean."
    )


def table(run: Run) -> list[str]:
    """Lines for a terminal: every drawn rank's milliseconds of a step; empty where there is one rank."""
    _, second_NWP = times_of(run)
    if not second_NWP.size:
        return []
    second_WP = usual(second_NWP)
    lines = ["".join(f"{text:>22}" for text in ("ms of a step", *NAMES.values()))]
    for rank in picked(len(second_WP), MOST_BARS):
        cells = [f"{1e3 * s:.1f} ({s / second_WP[rank].sum():4.0%})" for s in second_WP[rank]]
        lines.append("".join(f"{text:>22}" for text in (f"rank {rank}", *cells)))
    return lines
