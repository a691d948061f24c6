"""Loads over time as a picture: rows are experts, columns are stretches of steps, for a terminal or as charts.

Beside it in words and numbers: who sends to whom (source x expert), and which experts are chosen together.

Dimension key:  N records   L layers   E experts   S sources   X pairs of experts   B stretches of steps
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moestro.core.axes import Axis
from moestro.core.charts import Chart, Shades, heat_map, shades_key
from moestro.core.errors import DataError
from moestro.place.loads import Trace, pair_index
from moestro.place.predict import Predictor

SHADES = " ·░▒▓█"
"""From no tokens to four times the mean."""
COLUMNS = 64
LATELY = 20
"""Last steps that sources are compared over."""
SHOWN_PAIRS = 8
HIGH = 4.0


def over_mean_EB(trace: Trace, layer: int, columns: int = COLUMNS) -> NDArray[np.float64]:
    """Load over the layer's mean expert; raises DataError for a trace without steps or such a layer."""
    steps, layers, _ = trace.count_NLE.shape
    if not steps:
        raise DataError("the trace has no steps yet")
    if not 0 <= layer < layers:
        raise DataError(f"layer {layer} is not in the trace; it has 0..{layers - 1}")
    edges = np.unique(np.linspace(0, steps, min(columns, steps) + 1).astype(int))
    sum_BE = np.add.reduceat(trace.count_NLE[:, layer].astype(float), edges[:-1], axis=0)
    return np.asarray(sum_BE / np.maximum(sum_BE.mean(axis=1, keepdims=True), 1e-12)).T


def heat_lines(trace: Trace, layer: int) -> list[str]:
    """The map as text: one line per expert with its share now."""
    over_EB = over_mean_EB(trace, layer)
    level_EB = np.clip(np.ceil(over_EB / HIGH * (len(SHADES) - 1)), 0, len(SHADES) - 1).astype(int)
    first, last = int(trace.step_N[0]), int(trace.step_N[-1])
    lines = [f"layer {layer}, steps {first} to {last}; █ is {HIGH:g} times the mean expert or more"]
    lines += [
        f"{expert:4d} {''.join(SHADES[level] for level in row)} {over:5.2f}"
        for expert, (row, over) in enumerate(zip(level_EB, over_EB[:, -1], strict=True))
    ]
    return lines


def summary_lines(trace: Trace) -> list[str]:
    """A line per layer: imbalance at the end, drift, and the prediction's error."""
    layers, experts = trace.count_NLE.shape[1:]
    predictor = Predictor(layers, experts)
    for count_LE in trace.count_NLE:
        predictor.update(count_LE)
    load_LE, error_L = predictor.predict()
    lines = [f"{'layer':>5s} {'max/mean':>9s} {'idle':>5s} {'drift a step':>13s} {'prediction +-':>14s}"]
    for layer, load_E in enumerate(load_LE):
        over = load_E.max() / max(load_E.mean(), 1e-12)
        idle = int((trace.count_NLE[-1, layer] == 0).sum())
        drift, error = 50 * predictor.drift_L[layer], 50 * error_L[layer]
        lines.append(f"{layer:5d} {over:9.2f} {idle:5d} {drift:11.2f} % {error:12.1f} %")
    return lines


@dataclass(frozen=True, slots=True)
class Pair:
    """Two experts."""

    first: int
    second: int
    times: int
    """Tokens that chose both, in all steps whose pairs were counted."""
    over_chance: float
    """Times as often as if experts were chosen independently of each other, as popular as they are."""


def top_pairs(trace: Trace, layer: int, number: int = SHOWN_PAIRS) -> list[Pair]:
    """The pairs most often chosen together; empty where none were counted."""
    pair_X = trace.pair_PLX[:, layer].sum(axis=0)
    if not pair_X.sum():
        return []
    first_X, second_X = pair_index(trace.count_NLE.shape[2])
    count_E = trace.count_NLE[np.isin(trace.step_N, trace.pair_step_P), layer].sum(axis=0).astype(float)
    chance_X = count_E[first_X] * count_E[second_X]
    over_X = pair_X / np.maximum(chance_X * (pair_X.sum() / max(chance_X.sum(), 1e-12)), 1e-12)
    best_X = np.argsort(-pair_X, kind="stable")[:number]
    return [Pair(int(first_X[x]), int(second_X[x]), int(pair_X[x]), float(over_X[x])) for x in best_X if pair_X[x]]


@dataclass(frozen=True, slots=True)
class Source:
    """What one source sent lately."""

    over_mean: float
    """Its rows over those of the mean source."""
    busiest: int
    """Its most popular expert."""
    busiest_over_mean: float
    """That expert's rows over the mean expert's."""
    apart: float
    """Share of its rows that would have to go elsewhere for it to choose as all sources together do."""


def sources_of(trace: Trace, layer: int) -> list[Source]:
    """Every source of the last steps; empty where there is but one."""
    row_SE = trace.source_MLSE[-LATELY:, layer].sum(axis=0).astype(float)
    if len(row_SE) < 2:
        return []
    total_S, mean_E = np.maximum(row_SE.sum(axis=1), 1e-12), row_SE.sum(axis=0) / max(row_SE.sum(), 1e-12)
    share_SE = row_SE / total_S[:, None]
    apart_S = np.abs(share_SE - mean_E).sum(axis=1) / 2
    return [
        Source(
            over_mean=float(total / total_S.mean()),
            busiest=int(share_E.argmax()),
            busiest_over_mean=float(share_E.max() * len(share_E)),
            apart=float(apart),
        )
        for total, share_E, apart in zip(total_S, share_SE, apart_S, strict=True)
    ]


def together_lines(trace: Trace, layer: int) -> list[str]:
    """Sources and pairs of a layer in words, where the trace has them."""
    lines = []
    if sources := sources_of(trace, layer):
        lines.append(f"{'source':>6s} {'rows/mean':>10s} {'busiest expert':>15s} {'chooses otherwise':>18s}")
        lines += [
            f"{number:6d} {one.over_mean:10.2f} {one.busiest:6d} ({one.busiest_over_mean:5.2f}) "
            f"{100 * one.apart:16.1f} %"
            for number, one in enumerate(sources)
        ]
    if pairs := top_pairs(trace, layer):
        lines += ["", f"chosen together most often, over {len(trace.pair_step_P)} steps:"]
        lines += [
            f"{pair.first:6d} and {pair.second:3d}  {pair.times:9,d} tokens, {pair.over_chance:.2f} times as by chance"
            for pair in pairs
        ]
    return lines


def heat_charts(trace: Trace, layer: int | None = None) -> list[Chart]:
    """What the colours mean, and a heat map of every layer, or of one."""
    shades = Shades(kind="ratio", high=HIGH, label="load over the mean expert")
    steps = Axis(
        label="step", low=float(trace.step_N[0]), high=float(max(trace.step_N[-1], trace.step_N[0] + 1)), whole=True
    )
    experts = [str(expert) for expert in range(trace.count_NLE.shape[2])]
    drawn = [
        heat_map(
            f"Layer {layer}", over_mean_EB(trace, layer, 200), x=steps, rows=experts, shades=shades, row_label="expert"
        )
        for layer in (range(trace.count_NLE.shape[1]) if layer is None else [layer])
    ]
    return [shades_key(shades), *drawn]
