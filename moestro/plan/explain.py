"""Where each millisecond and each gigabyte goes, in tables and charts; and why another layout is slower.

StepTime, Memory -> time_lines, memory_lines, charts            two StepTimes -> why_slower
"""

from collections.abc import Sequence

import numpy as np

from moestro.core.axes import Axis
from moestro.core.bars import Bar, bars
from moestro.core.charts import standalone_svg
from moestro.plan.layout import text_of
from moestro.plan.memory import GIB, Memory
from moestro.plan.profile import MEMORY_SPREAD, band
from moestro.plan.search import Found, Question, room_gib
from moestro.plan.shape import ModelShape
from moestro.plan.step import StepTime

SHOWN_SHARE = 0.001
"""Parts below this share of the whole are left out of tables."""


def time_parts(step: StepTime) -> dict[str, float]:
    """Milliseconds by part, largest first, those that count."""
    total = float(step.total_s)
    parts = {name: 1e3 * float(value) for name, value in step.parts.items()}
    kept = {name: value for name, value in parts.items() if abs(value) > SHOWN_SHARE * 1e3 * total}
    return dict(sorted(kept.items(), key=lambda item: -item[1]))


def memory_parts(memory: Memory) -> dict[str, float]:
    """GiB by category on the fullest device, largest first, those that count."""
    parts = {name: float(value) / GIB for name, value in memory.parts.items()}
    return dict(sorted(((name, gib) for name, gib in parts.items() if gib > 0.005), key=lambda item: -item[1]))


def time_lines(step: StepTime) -> list[str]:
    """A table of milliseconds."""
    total = 1e3 * float(step.total_s)
    lines = [f"  {name:24s} {value:10.2f} ms  {100 * value / total:5.1f} %" for name, value in time_parts(step).items()]
    return [*lines, f"  {'step':24s} {total:10.2f} ms"]


def memory_lines(memory: Memory, room: float) -> list[str]:
    """A table of GiB on the fullest device."""
    stage = "last" if float(memory.last_stage) else "first"
    lines = [f"  {name:24s} {value:10.2f} GiB" for name, value in memory_parts(memory).items()]
    return [
        *lines,
        f"  {'peak':24s} {float(memory.total_gib):10.2f} GiB of {room:.1f} on a device of the {stage} stage",
    ]


def why_slower(best: StepTime, other: StepTime, parts: int = 2) -> str:
    """The parts that cost another layout most, beside the best one."""
    more = {name: float(other.parts[name]) - float(best.parts[name]) for name in best.parts if name in other.parts}
    worst = sorted(more.items(), key=lambda item: -item[1])[:parts]
    return (
        ", ".join(f"{name} +{1e3 * value:.1f} ms" for name, value in worst if value > 0) or "the same but for rounding"
    )


def tokens_per_device_s(question: Question, step_s: float) -> float:
    """Throughput of one device."""
    return question.sequences * question.length / step_s / question.devices


def flops_per_token(shape: ModelShape, length: float) -> float:
    """Forward and backward operations a token needs (FORMULAS 4.1, causal attention, head and extra heads included)."""
    window = np.minimum(np.asarray(shape.window), length)
    share = np.asarray(shape.windowed_share)
    seen = (1 - share) * length / 2 + share * (window - window * window / (2 * length))
    attention = 2 * seen * shape.heads * (shape.qk_dim + shape.v_dim) * (shape.num_layers + shape.extra_heads)
    return float(3 * (2 * shape.active_params + attention))


def model_flops_share(question: Question, step_s: float, peak_flops_per_s: float) -> float:
    """MFU: useful operations over the vendor's dense 16-bit rate."""
    per_s = flops_per_token(question.shape, question.length) * tokens_per_device_s(question, step_s)
    return per_s / peak_flops_per_s


def chart(question: Question, step: StepTime, memory: Memory, spread: float) -> str:
    """An SVG of both: milliseconds by part, gigabytes by category."""
    total = 1e3 * float(step.total_s)
    time_rows = [Bar(name=name, value=value, colour="c0") for name, value in time_parts(step).items()]
    low, high = band(total, spread)
    whole = Bar(name="step", value=total, low=low, high=high, note="p10 to p90", colour="c1")
    peak = float(memory.total_gib)
    memory_rows = [Bar(name=name, value=value, colour="c2") for name, value in memory_parts(memory).items()]
    least, most = band(peak, MEMORY_SPREAD)
    top = Bar(name="peak", value=peak, low=least, high=most, note=f"of {room_gib(question):.0f} GiB", colour="c3")
    title = f"{question.shape.name} on {question.devices} x {question.cluster.device.name}"
    return standalone_svg(
        bars(f"Where a step's time goes: {title}", [whole, *time_rows], x=Axis(unit="ms"), row_height=26),
        bars("Where memory goes on the fullest device", [top, *memory_rows], x=Axis(unit="GiB"), row_height=26),
    )


def table_lines(question: Question, found: Found) -> list[str]:
    """The best layouts, one a line, and what makes the others slower."""
    peak = float(question_peak(question))
    lines = ["  #   step s  (p10 - p90)        tokens/s/device    MFU    GiB  layout"]
    for number, (layout, step, memory) in enumerate(zip(found.layouts, found.steps, found.memories, strict=True), 1):
        seconds = float(step.total_s)
        low, high = band(seconds, found.spread)
        lines.append(
            f"{number:3d} {seconds:8.3f}  ({low:.3f} - {high:.3f}) {tokens_per_device_s(question, seconds):12.0f}"
            f" {100 * model_flops_share(question, seconds, peak):9.1f} % {float(memory.total_gib):6.1f}"
            f"  {text_of(layout)}"
        )
    lines += _reasons(found)
    if found.too_large:
        layout, seconds, gib = found.too_large
        lines.append(f"  faster, but too large: {text_of(layout)} at {seconds:.3f} s needs {gib:.1f} GiB")
    return lines


def question_peak(question: Question) -> float:
    """The vendor's dense 16-bit rate (32-bit for fp32 training) of one device."""
    peaks = question.cluster.device.peak_tflops
    return peaks.get("fp32" if question.precision == "fp32" else "bf16", max(peaks.values())) * 1e12


def _reasons(found: Found) -> list[str]:
    pairs: Sequence[tuple[int, StepTime]] = list(enumerate(found.steps, 1))[1:]
    return [f"  {number} loses by {why_slower(found.steps[0], step)}" for number, step in pairs]
