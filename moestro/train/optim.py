"""AdamW with parameter groups that suit sparse models, and learning-rate schedules as pure functions."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moestro.nn.kernels import cpu
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


class OnePassAdamW(torch.optim.AdamW):
    """torch's AdamW that clips while it steps: on a CPU, each gradient is read once and nothing is written twice."""

    @torch.no_grad()
    def apply(self, scale: float) -> None:
        """One step with all gradients times `scale`; state and result are those of torch's `step`, to rounding."""
        members = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if all(_takes_kernel(parameter) for _, parameter in members):
            for group, parameter in members:
                self._apply(group, parameter, scale)
            return
        if scale != 1:
            for _, parameter in members:
                parameter.grad.mul_(scale)
        self.step()

    def _apply(self, group: dict[str, Any], parameter: nn.Parameter, scale: float) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step = float(state["step"])
        rates = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"], scale)
        assert parameter.grad is not None
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        cpu.adamw_(tensors, (*rates, 1 - beta1**step, math.sqrt(1 - beta2**step)))


def _takes_kernel(parameter: nn.Parameter) -> bool:
    tensors = (parameter, parameter.grad)
    return all(
        t is not None and type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.is_contiguous()
        for t in tensors
    ) and cpu.usable(parameter)


def clip_scale(norm: float, most: float) -> float:
    """What gradients of this norm are multiplied by so that it is at most `most`; 0 means any norm will do."""
    return min(most / (norm + 1e-6), 1.0) if most else 1.0


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients together, float64, where they are."""
    own, others = 0.0, []
    for parameter in parameters:
        if parameter.grad is not None and _takes_kernel(parameter):
            own += cpu.sum_of_squares(parameter.grad)
        elif parameter.grad is not None:
            others.append(parameter.grad)
    if not others:
        return torch.tensor(math.sqrt(own), dtype=torch.float64)
    return (torch.nn.utils.get_total_norm(others).double().square() + own).sqrt()


def make_optimizer(model: nn.Module, spec: OptimizerSpec) -> OnePassAdamW:
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
    return OnePassAdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)


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
