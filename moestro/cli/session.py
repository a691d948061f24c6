"""What train and resume share on a terminal: progress, Ctrl-C, and what to say at the end."""

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import typer

from moestro.core.units import duration_text

if TYPE_CHECKING:  # torch is imported by the command that needs it
    from moestro.train.loop import Outcome, Stop
    from moestro.train.progress import Watcher

STOPPED = 130
"""Exit status after Ctrl-C, as shells have it."""


class Interrupt:
    """The first Ctrl-C or SIGTERM asks for a stop after the current step; the second ends the process."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            sys.exit(STOPPED)
        self.asked = True
        print("\nstopping after this step; once more ends at once", file=sys.stderr)


def run_with_progress(steps: int, work: "Callable[[Watcher, Stop], Outcome]") -> None:
    """Run `work` under a progress display, write the report, say where everything is."""
    from moestro.train.progress import Terminal
    from moestro.train.report import write_report

    with Interrupt() as interrupt, Terminal(steps) as terminal:
        outcome = work(terminal, interrupt)
        root = outcome.folder.root
        if not outcome.finished:
            terminal.say(f"stopped after step {outcome.step} and saved; go on with: moestro resume {root}")
            raise typer.Exit(STOPPED)
        report = write_report(outcome.folder)
        assert outcome.evaluation is not None
        terminal.say(f"held-out: {outcome.evaluation.bits_per_byte:.3f} bits/byte after {outcome.step} steps")
        others = ", ".join(f"{name} {bits:.3f}" for name, bits in outcome.compressors.items())
        terminal.say(f"same files, one by one: {others} bits/byte")
        terminal.say(f"trained in {duration_text(outcome.seconds)}; report: {report}; model: moestro generate {root}")
