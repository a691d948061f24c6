"""Loads over time as a picture: rows are experts, columns are stretches of steps, for a terminal or as charts.

Dimension key:  N records   L layers   E experts   B stretches of steps
"""

import numpy as np
from numpy.typing import NDArray

from moestro.core.axes import Axis
from moestro.core.charts import Chart, Shades, heat_map, shades_key
from moestro.core.errors import DataError
from moestro.place.loads import Trace
from moestro.place.predict import Predictor

SHADES = " ·░▒▓█"
"""From no tokens to four times the mean."""
COLUMNS = 64
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
