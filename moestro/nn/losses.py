"""Losses beside the language-model loss: balance, z, sparsity. Formulas with their sources; all differentiable.

Means run over `tokens`, those of the micro-batch on all ranks: what one rank returns is its share, shares add up.

Dimension key:  T tokens   E experts   B sequences
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.nn.permute import count_of


def token_loss(logit_TV: Tensor, target_T: Tensor) -> Tensor:
    """Mean cross-entropy in nats over tokens, computed in float32."""
    return F.cross_entropy(logit_TV.float(), target_T)


def balance_loss(prob_TE: Tensor, count_E: Tensor, tokens: Tensor | int | None = None) -> Tensor:
    """E sum_e f_e P_e: 1 when assignments and probabilities are even (Switch, Fedus 2021, eq. 4).

    prob_TE   normalised scores; P_e is their mean over tokens
    count_E   realised assignments, possibly of more tokens than prob_TE has; f_e is their share
    tokens    of all ranks; None: as many as prob_TE has
    """
    share_E = count_E / count_E.sum().clamp(min=1)
    return prob_TE.shape[1] * (share_E * _mean(prob_TE, tokens)).sum()


def sequence_balance_loss(
    prob_TE: Tensor, expert_TK: Tensor, sequences: int, tokens: Tensor | int | None = None
) -> Tensor:
    """The same for every sequence on its own, averaged (DeepSeek-V3, eq. 17)."""
    num_experts = prob_TE.shape[1]
    prob_BSE = prob_TE.unflatten(0, (sequences, len(prob_TE) // max(sequences, 1)))
    count_BE = sequence_counts(expert_TK, sequences, num_experts)
    share_BE = count_BE / count_BE.sum(-1, keepdim=True).clamp(min=1)
    loss_B = num_experts * (share_BE * prob_BSE.mean(1)).sum(-1)
    return loss_B.mean() if tokens is None else loss_B.sum() * (prob_BSE.shape[1] / tokens)


def sequence_counts(expert_TK: Tensor, sequences: int, num_experts: int) -> Tensor:
    """Assignments per sequence and expert; unused slots do not count."""
    sequence_T1 = torch.arange(sequences, device=expert_TK.device).repeat_interleave(
        len(expert_TK) // max(sequences, 1)
    )[:, None]
    flat_A = (sequence_T1 * (num_experts + 1) + expert_TK).flatten()
    count_BE = count_of(flat_A, sequences * (num_experts + 1)).view(sequences, num_experts + 1)
    return count_BE[:, :num_experts].to(torch.float32)


def z_loss(logit_TE: Tensor, tokens: Tensor | int | None = None) -> Tensor:
    """Mean squared log-partition of the router (ST-MoE, Zoph 2022, eq. 5): keeps logits small."""
    return _mean(torch.logsumexp(logit_TE, -1).square(), tokens)


def sparsity_loss(
    weight_TE: Tensor, count_E: Tensor, mean_experts: float, tokens: Tensor | int | None = None
) -> Tensor:
    """Load-weighted L1 of ReLU weights (ReMoE, Wang 2024, eq. 8): busier experts pay more.

    sum_e f_e mean_t w_te with f_e = E count_e / (T k)
    """
    share_E = weight_TE.shape[1] * count_E / ((len(weight_TE) if tokens is None else tokens) * mean_experts)
    return (share_E * _mean(weight_TE, tokens)).mean()


def mean_entropy(prob_TE: Tensor, tokens: Tensor | int | None = None) -> Tensor:
    """Mean entropy of the router's distribution in nats: log E when undecided, 0 when certain."""
    return -_mean((prob_TE * prob_TE.clamp(min=1e-20).log()).sum(-1), tokens)


def _mean(value_TX: Tensor, tokens: Tensor | int | None) -> Tensor:
    """The mean over the first dimension, or this rank's share of it."""
    return value_TX.mean(0) if tokens is None else value_TX.sum(0) / tokens
