"""What a person sees while training: a live line on a terminal, plain lines elsewhere.

Loss, bits per byte, tokens/s, time left, mean experts per token, busiest expert over mean.
"""

import time
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from moestro.core.units import count_text, duration_text

PLAIN_EVERY_S = 5.0
"""Seconds between lines where there is no terminal."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The figures of one step."""

    step: int
    loss: float
    bits_per_byte: float
    tokens_per_s: float
    mean_experts: float
    busiest_over_mean: float

    def text(self) -> str:
        """One short line."""
        experts = (
            f"  experts {self.mean_experts:.2f}  busiest {self.busiest_over_mean:.2f}x" if self.mean_experts else ""
        )
        speed = f"{count_text(self.tokens_per_s)} tokens/s"
        return f"loss {self.loss:.3f}  {self.bits_per_byte:.3f} bits/byte  {speed}{experts}"


class Watcher(Protocol):
    """Told what happens; shows it."""

    def step(self, reading: Reading) -> None: ...
    def say(self, message: str) -> None: ...


class Silent:
    """Shows nothing; for tests and benchmarks."""

    def step(self, reading: Reading) -> None:
        """Ignore."""

    def say(self, message: str) -> None:
        """Ignore."""


class Terminal:
    """A live progress bar on a terminal, a line every few seconds elsewhere; use as a context manager."""

    def __init__(self, steps: int, done: int = 0) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._steps, self._first = steps, done
        self._begun_s = self._shown_s = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn(
                    "step {task.completed}/{task.total}", table_column=Column(min_width=len(f"step {steps}/{steps}"))
                ),
                BarColumn(bar_width=12, table_column=Column(max_width=12)),
                TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5)),
                TextColumn("left", table_column=Column(no_wrap=True)),
                TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> "Terminal":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, reading: Reading) -> None:
        """Show a step."""
        if self._bar:
            self._bar.update(self._task, completed=reading.step, description=reading.text())
        elif time.monotonic() - self._shown_s >= PLAIN_EVERY_S or reading.step == self._steps:
            self._shown_s = time.monotonic()
            per_step_s = (self._shown_s - self._begun_s) / max(reading.step - self._first, 1)
            left = duration_text(per_step_s * (self._steps - reading.step))
            self.console.print(f"step {reading.step}/{self._steps}  {reading.text()}  left {left}", soft_wrap=True)

    def say(self, message: str) -> None:
        """Show a message above the bar."""
        self.console.print(message, soft_wrap=True)
