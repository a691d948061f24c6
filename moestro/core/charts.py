"""Charts as SVG text: data in, string out; for report pages, for plots in docs, without a plotting library or torch.

    line_chart | stacked_area | heat_map | timeline (bars: core/bars.py) -> Chart -> figure(chart)            for a page
                                                                               -> standalone_svg(*charts)  a file

A chart has no fixed width: across, places are percent of the plot (lines: 0..1000), down they are pixels. So one chart
fits a phone and a wide screen with text and lines of constant size. Colours are CSS variables of charts.css, which
knows light and dark; charts.js adds read-outs under the pointer to charts on a page, and nothing depends on it.

Dimension key:  N points   R rows   C columns
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moestro.core.axes import Axis, number_text
from moestro.core.svg import escaped, own, px, text_at, x_labels

CATEGORIES = ("c0", "c1", "c2", "c3", "c4", "c5")
"""Colours for things without order."""
DEPTHS = 12
"""Colours d0..d11 for things with an order, such as layers."""
POINTS = 600
"""Most points of one line; more are thinned, extremes kept."""
CHART_POINTS = 4800
"""Most points of all lines of a chart together."""
LETTER_PX = 6.8
"""Width of a letter of chart text, on average."""
MARGIN = 16
"""Pixels between the paper's edge and what stands on it, in standalone files."""
STEPS_ACROSS = 1000
"""Lines are drawn on a plot this wide and stretched."""

