"""How unevenly experts are loaded, from a trace: what the busiest expert-parallel rank carries beside the mean.

trace.json: {"loads": [[tokens per expert] per layer or step]} or a list -> read_loads -> imbalance_of_ranks
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moestro.core.errors import PlanError
from moestro.plan.columns import Array, Number


def read_loads(path: Path, experts: int) -> tuple[float, ...]:
    """Load of every expert beside the mean, averaged over the trace's layers and steps.

    raises PlanError where the file is no trace or has another number of experts
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"{path} cannot be read as a load trace: {error}") from error
    rows = read.get("loads") if isinstance(read, dict) else read
    try:
        loads = np.atleast_2d(np.array(rows, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise PlanError(f"{path} is not a load trace; it must hold lists of tokens per expert") from error
    loads = loads.reshape(-1, loads.shape[-1])
    if loads.shape[1] != experts or (loads < 0).any() or not loads.sum():
        raise PlanError(
            f"{path} has loads of {loads.shape[1]} experts; the model has {experts}, and loads are 0 or more"
        )
    return tuple(np.mean(loads / loads.mean(axis=1, keepdims=True), axis=0))


def imbalance_of_ranks(load_E: Sequence[float], ranks: Number) -> Array:
    """Busiest over mean load of ranks that hold neighbouring experts, for every number of ranks asked for."""
    load = np.asarray(load_E, dtype=np.float64)
    asked = np.asarray(ranks, dtype=np.float64)
    result = np.ones_like(asked)
    for number in np.unique(asked):
        held = load.reshape(int(number), -1).sum(axis=1)
        result[asked == number] = held.max() / held.mean()
    return result[()]
