"""Print the losses of two runs side by side, and fail where they part: python scripts/same_curve.py RUN RUN."""

import sys
from pathlib import Path

from moestro.core.events import read_events

TOLERANCE = 1e-3
"""Relative; rounding grows with the steps, a wrong gradient by far more."""


def losses(run: Path) -> dict[int, float]:
    """Loss by step."""
    return {event["step"]: event["loss"] for event in read_events(run / "events.jsonl") if event["event"] == "step"}


def main() -> None:
    """Compare."""
    left, right = (losses(Path(name)) for name in sys.argv[1:3])
    steps = sorted(left.keys() & right.keys())
    apart = {step: abs(left[step] - right[step]) / abs(right[step]) for step in steps}
    print(f"{'step':>6}  {sys.argv[1]:>30}  {sys.argv[2]:>30}  relative difference")
    for step in steps[:: max(len(steps) // 10, 1)]:
        print(f"{step:6d}  {left[step]:30.6f}  {right[step]:30.6f}  {apart[step]:.1e}")
    worst = max(apart.values(), default=float("inf"))
    print(f"largest relative difference of {len(steps)} steps: {worst:.1e}; at most {TOLERANCE:g} is asked for")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
