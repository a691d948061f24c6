"""How unevenly experts are loaded, from a trace: what the busiest expert-parallel rank carries beside the mean.

    {"loads": [[tokens per expert], ...]} or lists -> read_loads -> load_RE -> imbalance_of_ranks

Dimension key:  R records (layers of steps)   E experts
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moestro.core.errors import PlanError
from moestro.plan.columns import Array, Number

MOST_RECORDS = 400
"""Records that are looked at, spread evenly over the trace."""


def read_loads(path: Path, experts: int) -> Array:
    """load_RE of a JSON trace; raises PlanError where the file is no trace or has another number of experts."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"{path} cannot be read as a load trace: {error}") from error
    rows: Any = read.get("loads") if isinstance(read, dict) else read
    try:
        return checked_loads(rows, experts, str(path))
    except (TypeError, ValueError) as error:
        raise PlanError(f"{path} is not a load trace; it must hold lists of tokens per expert") from error


def checked_loads(rows: ArrayLike, experts: int, where: str) -> Array:
    """Counts of any leading dimensions as load_RE; raises PlanError where experts differ or nothing was routed."""
    loads = np.atleast_2d(np.array(rows, dtype=np.float64))
    loads = loads.reshape(-1, loads.shape[-1])
    if loads.shape[1] != experts or (loads < 0).any() or not loads.sum():
        raise PlanError(f"{where} has loads of {loads.shape[1]} experts; the model has {experts}, loads are 0 or more")
    used = loads[loads.sum(axis=1) > 0]
    return used[np.linspace(0, len(used) - 1, min(len(used), MOST_RECORDS)).astype(int)]


def imbalance_of_ranks(load_RE: ArrayLike, ranks: Number) -> Number:
    """Busiest over mean load of ranks that hold neighbouring experts, mean over records, for each number of ranks."""
    loads = np.atleast_2d(np.asarray(load_RE, dtype=np.float64))
    asked = np.asarray(ranks, dtype=np.float64)
    result = np.ones_like(asked)
    for number in np.unique(asked):
        held = loads.reshape(len(loads), int(number), -1).sum(axis=2)
        result[asked == number] = (held.max(axis=1) / held.mean(axis=1)).mean()
    return result[()]
