"""The charts of a run's report, each a pure function of the run's history, recipe and load trace.

    Run -> learning_charts, load_maps, routing_charts, speed_charts, timeline_of -> core.charts.Chart

A chart whose numbers the run does not have (experts of a dense model) is left out. Of very deep or very wide models a
part is drawn, and the chart says which.

Dimension key:  N steps   B stretches of steps   L sparse layers   E experts   R rows
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moestro.core.axes import Axis, number_text
from moestro.core.bars import Bar, bars
from moestro.core.charts import (
    Chart,
    Reference,
    Series,
    Shades,
    Style,
    depth_colours,
    heat_map,
    line_chart,
    shades_key,
    stacked_area,
    timeline,
)
from moestro.core.specs import RouterSpec
from moestro.nn.routing_budget import budget_at
from moestro.train.history import History, Numbers, bin_means, smoothed
from moestro.train.recipe import Recipe

MOST_LAYERS = 12
"""Layers drawn; of a deeper model this many are picked, evenly spaced."""
MOST_ROWS = 64
"""Rows of a heat map; more experts are averaged in groups of neighbours."""
MOST_COLUMNS = 200
MOST_CELLS = 40_000
"""Of all heat maps together; more would make the file heavy."""
LOAD = Shades(kind="ratio", high=4.0, label="load over the layer's mean")
SMOOTH_SHARE = 1 / 20
"""Window of a moving mean over a curve that is also shown unsmoothed, as a share of the steps."""
LAYER_SMOOTH_SHARE = 1 / 40
"""The same for curves per layer, which overlap too much to be shown unsmoothed."""
FIXED = ("top1", "top2", "topk")
"""Rules that give every token the same number of experts: a flat line says nothing."""


@dataclass(frozen=True, slots=True)
class Run:
    """What there is to draw."""

    recipe: Recipe
    history: History
    load_step_N: NDArray[np.int64]
    load_NLE: NDArray[np.int64]
    """Tokens per expert; empty for a dense model."""

    @property
    def last_step(self) -> int:
        """The newest step of log and trace."""
        return max(self.history.last_step, int(self.load_step_N.max(initial=0)))

    @property
    def x(self) -> Axis:
        """All charts over time have this axis, so that places can be compared."""
        return Axis(label="step", low=0, high=max(self.last_step, 1), whole=True)

    @property
    def layers(self) -> list[int]:
        """The sparse layers' numbers in the model."""
        return self.recipe.model.moe_layers

    @property
    def drawn(self) -> list[int]:
        """Which of the sparse layers are drawn, as indices into `layers`."""
        return picked(len(self.layers), MOST_LAYERS)

    @property
    def router(self) -> RouterSpec | None:
        """The recipe's router; None for a dense model."""
        return self.recipe.model.moe.router if self.recipe.model.moe else None

    @property
    def has_budget(self) -> bool:
        """True where a threshold is steered to a mean number of experts."""
        router = self.router
        return router is not None and (router.rule == "gap" or (router.rule == "topp" and not router.threshold))


def picked(number: int, most: int) -> list[int]:
    """At most `most` of 0..number-1, evenly spaced, the first and the last among them."""
    return sorted({round(index) for index in np.linspace(0, number - 1, min(number, most))})


def learning_charts(run: Run) -> list[Chart]:
    """Loss, learning rate, gradient norm."""
    history = run.history
    step_N = history.steps()
    charts = [chart for chart in (_loss_chart(run),) if chart]
    if len(step_N):
        lr = Series(name="learning rate", x=step_N, y=history.column("lr"))
        charts.append(line_chart("Learning rate", [lr], x=run.x, y=Axis(low=0), height=110))
        norm_N, clip = history.column("grad_norm"), run.recipe.optimizer.clip
        norm = Series(name="gradient norm", x=step_N, y=norm_N, colour="c5")
        clipped = [Reference(f"clipped to {clip:g}", clip)] if clip and np.nanmax(norm_N, initial=0) > clip else []
        y = Axis(log=_spans(norm_N, 5))
        charts.append(line_chart("Gradient norm", [norm], x=run.x, y=y, references=clipped, height=110))
    return charts


def _loss_chart(run: Run) -> Chart | None:
    history = run.history
    series = raw_and_smooth("training", history.steps(), history.column("bits_per_byte"), "c0")
    measured: tuple[tuple[bool, str, str, Style], ...] = (
        (False, "held-out sample", "c1", "dots"),
        (True, "held-out, all of it", "ink", "dot"),
    )
    for whole, name, colour, style in measured:
        found = [event for event in history.of_kind("evaluation") if event["whole"] == whole]
        step_N, bits_N = [event["step"] for event in found], [event["bits_per_byte"] for event in found]
        series += [Series(name=name, x=step_N, y=bits_N, colour=colour, style=style)] if found else []
    if not series:
        return None
    packed = (history.finished or {}).get("compressors", {})
    references = [Reference(f"{name}: {number_text(bits)}", bits) for name, bits in packed.items()]
    values = np.concatenate([np.ravel(one.y) for one in series])
    y = Axis(label="bits per byte", log=_spans(values, 3))
    note = "Lower is better." + (" Compressors on the same held-out files, file by file." if references else "")
    return line_chart("Loss", series, x=run.x, y=y, references=references, height=300, note=note)


