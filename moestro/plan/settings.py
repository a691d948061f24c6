"""What-if settings by what they change: model.*, planning.*, network.*, device.*, layout.*, reliability.*"""

from collections.abc import Sequence

from moestro.core.errors import PlanError
from moestro.plan.layout import SCHEDULES

KINDS = ("model", "planning", "network", "device", "layout", "reliability")
DEGREES = ("tp", "pp", "virtual", "cp", "ep", "etp", "micro_batch", "zero")
RECOMPUTES = ("none", "light", "heavy", "half", "full")
"""Names of search.RECOMPUTE, in its order."""


def of_kind(settings: Sequence[str], *kinds: str) -> list[str]:
    """The settings of some kinds; raises PlanError for a setting of no known kind."""
    for setting in settings:
        if "=" not in setting or setting.split(".")[0].split("=")[0] not in KINDS:
            raise PlanError(f"--set {setting} is not known; write KEY=VALUE with a key of {', '.join(KINDS)}")
    return [setting for setting in settings if setting.split(".")[0] in kinds]


def layout_settings(settings: Sequence[str]) -> dict[str, float]:
    """layout.tp=8, layout.schedule=1f1b, layout.recompute=full -> fields of a layout that are fixed."""
    fixed: dict[str, float] = {}
    for setting in settings:
        name, _, text = setting.removeprefix("layout.").partition("=")
        if name == "schedule" and text in SCHEDULES:
            fixed[name] = SCHEDULES.index(text)
        elif name == "recompute" and text in RECOMPUTES:
            fixed[name] = RECOMPUTES.index(text)
        elif name in DEGREES and text.isdigit() and (int(text) > 0 or name == "zero"):
            fixed[name] = int(text)
        else:
            raise PlanError(
                f"--set {setting} is not known; write layout.KEY=VALUE with a whole number for {', '.join(DEGREES)}, "
                f"schedule = {'|'.join(SCHEDULES)} or recompute = {'|'.join(RECOMPUTES)}"
            )
    return fixed
