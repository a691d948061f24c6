"""Hold the mean number of experts per token at a budget.

    decisions of a step -> histogram -> quantile at the budget -> running mean + small integral -> threshold

A rule takes a further expert where its decision value v in 0..1 is at most theta. With J decisions per token the mean
number is 1 + J F(theta), F the share of values at or below theta; so theta is the quantile of v at (mean - 1) / J. The
quantile of one batch is noisy and one step late, hence a running mean of it, and an integral of the remaining error in
units of experts, turned into units of the threshold by the local slope of the quantile.

All of this happens on the log-odds of v: a router that grows sure of itself moves every gap towards 1, where v itself
has no digits left but its log-odds move evenly. Theta is a buffer: it is in checkpoints, and frozen at evaluation, so a
token's experts depend on its own past only. Histograms add up, over micro-batches and over ranks.
"""

import math

import torch
from torch import Tensor, nn

from moestro.nn.permute import count_of

LOWEST = -15.0
"""Log-odds at the left edge of the first bin; values outside fall into the first and last bin."""
PER_UNIT = 64
"""Bins per unit of log-odds."""
BINS = int(-2 * LOWEST * PER_UNIT)


def histogram(decision_TJ: Tensor) -> Tensor:
    """Count decision values in BINS bins that are even in log-odds; float32."""
    log_odds_A = torch.logit(decision_TJ.flatten().float(), eps=1e-7)
    index_A = ((log_odds_A - LOWEST) * PER_UNIT).long().clamp_(0, BINS - 1)
    return count_of(index_A, BINS).float()


def quantile(count_B: Tensor, share: float) -> float:
    """The log-odds below which `share` of the counted values lie, linear inside a bin; share is bounded to 0..1."""
    below_B = count_B.double().cumsum(0)
    wanted = min(max(share, 0.0), 1.0) * float(below_B[-1])
    found = min(int(torch.searchsorted(below_B, wanted)), BINS - 1)
    before = float(below_B[found - 1]) if found else 0.0
    inside = (wanted - before) / max(float(count_B[found]), 1.0)
    return LOWEST + (found + min(inside, 1.0)) / PER_UNIT


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
    share: Tensor

    def __init__(self, decay: float, gain: float) -> None:
        super().__init__()
        self.decay, self.gain = decay, gain
        self.register_buffer("threshold", torch.ones(()))
        self.register_buffer("running", torch.full((), torch.nan))
        self.register_buffer("integral", torch.zeros(()))
        self.register_buffer("share", torch.ones(()))

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
        now, last = quantile(count_B, share), float(self.running)
        if abs(share - float(self.share)) > 1e-6:  # the budget moved: so does the memory, at once
            last += now - quantile(count_B, float(self.share))
        running = now if math.isnan(last) else self.decay * last + (1 - self.decay) * now
        slope = (quantile(count_B, share + 0.05) - quantile(count_B, share - 0.05)) / 0.1 / decisions
        integral = float(self.integral) + self.gain * (wanted - mean_experts) * slope
        self.running.fill_(running)
        self.share.fill_(share)
        self.integral.fill_(min(max(integral, LOWEST), -LOWEST))
        self.threshold.fill_(torch.sigmoid(self.running + self.integral) if share > 0 else 0.0)
