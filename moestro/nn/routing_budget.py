"""Hold the mean number of experts per token at a budget.

    decisions of a step -> histogram -> quantile at the budget -> running mean + small integral -> threshold

A rule takes a further expert where its decision value v is at most theta. With J decisions per token the mean number
is 1 + J F(theta), F the share of values at or below theta; so theta is the quantile of v at (mean - 1) / J. The
quantile of one batch is noisy and one step late, hence a running mean of it, and an integral of the remaining error in
units of experts, turned into units of theta by the local slope of the quantile. Theta is a buffer: it is in
checkpoints, and frozen at evaluation, so a token's experts depend on its own past only.

Histograms add up, over micro-batches and over ranks, and so does everything here.
"""

import math

import torch
from torch import Tensor, nn

BINS = 4096
"""Resolution of decision values in 0..1."""


def histogram(decision_TJ: Tensor) -> Tensor:
    """Count decision values in BINS equal bins over 0..1; float32."""
    index_A = (decision_TJ.flatten() * BINS).long().clamp_(0, BINS - 1)
    return torch.bincount(index_A, minlength=BINS).float()


def quantile(count_B: Tensor, share: float) -> float:
    """The value below which `share` of the counted values lie, linear inside a bin; 0..1."""
    if share <= 0:
        return 0.0
    if share >= 1:
        return 1.0
    below_B = count_B.double().cumsum(0)
    wanted = share * float(below_B[-1])
    found = min(int(torch.searchsorted(below_B, wanted)), BINS - 1)
    before = float(below_B[found - 1]) if found else 0.0
    inside = (wanted - before) / max(float(count_B[found]), 1.0)
    return (found + min(inside, 1.0)) / BINS


def budget_at(progress: float, start: float, end: float, anneal_share: float) -> float:
    """Mean experts per token wanted at `progress` of a run (0..1): linear from start to end, then end."""
    if progress >= anneal_share:
        return end
    return start + (end - start) * progress / anneal_share


class Budget(nn.Module):
    """The threshold and its memory.

    decay     of the running mean of the quantile, per step
    gain      share of the budget's error integrated per step
    """

    threshold: Tensor
    running: Tensor
    integral: Tensor

    def __init__(self, decay: float, gain: float) -> None:
        super().__init__()
        self.decay, self.gain = decay, gain
        self.register_buffer("threshold", torch.ones(()))
        self.register_buffer("running", torch.full((), torch.nan))
        self.register_buffer("integral", torch.zeros(()))

    @torch.no_grad()
    def update(self, count_B: Tensor, decisions: int, mean_experts: float, wanted: float) -> None:
        """Take one step's decisions into account.

        count_B        histogram of the step
        decisions      J, decisions per token
        mean_experts   what the step really used
        wanted         the budget
        """
        share = (wanted - 1) / decisions
        if share >= 1:  # everything: no quantile to track
            self.threshold.fill_(1.0)
            self.running.fill_(torch.nan)
            self.integral.zero_()
            return
        now = quantile(count_B, share)
        running = float(self.running)
        running = now if math.isnan(running) else self.decay * running + (1 - self.decay) * now
        slope = (quantile(count_B, share + 0.05) - quantile(count_B, share - 0.05)) / 0.1 / decisions
        integral = float(self.integral) + self.gain * (wanted - mean_experts) * slope
        self.running.fill_(running)
        self.integral.fill_(min(max(integral, -0.5 * running), 0.5))
        self.threshold.fill_(min(max(running + float(self.integral), 0.0), 1.0))
