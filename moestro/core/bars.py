"""Bar charts: one bar for each row, whole or in parts.

bars, stacked_bars -> core.charts.Chart
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moestro.core.axes import Axis, number_text
from moestro.core.charts import LETTER_PX, Chart, Key
from moestro.core.svg import down_line, escaped, own, px, text_at, x_labels


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One row of a bar chart, with an optional interval."""

    name: str
    value: float
    note: str = ""
    """Small print below the name."""
    low: float | None = None
    high: float | None = None
    colour: str = "c0"


def bars(title: str, rows: Sequence[Bar], *, x: Axis, note: str = "", row_height: float = 34) -> Chart:
    """Horizontal bars from zero, each with its value; x is a linear axis."""
    ends = [end for row in rows for end in (row.value, row.low, row.high) if end is not None]
    x = x.fitted([0.0, *ends], room=0.12)
    height = row_height * len(rows)
    zero = float(x.share(0.0))
    body = [down_line(float(x.share(tick)), height, "grid") for tick in x.ticks(5)]
    for number, row in enumerate(rows):
        body.append(_bar(row, x, (number + 0.5) * row_height))
    body += [down_line(zero, height, "axis"), *x_labels(x, height, ticks=5)]
    longest = max((max(len(row.name), 0.9 * len(row.note)) for row in rows), default=0)
    return Chart(title=title, body="".join(body), height=height, note=note, left=longest * LETTER_PX + 14, top=4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """One row of a chart of bars in parts."""

    name: str
    values: Sequence[float]
    """Of every part, in the order of the parts."""
    value: str = ""
    """Text behind the bar."""
    note: str = ""
    """Small print below the name."""


def stacked_bars(
    title: str,
    rows: Sequence[Stack],
    parts: Sequence[Key],
    *,
    x: Axis,
    note: str = "",
    row_height: float = 26,
) -> Chart:
    """Horizontal bars from zero, each made of parts; a part shows its value under the pointer."""
    x = x.fitted([0.0, *(sum(row.values) for row in rows)], room=0.12)
    height = row_height * len(rows)
    body = [down_line(float(x.share(tick)), height, "grid") for tick in x.ticks(5)]
    for number, row in enumerate(rows):
        body.append(_stack(row, parts, x, (number + 0.5) * row_height))
    body += [down_line(float(x.share(0.0)), height, "axis"), *x_labels(x, height, ticks=5)]
    left = max((max(len(row.name), 0.9 * len(row.note)) for row in rows), default=0) * LETTER_PX + 14
    keys = tuple(Key(part.name, part.colour, "area", part.value) for part in parts)
    return Chart(title=title, body="".join(body), height=height, note=note, keys=keys, left=left, top=4)


def _stack(row: Stack, parts: Sequence[Key], x: Axis, middle: float) -> str:
    drawn, end = [], 0.0
    for part, value in zip(parts, row.values, strict=True):
        start, end = end, end + value
        left, right = (100 * float(x.share(edge)) for edge in (start, end))
        tip = f"{row.name}, {part.name}: {number_text(value)} {x.unit}".strip()
        drawn.append(
            f'<rect class="bar" {own(part.colour)} x="{left:.3f}%" y="{px(middle - 9)}" width="{right - left:.3f}%" '
            f'height="18"><title>{escaped(tip)}</title></rect>'
        )
    words = [
        text_at(-10, middle + (-2 if row.note else 4), row.name, "end label"),
        text_at(-10, middle + 11, row.note, "end tick"),
        text_at(100 * float(x.share(end)), middle + 4, row.value, "label value", "%", shift=6),
    ]
    return "".join(drawn + words)


def _bar(row: Bar, x: Axis, middle: float) -> str:
    start, end = sorted((float(x.share(0.0)), float(x.share(row.value))))
    parts = [
        f'<rect class="bar" {own(row.colour)} x="{100 * start:.2f}%" y="{px(middle - 9)}" '
        f'width="{100 * (end - start):.2f}%" height="18"/>',
        text_at(-10, middle + (-2 if row.note else 4), row.name, "end label"),
        text_at(-10, middle + 12, row.note, "end tick"),
    ]
    if row.low is not None and row.high is not None:
        low, high = (f"{100 * float(x.share(edge)):.2f}%" for edge in (row.low, row.high))
        parts.append(f'<line class="interval" x1="{low}" x2="{high}" y1="{px(middle)}" y2="{px(middle)}"/>')
        end = max(end, float(x.share(row.high)))
    parts.append(text_at(100 * end, middle + 4, number_text(row.value), "label value", "%", shift=6))
    return "".join(parts)