Style = Literal["line", "bold", "faint", "dashed", "dots", "dot"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line; NaN breaks it. `dots` marks its points, `dot` shows points only."""

    name: str
    x: ArrayLike
    y: ArrayLike
    colour: str = "c0"
    style: Style = "line"
    low: ArrayLike | None = None
    high: ArrayLike | None = None
    """An interval around y, drawn as a band."""
    value: str = ""
    """A figure beside the name in the legend."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A horizontal line to compare with, and what stands on it."""

    label: str
    value: float


@dataclass(frozen=True, slots=True)
class Key:
    """A legend entry."""

    name: str
    colour: str
    style: str = "line"
    value: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A drawn chart: SVG elements with x in percent of the plot and y in pixels below its top."""

    title: str
    body: str
    height: float
    note: str = ""
    """What to know when reading it, one short sentence."""
    keys: tuple[Key, ...] = ()
    readout: Mapping[str, Any] = field(default_factory=dict)
    """What charts.js needs to turn places back into values."""
    left: float = 52
    right: float = 18
    top: float = 22
    bottom: float = 36


def depth_colours(number: int) -> list[str]:
    """Colours for `number` things in order, spread over the whole ramp."""
    return [f"d{round(i * (DEPTHS - 1) / max(number - 1, 1))}" for i in range(number)]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x: Axis,
    y: Axis,
    references: Sequence[Reference] = (),
    height: float = 190,
    note: str = "",
) -> Chart:
    """Lines over a common x, with bands, dots and reference lines."""
    drawn = [one for one in series if np.size(one.x)]
    x = x.fitted(np.concatenate([[], *[np.ravel(one.x) for one in drawn]]))
    around = [np.ravel(edge) for one in drawn for edge in (one.y, one.low, one.high) if edge is not None]
    y = y.fitted(np.concatenate([*around, [reference.value for reference in references]]), room=0.06)
    most = max(min(POINTS, CHART_POINTS // max(len(drawn), 1)), 8)
    marks = [_marks(one, x, y, height, most) for one in drawn]
    body = [*_grid(x, y, height), *_reference_lines(references, y, height), _plane("".join(marks), height)]
    body += _reference_names(references, y, height)
    keys = tuple(Key(one.name, one.colour, one.style, one.value) for one in drawn)
    return Chart(title=title, body="".join(body), height=height, note=note, keys=keys, readout=_readout("lines", x, y))


def stacked_area(
    title: str, series: Sequence[Series], *, x: Axis, y: Axis, height: float = 190, note: str = ""
) -> Chart:
    """Series on top of each other, the first at the bottom; all have the x of the first."""
    x_N = np.asarray(series[0].x, dtype=float)
    edge_SN = np.cumsum([np.zeros(len(x_N)), *[np.asarray(one.y, dtype=float) for one in series]], axis=0)
    x, y = x.fitted(x_N), y.fitted(edge_SN)
    right_N = x.share(x_N) * STEPS_ACROSS
    marks = []
    for one, below_N, above_N in zip(series, edge_SN, edge_SN[1:], strict=False):
        there = _points(right_N, (1 - y.share(above_N)) * height)
        back = _points(right_N[::-1], (1 - y.share(below_N[::-1])) * height)
        marks.append(f'<path class="area" {own(one.colour)} data-name="{escaped(one.name)}" d="M{there} {back}z"/>')
    body = [_plane("".join(marks), height), f'<g class="over">{"".join(_grid(x, y, height))}</g>']
    keys = tuple(Key(one.name, one.colour, "area", one.value) for one in reversed(series))
    return Chart(title=title, body="".join(body), height=height, note=note, keys=keys, readout=_readout("area", x, y))


@dataclass(frozen=True, kw_only=True, slots=True)
class Shades:
    """What the colours of heat maps mean.

    ratio   1 is neutral; from 1 / high to high in equal factors; exactly zero has a colour of its own
    amount  0 is neutral; up to high in equal steps
    """

    kind: Literal["ratio", "amount"] = "ratio"
    high: float = 4.0
    label: str = ""

    def level(self, value_RC: ArrayLike) -> NDArray[np.int64]:
        """Which colour, q0..q16; -1 is exactly zero (ratio only), -2 no data."""
        value = np.asarray(value_RC, dtype=float)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.log(value) / np.log(self.high) if self.kind == "ratio" else value / self.high
            level = np.rint(8 + 8 * np.clip(share, -1 if self.kind == "ratio" else 0, 1))
        level = np.where((value == 0) & (self.kind == "ratio"), -1, level)
        return np.where(np.isnan(value), -2, level).astype(np.int64)


def heat_map(
    title: str,
    value_RC: ArrayLike,
    *,
    x: Axis,
    rows: Sequence[str],
    shades: Shades,
    row_height: float = 14,
    note: str = "",
    row_label: str = "",
) -> Chart:
    """One coloured cell per value, the first row on top; columns divide x evenly; NaN leaves the paper."""
    value_RC = np.asarray(value_RC, dtype=float)
    height = row_height * len(value_RC)
    level_RC = shades.level(value_RC)
    cells = []
    for level in np.unique(level_RC[level_RC > -2]).tolist():
        colour = "none" if level < 0 else f"q{level}"
        cells.append(f'<path class="cells" {own(colour)} d="{_cells(level_RC == level)}"/>')
    columns = value_RC.shape[1]
    view = f'viewBox="0 0 {columns} {len(value_RC)}" preserveAspectRatio="none"'
    body = [f'<svg {view} width="100%" height="{px(height)}">{"".join(cells)}</svg>', *x_labels(x.fitted([]), height)]
    every = max(1, int(np.ceil(13 / row_height)))
    body += [text_at(-6, (row + 0.5) * row_height + 4, rows[row], "end tick") for row in range(0, len(rows), every)]
    body.append(text_at(-48, -8, row_label, "title"))
    readout: dict[str, Any] = {"kind": "heat", "x": x.fitted([]).limits, "xname": x.label, "rows": list(rows)}
    readout |= {"row": row_label, "unit": shades.label}
    readout["values"] = [[float(f"{v:.3g}") if np.isfinite(v) else None for v in row] for row in value_RC.tolist()]
    left = max([52, *(len(name) * LETTER_PX + 12 for name in rows)])
    return Chart(title=title, body="".join(body), height=height, note=note, readout=readout, left=left)


def shades_key(shades: Shades) -> Chart:
    """The legend of heat maps, itself a small chart."""
    ratio = shades.kind == "ratio"
    shown = [(f"q{level}", _shade_text(shades, level), "cell") for level in range(0 if ratio else 8, 17)]
    if ratio:  # the colour of zero stands apart
        shown = [("none", "0", "cell outlined"), ("", "", ""), *shown]
    width, body = 100 / len(shown), []
    for place, (colour, text, kind) in enumerate(shown):
        where = f'x="{place * width:.2f}%" y="0" width="{width + 0.05:.2f}%" height="12"'
        body.append(f'<rect class="{kind}" {own(colour)} {where}/>' if colour else "")
        body.append(text_at((place + 0.5) * width, 26, text, "middle tick", "%"))
    return Chart(title=shades.label, body="".join(body), height=12, left=10, right=10, top=4, bottom=18)


def _shade_text(shades: Shades, level: int) -> str:
    """What a level stands for, at every fourth level."""
    if level % 4:
        return ""
    if shades.kind == "amount":
        return number_text(shades.high * (level - 8) / 8, shades.high / 2)
    value = shades.high ** ((level - 8) / 8)
    text = f"{value:.3g}" if value >= 1 else f"1/{1 / value:.3g}"
    return {0: "\u2264 ", 16: "\u2265 "}.get(level, "") + text


def timeline(title: str, rows: Mapping[str, tuple[str, Sequence[float]]], *, x: Axis, note: str = "") -> Chart:
    """When things happened: one row of dots per kind, `rows` gives colour and places."""
    x = x.fitted([place for _, places in rows.values() for place in places])
    height = 24 * len(rows)
    body, dots = [], []
    for number, (name, (colour, places)) in enumerate(rows.items()):
        middle = 24 * number + 12
        body.append(f'<line class="grid" x1="0" x2="100%" y1="{middle}" y2="{middle}"/>')
        body.append(text_at(-10, middle + 4, name, "end tick"))
        across = [f"M{px(STEPS_ACROSS * place)} {middle}h0" for place in x.share(np.asarray(places, dtype=float))]
        dots.append(f'<path class="dots" {own(colour)} data-name="{escaped(name)}" d="{"".join(across)}"/>')
    body += [_plane("".join(dots), height), *x_labels(x, height)]
    left = max((len(name) for name in rows), default=0) * LETTER_PX + 16
    return Chart(title=title, body="".join(body), height=height, note=note, left=left, top=4)


def thin(x_N: NDArray[Any], y_N: NDArray[Any], most: int = POINTS) -> tuple[NDArray[Any], NDArray[Any]]:
    """At most `most` of the points: the lowest and highest of every stretch, the first and the last of all."""
    if len(x_N) <= most:
        return x_N, y_N
    kept = {0, len(x_N) - 1}
    edges = np.linspace(0, len(x_N), (most - 2) // 2 + 1).astype(int).tolist()
    for start, stop in pairwise(edges):
        part = y_N[start:stop]
        kept |= {start + int(np.where(np.isnan(part), np.inf, part).argmin())}
        kept |= {start + int(np.where(np.isnan(part), -np.inf, part).argmax())}
    index = np.array(sorted(kept))
    return x_N[index], y_N[index]


def figure(chart: Chart) -> str:
    """The chart as HTML: title, legend and SVG."""
    total = chart.top + chart.height + chart.bottom
    edges = " ".join(f"{px(edge)}px" for edge in (chart.top, chart.right, chart.bottom, chart.left))
    style = f"height:{px(total)}px;padding:{edges}"
    readout = f' data-chart="{escaped(json.dumps(chart.readout, separators=(",", ":")))}"' if chart.readout else ""
    note = f'<span class="note">{escaped(chart.note)}</span>' if chart.note else ""
    return (
        f'<figure class="chart"><figcaption><b>{escaped(chart.title)}</b>{note}</figcaption>{_html_keys(chart.keys)}'
        f'<svg class="plot" role="img" aria-label="{escaped(chart.title)}" style="{style}"{readout}>'
        f"{chart.body}</svg></figure>\n"
    )


def _html_keys(keys: Sequence[Key]) -> str:
    if len(keys) < 2:
        return ""
    entries = [
        f'<span class="key"><i class="{key.style}" {own(key.colour)}></i>{escaped(key.name)}'
        + (f" <b>{escaped(key.value)}</b>" if key.value else "")
        + "</span>"
        for key in keys
    ]
    return f'<div class="keys">{"".join(entries)}</div>'


def standalone_svg(*charts: Chart, width: float = 720) -> str:
    """The charts below each other as one SVG document with its own style and paper."""
    parts, below = [], 12.0
    for chart in charts:
        parts.append(text_at(MARGIN, below + 14, chart.title, "heading"))
        below += 22
        if chart.note:
            parts.append(text_at(MARGIN, below + 11, chart.note, "tick"))
            below += 18
        rows = _key_rows(chart.keys, width - 2 * MARGIN)
        parts += [_svg_key(key, MARGIN + place, below + 18 * row + 12) for key, place, row in rows]
        below += 18 * (rows[-1][2] + 1) if rows else 0
        left, inside = MARGIN - 4 + chart.left, width - 2 * MARGIN + 8 - chart.left - chart.right
        where = f'x="{px(left)}" y="{px(below + chart.top)}" width="{px(inside)}" height="{px(chart.height)}"'
        parts.append(f'<svg {where} overflow="visible">{chart.body}</svg>')
        below += chart.top + chart.height + chart.bottom + 8
    size = f'width="{px(width)}" height="{px(below)}" viewBox="0 0 {px(width)} {px(below)}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot standalone" {size}><style>{chart_style()}</style>'
        f'<rect class="paper" width="100%" height="100%"/>{"".join(parts)}</svg>\n'
    )


def _key_rows(keys: Sequence[Key], width: float) -> list[tuple[Key, float, int]]:
    """Place of every legend entry: how far right, in which row."""
    placed: list[tuple[Key, float, int]] = []
    right, row = 0.0, 0
    for key in keys if len(keys) > 1 else ():
        needed = (len(key.name) + len(key.value) + 1) * LETTER_PX + 40
        if right and right + needed > width:
            right, row = 0.0, row + 1
        placed.append((key, right, row))
        right += needed
    return placed


def _svg_key(key: Key, x: float, y: float) -> str:
    if key.style == "area":
        mark = f'<rect class="cell" {own(key.colour)} x="{px(x)}" y="{px(y - 9)}" width="18" height="10"/>'
    else:
        shape = "line" if key.style == "dots" else key.style
        mark = "" if key.style == "dot" else f'<path class="{shape}" {own(key.colour)} d="M{px(x)} {px(y - 4)}h18"/>'
        dot = f'<path class="dots" {own(key.colour)} d="M{px(x + 9)} {px(y - 4)}h0"/>'
        mark += dot if key.style in ("dots", "dot") else ""
    return mark + text_at(x + 24, y, f"{key.name} {key.value}".strip(), "tick")


def chart_style() -> str:
    """charts.css."""
    return files("moestro.core").joinpath("charts.css").read_text(encoding="utf-8")


def chart_script() -> str:
    """charts.js: read-outs under the pointer."""
    return files("moestro.core").joinpath("charts.js").read_text(encoding="utf-8")


def _marks(series: Series, x: Axis, y: Axis, height: float, most: int) -> str:
    """Band, line and dots of one series; a point without neighbours becomes a dot."""
    x_N, y_N = thin(np.ravel(series.x).astype(float), np.ravel(series.y).astype(float), most)
    right_N, down_N = x.share(x_N) * STEPS_ACROSS, (1 - y.share(y_N)) * height
    runs = _runs(np.isfinite(right_N) & np.isfinite(down_N))
    dotted = [i for run in runs for i in run.tolist() if len(run) == 1 or series.style in ("dots", "dot")]
    dots = "".join(f"M{_points([right_N[i]], [down_N[i]])}h0" for i in dotted)
    line = "".join(f"M{_points(right_N[run], down_N[run])}" + "h0" * (len(run) == 1) for run in runs)
    name = f'{own(series.colour)} data-name="{escaped(series.name)}"'
    band = _band(series, x, y, height)
    if series.style == "dot":
        return f'{band}<path class="dots" {name} d="{dots}"/>'
    shape = "line" if series.style == "dots" else series.style
    more = f'<path class="dots" {own(series.colour)} d="{dots}"/>' if dots else ""
    return f'{band}<path class="{shape}" {name} d="{line}"/>{more}'


def _band(series: Series, x: Axis, y: Axis, height: float) -> str:
    if series.low is None or series.high is None:
        return ""
    right_N = x.share(np.ravel(series.x)) * STEPS_ACROSS
    low_N, high_N = ((1 - y.share(np.ravel(edge))) * height for edge in (series.low, series.high))
    outline = f"M{_points(right_N, high_N)} {_points(right_N[::-1], low_N[::-1])}z"
    return f'<path class="band" {own(series.colour)} d="{outline}"/>'


def _runs(known_N: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Stretches of True, as indices."""
    index = np.flatnonzero(known_N)
    return [run for run in np.split(index, np.flatnonzero(np.diff(index) > 1) + 1) if len(run)]


def _points(right_N: ArrayLike, down_N: ArrayLike) -> str:
    pairs = zip(np.asarray(right_N).tolist(), np.asarray(down_N).tolist(), strict=True)
    return " ".join(f"{px(right)} {px(down)}" for right, down in pairs)


def _cells(here_RC: NDArray[np.bool_]) -> str:
    """Cells as one path of rectangles, neighbours in a row merged."""
    path = []
    for row, here_C in enumerate(here_RC):
        turn = np.flatnonzero(np.diff(np.concatenate([[False], here_C, [False]]).astype(np.int8)))
        path += [f"M{a} {row}h{b - a}v1h{a - b}z" for a, b in zip(turn[::2].tolist(), turn[1::2].tolist(), strict=True)]
    return "".join(path)


def _grid(x: Axis, y: Axis, height: float) -> list[str]:
    """Horizontal rules with their values, and the axes' names."""
    at_most = min(max(2, int(height / 27)), 8)
    parts = []
    for tick in y.ticks(at_most):
        down = (1 - float(y.share(tick))) * height
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{px(down)}" y2="{px(down)}"/>')
        parts.append(text_at(-8, down + 4, y.text(tick, at_most), "end tick"))
    return [*parts, text_at(-48, -10, y.title, "title"), *x_labels(x, height)]


def _reference_lines(references: Sequence[Reference], y: Axis, height: float) -> list[str]:
    downs = [(1 - float(y.share(reference.value))) * height for reference in references]
    return [f'<line class="reference" x1="0" x2="100%" y1="{px(down)}" y2="{px(down)}"/>' for down in downs]


def _reference_names(references: Sequence[Reference], y: Axis, height: float) -> list[str]:
    """Names above their lines, a line of text apart; of two near lines the lower one has its name below, if it fits."""
    ordered = sorted(references, key=lambda reference: reference.value)
    downs = [(1 - float(y.share(reference.value))) * height for reference in ordered]
    near = len(downs) > 1 and downs[0] - downs[1] < 20 and height - downs[0] > 15
    lowest, parts = height + 14.0, []
    for place, (reference, down) in enumerate(zip(ordered, downs, strict=True)):
        lowest = down + 13 if near and place == 0 else min(down - 5, lowest - 14)
        parts.append(text_at(6, lowest, reference.label, "label halo"))
    return parts


def _plane(marks: str, height: float) -> str:
    """Marks on a plot STEPS_ACROSS wide, stretched to the width there is."""
    view = f'viewBox="0 0 {STEPS_ACROSS} {px(height)}" preserveAspectRatio="none"'
    return f'<svg class="marks" {view} width="100%" height="{px(height)}" overflow="visible">{marks}</svg>'


def _readout(kind: str, x: Axis, y: Axis) -> dict[str, Any]:
    axes: dict[str, Any] = {"kind": kind, "x": x.limits, "y": y.limits, "xname": x.label, "yname": y.unit or y.label}
    return axes | {"log": y.log, "xlog": x.log, "digits": y.digits, "xdigits": x.digits}
