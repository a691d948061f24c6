"""When to move experts: a pure decision from predicted times, called by `place.planner`.

    now, planned, moving, drift, error -> decide -> Verdict

A plan is taken when what it saves over its life, discounted by the prediction's error, exceeds what moving costs.
Its life is how long the loads it was made for last: until drift has carried off HALF of them, never beyond the end of
training, and never longer than the loads were watched. Shares may always be refitted: that moves nothing.
"""

from dataclasses import dataclass
from enum import StrEnum

HALF = 0.5
"""Relative change of the loads at which a placement counts as outlived."""
LONGEST_STEPS = 2000.0
LEAST_GAIN = 0.02
"""Share of the step below which nothing is moved."""
MARGIN = 1.0
"""How many times its cost a move must save: a fading gain, discounted by the prediction's error, is caution enough."""
FADING = 0.5
"""Mean of a gain over its life, at whose end it is gone."""


def trust(error: float) -> float:
    """Share of a predicted gain that is counted on, from the expected relative error of the loads, 0..2."""
    return 1.0 - min(error / 2, 1.0)


class Reason(StrEnum):
    """Why a verdict is what it is."""

    PAYS = "pays back"
    COSTS = "costs more than it saves"
    SAME = "nothing to gain"
    UNSURE = "gain within the prediction's error"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether to move, and the figures behind it."""

    move: bool
    reason: Reason
    saved_s: float
    """Over the plan's life, moving not yet subtracted."""
    cost_s: float
    life_steps: float


def life_steps(*, drift: float, interval_steps: float, watched_steps: float, left_steps: float) -> float:
    """Steps that a placement made now will stay good.

    drift  relative change of the smoothed loads per interval (`Predictor.drift_L`)
    """
    lasting = LONGEST_STEPS if drift <= 0 else HALF / drift * interval_steps
    return max(min(lasting, watched_steps, left_steps, LONGEST_STEPS), min(interval_steps, left_steps))


def decide(
    *, now_s: float, planned_s: float, move_s: float, life: float, error: float, margin: float = MARGIN
) -> Verdict:
    """Move or stay.

    now_s, planned_s  step times under the predicted loads with the placement in force and with the plan, both with
                      freshly fitted shares
    move_s            seconds that training stands still for the move (what overlaps is not counted)
    life              from `life_steps`
    error             expected relative error of the loads, 0..2; the gain is discounted by half of it
    margin            how much more than the cost the gain must be
    """
    gain_s = (now_s - planned_s) * trust(error)
    saved_s = gain_s * life * FADING
    if now_s - planned_s <= LEAST_GAIN * now_s:
        reason = Reason.SAME
    elif gain_s <= 0:
        reason = Reason.UNSURE
    else:
        reason = Reason.PAYS if saved_s > margin * move_s else Reason.COSTS
    return Verdict(move=reason is Reason.PAYS, reason=reason, saved_s=saved_s, cost_s=move_s, life_steps=life)