def raw_and_smooth(name: str, step_N: Numbers, value_N: Numbers, colour: str) -> list[Series]:
    """Every step, faint, and a moving mean on top where there are enough steps for one."""
    if not len(value_N):
        return []
    window = _window(len(value_N), SMOOTH_SHARE)
    if window == 1:
        return [Series(name=name, x=step_N, y=value_N, colour=colour)]
    mean = f"mean of {window} steps"
    return [
        Series(name=f"{name}, every step", x=step_N, y=value_N, colour=colour, style="faint"),
        Series(name=f"{name}, {mean}", x=step_N, y=smoothed(value_N, window), colour=colour, style="bold"),
    ]


def _window(steps: int, share: float) -> int:
    """An odd number of steps to average over; 1 where there are too few to do so."""
    return max(3, int(steps * share)) | 1 if steps >= 40 else 1


def _spans(value_N: Numbers, factor: float) -> bool:
    """True where a log axis helps: all above zero, and the largest at least `factor` times the smallest."""
    known_N = value_N[np.isfinite(value_N)]
    return bool(len(known_N) and known_N.min() > 0 and known_N.max() > factor * known_N.min())


def load_maps(run: Run) -> list[Chart]:
    """The colour key, then a heat map of experts over time per layer."""
    if not run.load_NLE.size:
        return []
    drawn, experts = run.drawn, run.load_NLE.shape[2]
    group = math.ceil(experts / MOST_ROWS)
    rows = math.ceil(experts / group)
    columns = max(min(MOST_COLUMNS, MOST_CELLS // (rows * len(drawn))), 8)
    _, mean_BLE = bin_means(run.load_step_N.astype(float), run.load_NLE, run.last_step, columns)
    names = [str(first) if group == 1 else f"{first}\u2013{first + group - 1}" for first in range(0, experts, group)]
    charts = [shades_key(LOAD)]
    for index in drawn:
        share_EB = _over_mean(mean_BLE[:, index]).T
        charts.append(
            heat_map(
                f"Layer {run.layers[index]}",
                _grouped(share_EB, group),
                x=run.x,
                rows=names,
                shades=LOAD,
                row_height=min(max(150 / rows, 4), 16),
                row_label="expert" if group == 1 else "experts",
                note=_load_note(share_EB[:, -1]),
            )
        )
    return charts


def _over_mean(mean_BE: Numbers) -> Numbers:
    """Loads over the mean of their layer; NaN where nothing was routed."""
    total_B1 = mean_BE.mean(1, keepdims=True)
    return mean_BE / np.where(total_B1 > 0, total_B1, np.nan)


def _grouped(share_EB: Numbers, group: int) -> Numbers:
    """Rows averaged in groups of neighbours."""
    starts = np.arange(0, len(share_EB), group)
    sizes = np.diff(np.append(starts, len(share_EB)))
    return np.asarray(np.add.reduceat(share_EB, starts) / sizes[:, None])


def _load_note(share_E: Numbers) -> str:
    if np.isnan(share_E).any():
        return ""
    unused = int((share_E == 0).sum())
    end = f"at the end {share_E.min():.2f} to {share_E.max():.2f}"
    return end + (f", {unused} of {len(share_E)} without tokens" if unused else "")


def load_limits(run: Run) -> str:
    """What of the load trace is not drawn, for readers; empty where all is."""
    if not run.load_NLE.size:
        return ""
    group = math.ceil(run.load_NLE.shape[2] / MOST_ROWS)
    parts = (
        [f"{len(run.drawn)} of {len(run.layers)} sparse layers are drawn"] if len(run.drawn) < len(run.layers) else []
    )
    parts += [f"a row is the mean of {group} neighbouring experts"] if group > 1 else []
    return f"{'; '.join(parts)}.".capitalize() if parts else ""


def routing_charts(run: Run) -> list[Chart]:
    """Experts per token, threshold, balance, entropy, over time and per layer; experts by kind of token."""
    router, moe = run.router, run.recipe.model.moe
    if router is None or moe is None or not run.layers:
        return []
    choices = moe.num_experts + (router.num_null if router.rule == "null" else 0)
    uniform = Reference(f"uniform over {choices}: {number_text(math.log(choices))}", math.log(choices))
    even = Reference("even", 1.0)
    steers = "of probability mass" if router.rule == "topp" else "of the gap between the two best experts"
    counts = [_layer_chart(run, "experts", "Experts per token", extra=_target(run)), _classes_chart(run)]
    candidates = [
        *(counts if router.rule not in FIXED else []),
        _layer_chart(run, "threshold", "Threshold", steers),
        _layer_chart(run, "busiest_over_mean", "Busiest expert", LOAD.label, [even]),
        _layer_chart(run, "entropy", "Router entropy", "nats", [uniform]),
        _layer_chart(run, "balance", "Balance loss", "unweighted", [even]),
    ]
    return [chart for chart in candidates if chart]


def _layer_chart(
    run: Run,
    field: str,
    title: str,
    label: str = "",
    references: list[Reference] | None = None,
    extra: list[Series] | None = None,
) -> Chart | None:
    """A curve per layer, and the mean of all layers on top."""
    value_NL = run.history.column(field)
    if value_NL.ndim != 2:
        return None
    step_N, drawn = run.history.steps(), run.drawn
    window = _window(len(step_N), LAYER_SMOOTH_SHARE) if field != "threshold" else 1
    series = [
        Series(name=f"layer {run.layers[index]}", x=step_N, y=smoothed(value_NL[:, index], window), colour=colour)
        for index, colour in zip(drawn, depth_colours(len(drawn)), strict=True)
    ]
    if len(run.layers) > len(drawn):
        mean_N = smoothed(value_NL.mean(1), window)
        series.append(Series(name="mean of all layers", x=step_N, y=mean_N, colour="ink", style="bold"))
    note = f"Mean of {window} steps." if window > 1 else ""
    axes = {"x": run.x, "y": Axis(label=label)}
    return line_chart(title, [*series, *(extra or [])], **axes, references=references or [], height=200, note=note)


def _target(run: Run) -> list[Series]:
    """The budget's schedule, where a threshold follows one."""
    router, steps = run.router, run.recipe.train.steps
    if router is None or not run.has_budget:
        return []
    step_N = np.unique(np.linspace(1, max(run.last_step, 1), 200).round())
    wanted = [
        budget_at(step / steps, router.start_experts, router.mean_experts, router.anneal_share) for step in step_N
    ]
    return [Series(name="budget", x=step_N, y=wanted, colour="ink", style="dashed")]


def _classes_chart(run: Run) -> Chart | None:
    evaluation = run.history.evaluation or {}
    experts, shares = evaluation.get("mean_experts_per_class"), evaluation.get("share_per_class", {})
    if not experts:
        return None
    rows = [Bar(name=name, value=value, note=_of_text(shares[name])) for name, value in experts.items()]
    note = f"Held-out text, step {evaluation['step']}, mean of all sparse layers."
    return bars("Experts per token by kind of token", rows, x=Axis(label="experts per token"), note=note)


def _of_text(share: float) -> str:
    return f"{share:.1%} of text" if share >= 0.001 else "< 0.1% of text"


def speed_charts(run: Run) -> list[Chart]:
    """Tokens per second, and where the time goes."""
    history = run.history
    step_N = history.steps()
    if not len(step_N):
        return []
    series = raw_and_smooth("tokens/s", step_N, history.column("tokens_per_s"), "c2")
    charts = [line_chart("Throughput", series, x=run.x, y=Axis(unit="tokens/s", low=0))]
    phases = history.phase_s
    if len(step_N) > 1 and phases:
        charts.append(_phase_chart(run, phases))
    return charts


def _phase_chart(run: Run, phases: dict[str, Numbers]) -> Chart:
    second_NP = np.stack(list(phases.values()), axis=1)
    end_B, mean_BP = bin_means(run.history.steps(), second_NP, run.last_step, MOST_COLUMNS)
    kept_B = ~np.isnan(mean_BP[:, 0])
    share_BP = 100 * mean_BP[kept_B] / mean_BP[kept_B].sum(1, keepdims=True)
    total_P = second_NP.sum(0)
    name_of = {"data": "waiting for data", "update": "clip and update"}
    series = [
        Series(
            name=name_of.get(phase, phase),
            x=end_B[kept_B],
            y=share_BP[:, place],
            colour=f"c{(1, 0, 5, 2)[place]}",
            value=f"{total_P[place] / total_P.sum():.1%}",
        )
        for place, phase in enumerate(phases)
    ]
    y = Axis(label="share of step time", unit="%", low=0, high=100)
    return stacked_area("Where step time goes", series, x=run.x, y=y)


def timeline_of(run: Run) -> Chart | None:
    """When checkpoints were written, sessions resumed and steps skipped; None where nothing of it happened."""
    kinds = {"checkpoint": ("checkpoint", "c2"), "resumed": ("resume", "c0"), "not applied": ("skipped", "c1")}
    rows = {name: (colour, run.history.steps(kind).tolist()) for name, (kind, colour) in kinds.items()}
    happened = {name: row for name, row in rows.items() if row[1]}
    return timeline("Checkpoints, resumes and skipped steps", happened, x=run.x) if happened else None
