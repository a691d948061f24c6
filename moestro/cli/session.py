"""What train and resume share on a terminal: ranks, progress, Ctrl-C, and what to say at the end."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import typer

from moestro.core.errors import STOPPED, Error, RankLostError
from moestro.core.units import duration_text

if TYPE_CHECKING:  # torch is imported by the command that needs it
    from moestro.train.engine import Engine
    from moestro.train.loop import Outcome, Stop
    from moestro.train.progress import Watcher
    from moestro.train.recipe import Recipe

    Work = Callable[[Watcher, Stop, Engine], Outcome]

LOST = 75
"""Exit status of a rank that has lost another: the launcher may start all again."""


class Interrupt:
    """The first Ctrl-C or SIGTERM asks for a stop after the current step; the second ends the process."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    def __enter__(self) -> "Interrupt":
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return self

    def heed_sigterm(self) -> None:
        """From now on; before, while ranks wait for each other outside Python, it has to end a rank at once."""
        signal.signal(signal.SIGTERM, self._on_signal)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            sys.exit(STOPPED)
        self.asked = True
        if os.environ.get("RANK", "0") == "0":
            print("\nstopping after this step; once more ends at once", file=sys.stderr)


def run_with_progress(recipe: "Recipe", work: "Work") -> None:
    """Run `work` on this rank, or on the ranks the recipe asks for, which are started here."""
    from moestro.dist.mesh import under_torchrun

    if recipe.dist.ranks > 1 and not under_torchrun():
        from moestro.dist.launch import launch

        status = launch(lambda: run_rank(recipe, work), recipe.dist.ranks, recipe.dist.restarts)
        if status:
            raise typer.Exit(status)
    elif status := run_rank(recipe, work):
        raise typer.Exit(status)


def run_rank(recipe: "Recipe", work: "Work") -> int:
    """One rank's work; only the leader shows progress and errors. Returns the exit status."""
    from moestro.dist.mesh import leave
    from moestro.train.progress import Silent
    from moestro.train.ranks import enlist

    with Interrupt() as interrupt:
        try:
            engine = enlist(recipe)
            interrupt.heed_sigterm()
            with engine.guard():
                if engine.leads:
                    return run_leader(recipe, lambda watcher: work(watcher, interrupt, engine))
                return 0 if work(Silent(), interrupt, engine).finished else STOPPED
        except RankLostError as error:
            if error.ours:
                print(f"moestro: {error}", file=sys.stderr, flush=True)
            os._exit(LOST)  # at once: leaving the group in order would wait for the lost rank
        except Error as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"moestro: {error}", file=sys.stderr)
            return 1
        finally:
            leave()


def run_leader(recipe: "Recipe", work: "Callable[[Watcher], Outcome]") -> int:
    """Run `work` under a progress display, write the report, say where everything is."""
    from moestro.train.progress import Terminal
    from moestro.train.report import write_report

    with Terminal(recipe.train.steps) as terminal:
        outcome = work(terminal)
        root = outcome.folder.root
        if not outcome.finished:
            terminal.say(f"stopped after step {outcome.step} and saved; go on with: moestro resume {root}")
            return STOPPED
        report = write_report(outcome.folder)
        assert outcome.evaluation is not None
        terminal.say(f"held-out: {outcome.evaluation.bits_per_byte:.3f} bits/byte after {outcome.step} steps")
        others = ", ".join(f"{name} {bits:.3f}" for name, bits in outcome.compressors.items())
        terminal.say(f"same files, one by one: {others} bits/byte")
        terminal.say(f"trained in {duration_text(outcome.seconds)}; report: {report}; model: moestro generate {root}")
    return 0
