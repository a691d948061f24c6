"""The measuring half of `moestro plan calibrate`: short runs of the trainer here, then a fit of this machine.

    trials -> moestro train (a process of its own) -> events.jsonl -> undisturbed step -> plan.calibrate

Every run is measured twice, there and back through the list, and the faster counts: a machine with neighbours changes
speed. Runs are small and differ in width, tokens, experts and micro-batches, so that rates, overheads and traffic can
be told apart. Nothing is left behind but the profile.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from moestro.core.errors import PlanError
from moestro.core.events import read_events
from moestro.plan.calibrate import Trial, calibrated, measured_row

TEXT_LENGTH = 300_000
Say = Callable[[str], None]


def trials(ranks: int) -> list[Trial]:
    """What is run: one size changes at a time, and a few together; fewer with several ranks, which start slowly."""
    if ranks > 1:
        base = Trial(ranks=ranks, length=128)
        few = [{}, {"width": 128}, {"width": 384}, {"num_layers": 2}, {"length": 256}, {"num_experts": 16}]
        return [base.changed(**change) for change in few]
    base = Trial()
    changes: list[dict[str, int]] = [
        {},
        {"width": 128},
        {"width": 384},
        {"num_layers": 2},
        {"length": 128},
        {"length": 512},
        {"sequences": 16},
        {"num_experts": 16},
        {"expert_width": 768},
        {"micro_batches": 2},
        {"width": 384, "num_layers": 2, "sequences": 4},
    ]
    return [base.changed(**change) for change in changes]


def calibrate_here(*, out: Path, steps: int, ranks: Sequence[int], check: bool, say: Say) -> dict[str, Any]:
    """Measure, fit, write the profile; returns what to print."""
    if steps < 4:
        raise PlanError(f"--steps is {steps}; take 4 or more, the first two are not counted")
    rows = []
    for number in ranks:
        if number < 1:
            raise PlanError(f"--ranks is {number}; it must be 1 or more")
        asked = trials(number)
        there = [_measured(trial, steps, say) for trial in asked]
        back = [_measured(trial, steps, say) for trial in reversed(asked)][::-1]  # a machine's speed drifts
        rows += [measured_row(trial, min(pair)) for trial, *pair in zip(asked, there, back, strict=True)]
    result = calibrated(rows, out, check=check)
    result["text"] = "\n".join([*result["lines"], f"wrote {out}"])
    return result


def _measured(trial: Trial, steps: int, say: Say) -> float:
    step_s = measure(trial, steps)
    say(f"{trial.text()}: {1e3 * step_s:.1f} ms a step")
    return step_s


def measure(trial: Trial, steps: int) -> float:
    """Seconds of an undisturbed step of one short run: a quarter of the steps were faster.

    raises  PlanError with the trainer's message where the run fails
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe, text = Path(folder) / "recipe.toml", Path(folder) / "text.txt"
        text.write_text(_some_text(), encoding="utf-8")
        recipe.write_text(tomli_w.dumps(trial.recipe(steps, Path(folder) / "run", text)), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "moestro", "train", str(recipe)], capture_output=True, text=True, check=False
        )
        events = [event for event in read_events(Path(folder) / "run" / "events.jsonl") if event["event"] == "step"]
    if done.returncode or len(events) < 4:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise PlanError(f"a run of {trial.text()} failed: {last}")
    seconds = sorted(trial.sequences * trial.length / float(event["tokens_per_s"]) for event in events[2:])
    return seconds[len(seconds) // 4]


def _some_text() -> str:
    """Enough to draw sequences from, little enough to prepare at once: this package's own source."""
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    return "".join(source.read_text(encoding="utf-8") for source in sources)[:TEXT_LENGTH]
