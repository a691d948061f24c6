"""AdamW with parameter groups that suit sparse models, and learning-rate schedules as pure functions."""

import math

import torch
from torch import nn

from moestro.train.recipe import OptimizerSpec

FIRST_LR = "first_lr"
"""Key of a group that holds its rate at the schedule's 1.0."""


def group_of(name: str) -> str:
    """Which group a parameter belongs to: router, expert, embedding, matrix, or plain (norms, biases: no decay)."""
    if ".router." in name:
        return "router"
    if ".experts." in name:
        return "expert"
    if name.startswith(("embedding.", "head.")):
        return "embedding"
    return "matrix" if name.endswith(".weight") else "plain"


def make_optimizer(model: nn.Module, spec: OptimizerSpec) -> torch.optim.AdamW:
    """Experts and matrices decay; routers, norms, biases and embeddings do not. One fused pass per step."""
    members: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        members.setdefault(group_of(name), []).append(parameter)
    scale = {"router": spec.router_lr_scale, "expert": spec.expert_lr_scale, "embedding": spec.embedding_lr_scale}
    groups = [
        {
            "params": parameters,
            "name": group,
            FIRST_LR: spec.lr * scale.get(group, 1.0),
            "weight_decay": spec.weight_decay if group in ("expert", "matrix") else 0.0,
        }
        for group, parameters in sorted(members.items())
    ]
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)


def lr_share(spec: OptimizerSpec, step: int, steps: int) -> float:
    """The learning rate of a step as a share of the full one, 0..1.

    step   0 for the first
    wsd    warm up, stay, fall linearly over the last decay_share (Hu 2024)
    cosine warm up, then half a cosine (Loshchilov 2017)
    """
    warm = min((step + 1) / (spec.warmup_steps + 1), 1.0)
    low = spec.final_lr_share
    match spec.schedule:
        case "wsd":
            decay_steps = max(spec.decay_share * steps, 1)
            left = min((steps - step) / decay_steps, 1.0)
            return warm * (low + (1 - low) * left)
        case "cosine":
            along = min(max(step - spec.warmup_steps, 0) / max(steps - spec.warmup_steps, 1), 1.0)
            return warm * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * along)))
    return warm


def set_lr(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group its rate for this step."""
    for group in optimizer.param_groups:
        group["lr"] = group[FIRST_LR] * share
