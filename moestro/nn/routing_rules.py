"""How a token's scores become a choice of experts: one pure function per rule.

    scores: Scores -> rule -> Choice(expert_TK, weight_TK, ...)

All rules return the same shape: K slots per token, each with an expert and a weight; an unused slot holds the number
of experts and weight 0. So "one or two experts" is K = 2 with the second slot used or not, and nothing downstream
asks which rule it was.

    top1 top2 topk   the k best (Shazeer 2017, Fedus 2021)
    gap              the best, and the second only where it is nearly as good (ours)
    topp             the fewest whose probabilities reach a mass (Huang 2024)
    gshard           the best, and the second by chance in proportion to its weight (Lepikhin 2020)
    null             k best of real and idle experts (Zeng 2024)
    relu             every expert with a positive score (Wang 2024)
    expert_choice    every expert takes its best tokens (Zhou 2022); training only: which tokens an expert takes
                     depends on later tokens of the batch, so its training loss sees the future
    quantile         every expert above its own running quantile of scores (Su 2026)

Dimension key:  T tokens   E experts   K slots per token   J decisions a budget steers, per token
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """What the router thinks of every expert, float32."""

    logit_TE: Tensor
    score_TE: Tensor
    """softmax or sigmoid of the logits, in 0..1; the raw material of weights."""
    select_TE: Tensor
    """What the best experts are picked by: the score plus a bias, -inf where a group is out."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which experts every token goes to."""

    expert_TK: Tensor
    """int64, best first; the number of experts marks an unused slot."""
    weight_TK: Tensor
    """float32, differentiable; 0 in unused slots."""
    decision_TJ: Tensor | None = None
    """What the budget's threshold is held against: a further expert was taken where the value is at most it."""


def top_k(scores: Scores, k: int) -> Choice:
    """The k experts with the best selection score."""
    expert_TK = scores.select_TE.topk(k, dim=-1).indices
    return Choice(expert_TK, scores.score_TE.gather(1, expert_TK))


def renormalised(choice: Choice, straight: bool = False) -> Choice:
    """Weights of every token divided by their sum.

    straight   the sum counts as a constant: a lone expert weighs 1 and its score still gets a gradient
    """
    total_T1 = choice.weight_TK.sum(-1, keepdim=True)
    total_T1 = total_T1.detach() if straight else total_T1
    return Choice(choice.expert_TK, choice.weight_TK / (total_T1 + 1e-20), choice.decision_TJ)


def gap(scores: Scores, threshold: Tensor, softmax: bool, weights: str, ramp_width: float) -> Choice:
    """The best expert, and the second where g = (s1 - s2) / (s1 + s2) is at most the threshold.

    For softmax scores g = tanh((l1 - l2) / 2), which keeps its digits where both probabilities are tiny. g comes from
    raw scores even where a bias picked the experts.
    weights    keep: the scores. pair: divided by s1 + s2. ramp: as pair, and the second weight times a ramp that is 0
               at the threshold and 1 from `ramp_width` of the threshold below it
    """
    num_experts = scores.score_TE.shape[1]
    expert_T2 = scores.select_TE.topk(2, dim=-1).indices
    score_T2 = scores.score_TE.gather(1, expert_T2)
    gap_T = pair_gap(scores.logit_TE.gather(1, expert_T2) if softmax else score_T2, softmax)
    second_T = gap_T.detach() <= threshold
    if weights in ("pair", "ramp"):
        score_T2 = score_T2 / (score_T2.sum(-1, keepdim=True) + 1e-20)
    second_weight_T = score_T2[:, 1] * second_T
    if weights == "ramp":
        second_weight_T = second_weight_T * ((threshold - gap_T) / (ramp_width * threshold + 1e-20)).clamp(0, 1)
    expert_T2 = torch.stack([expert_T2[:, 0], expert_T2[:, 1].where(second_T, num_experts)], -1)
    return Choice(expert_T2, torch.stack([score_T2[:, 0], second_weight_T], -1), gap_T.detach()[:, None])


