"""What the loads will be: moving averages of several memories, and a trend, each judged by its own past errors.

    counts, step by step -> Predictor.update -> predict() -> (load_LE, error_L), drift_L

A short memory follows drift and shakes; a long one averages bursts away and lags. All run side by side; the one with
the smallest recent error is used, layer by layer (Holt 1957 for the damped trend). The error is that prediction's
recent relative error, in 0..2: half of it is the share of tokens that went elsewhere than predicted.

Dimension key:  L layers   E experts   M memories
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MEMORIES = (0.0, 0.5, 0.8, 0.95)
"""Weight of the past in each average; 0 repeats the last step."""
TREND_LEVEL, TREND_SLOPE, DAMPING = 0.6, 0.8, 0.9
JUDGED = 0.9
"""Weight of the past in each memory's error."""


class Predictor:
    """Loads of every layer; scale-free, only shares are compared."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.mean_MLE = np.zeros((len(MEMORIES), num_layers, num_experts))
        self.level_LE = np.zeros((num_layers, num_experts))
        self.slope_LE = np.zeros((num_layers, num_experts))
        self.error_ML = np.zeros((len(MEMORIES) + 1, num_layers))
        self.drift_L = np.zeros(num_layers)
        """Relative change of the smoothed loads per update, in 0..2."""
        self.updates = 0

    def update(self, count_LE: NDArray[np.number]) -> None:
        """Take in one step's (or one interval's) counts."""
        load_LE = count_LE.astype(float)
        total_L = np.maximum(load_LE.sum(axis=1), 1e-12)
        if not self.updates:
            self.mean_MLE[:] = load_LE
            self.level_LE[:] = load_LE
            self.updates = 1
            return
        error_ML = np.abs(self._all() - load_LE).sum(axis=2) / total_L
        weight = JUDGED if self.updates > 1 else 0.0
        self.error_ML = weight * self.error_ML + (1 - weight) * error_ML
        before_LE = self.mean_MLE[-2].copy()
        memory_M = np.minimum(np.array(MEMORIES), 1 - 1 / (self.updates + 1))[:, None, None]
        self.mean_MLE = memory_M * self.mean_MLE + (1 - memory_M) * load_LE
        moved_L = np.abs(self.mean_MLE[-2] - before_LE).sum(axis=1) / total_L
        self.drift_L = weight * self.drift_L + (1 - weight) * moved_L
        ahead_LE = self.level_LE + DAMPING * self.slope_LE
        level_LE = TREND_LEVEL * ahead_LE + (1 - TREND_LEVEL) * load_LE
        self.slope_LE = TREND_SLOPE * DAMPING * self.slope_LE + (1 - TREND_SLOPE) * (level_LE - self.level_LE)
        self.level_LE = level_LE
        self.updates += 1

    def _all(self) -> Floats:
        return np.concatenate([self.mean_MLE, np.maximum(self.level_LE + DAMPING * self.slope_LE, 0.0)[None]])

    def predict(self) -> tuple[Floats, Floats]:
        """load_LE of the next step, and the relative error to expect of each layer's."""
        best_L = self.error_ML.argmin(axis=0)
        layers = np.arange(len(best_L))
        return self._all()[best_L, layers], self.error_ML[best_L, layers]


def mean_load(count_NLE: NDArray[np.number], memory: float = 0.7) -> Floats:
    """Exponential moving average over a whole trace."""
    mean_LE = count_NLE[0].astype(float)
    for count_LE in count_NLE[1:]:
        mean_LE = memory * mean_LE + (1 - memory) * count_LE
    return mean_LE
