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


def quantile(count_B: Tensor, share: float | Tensor) -> Tensor:
    """The log-odds below which `share` of the counted values lie, linear inside a bin; share is bounded to 0..1.

    Stays on the device: this and the budget's update ask it for nothing. float64.
    """
    below_B = count_B.double().cumsum(0)
    wanted = torch.as_tensor(share, dtype=torch.float64).clamp(0, 1) * below_B[-1]
    found = (below_B < wanted).sum().clamp(max=BINS - 1)
    before = torch.where(found > 0, below_B.gather(0, (found - 1).clamp(min=0)[None])[0], 0.0)
    inside = (wanted - before) / count_B.gather(0, found[None])[0].clamp(min=1)
    return LOWEST + (found + inside.clamp(max=1)) / PER_UNIT


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
    def update(self, count_B: Tensor, decisions: int, mean_experts: float | Tensor, wanted: float) -> None:
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
        now, last = quantile(count_B, share), self.running.double()
        moved = (share - self.share).abs() > 1e-6  # the budget moved: so does the memory, at once
        last = last + torch.where(moved, now - quantile(count_B, self.share), 0.0)
        running = torch.where(last.isnan(), now, self.decay * last + (1 - self.decay) * now)
        slope = (quantile(count_B, share + 0.05) - quantile(count_B, share - 0.05)) / 0.1 / decisions
        integral = self.integral + self.gain * (wanted - mean_experts) * slope
        self.running.copy_(running)
        self.share.fill_(share)
        self.integral.copy_(integral.clamp(LOWEST, -LOWEST))
        if share > 0:
            self.threshold.copy_(torch.sigmoid(self.running + self.integral))
        else:
            self.threshold.zero_()