def pair_gap(pair_T2: Tensor, logits: bool) -> Tensor:
    """(s1 - s2) / (s1 + s2) in 0..1, from logits or from scores; 0 where a bias put the weaker first."""
    first_T, second_T = pair_T2.unbind(-1)
    gap_T = torch.tanh((first_T - second_T) / 2) if logits else (first_T - second_T) / (first_T + second_T + 1e-20)
    return gap_T.clamp(min=0)


def top_p(scores: Scores, threshold: Tensor, max_experts: int) -> Choice:
    """The best expert, and further ones while the mass before them is at most the threshold."""
    expert_TK = scores.select_TE.topk(max_experts, dim=-1).indices
    score_TK = scores.score_TE.gather(1, expert_TK)
    mass_TJ = score_TK.detach().cumsum(-1)[:, :-1]
    taken_TK = torch.cat([torch.ones_like(mass_TJ[:, :1], dtype=torch.bool), mass_TJ <= threshold], -1)
    return Choice(*only(taken_TK, expert_TK, score_TK, scores.score_TE.shape[1]), mass_TJ)


def gshard(scores: Scores, training: bool, weights: str) -> Choice:
    """The best expert, and the second with probability min(1, 2 s2 / (s1 + s2)).

    Outside training chance would make answers differ, so the second is taken where that probability is at least 1/2.
    """
    expert_T2 = scores.select_TE.topk(2, dim=-1).indices
    score_T2 = scores.score_TE.gather(1, expert_T2)
    share_T2 = score_T2 / (score_T2.sum(-1, keepdim=True) + 1e-20)
    chance_T = (2 * share_T2[:, 1]).detach()
    second_T = torch.rand_like(chance_T) < chance_T if training else chance_T >= 0.5
    taken_T2 = torch.stack([torch.ones_like(second_T), second_T], -1)
    weight_T2 = share_T2 if weights == "pair" else score_T2
    return Choice(*only(taken_T2, expert_T2, weight_T2, scores.score_TE.shape[1]))


def null_experts(scores: Scores, k: int, num_experts: int) -> Choice:
    """The k best of real and idle experts; scores has num_experts real columns, then the idle ones."""
    expert_TK = scores.select_TE.topk(k, dim=-1).indices
    return Choice(*only(expert_TK < num_experts, expert_TK, scores.score_TE.gather(1, expert_TK), num_experts))


def by_mask(taken_TE: Tensor, weight_TE: Tensor) -> Choice:
    """Any set of experts per token, none included."""
    tokens, num_experts = taken_TE.shape
    expert_TE = torch.arange(num_experts, device=taken_TE.device).expand(tokens, -1)
    return Choice(*only(taken_TE, expert_TE, weight_TE, num_experts))


def only(taken_TK: Tensor, expert_TK: Tensor, weight_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Blank the slots that are not taken."""
    return expert_TK.where(taken_TK, num_experts), weight_TK * taken_TK


def best_tokens(score_TE: Tensor, mean_experts: float) -> tuple[Tensor, Tensor]:
    """expert_choice: every expert takes its T * mean_experts / E best tokens; returns taken_TE and cut-offs."""
    tokens, num_experts = score_TE.shape
    capacity = max(1, min(tokens, round(tokens * mean_experts / num_experts)))
    best_CE = score_TE.topk(capacity, dim=0)
    taken_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter_(0, best_CE.indices, True)
    return taken_TE, best_CE.values[-1]


def within_groups(select_TE: Tensor, num_groups: int, groups_per_token: int, group_score: str) -> Tensor:
    """-inf for experts outside each token's best groups (DeepSeek-V2, V3).

    group_score   max: a group is as good as its best expert. top2_sum: as its two best together
    """
    if num_groups in (1, groups_per_token):
        return select_TE
    grouped_TGE = select_TE.unflatten(-1, (num_groups, -1))
    best = min(2 if group_score == "top2_sum" else 1, grouped_TGE.shape[-1])
    score_TG = grouped_TGE.topk(best, dim=-1).values.sum(-1)
    keep_TG = torch.zeros_like(score_TG, dtype=torch.bool)
    keep_TG.scatter_(1, score_TG.topk(groups_per_token, dim=-1).indices, True)
    return grouped_TGE.masked_fill(~keep_TG[..., None], -torch.inf).flatten(1)
