"""Output head and cross-entropy in one: logits exist for a few tokens at a time and are never kept.

The gradient of the mean loss is known as soon as the logits are, so the forward pass already makes it (as Liger's
fused linear cross-entropy does, Hsu 2024); the backward pass only scales it.

Dimension key:  T tokens   D width   V vocabulary   P tokens of one chunk
"""

from typing import Any

import torch
from torch import Tensor

from moestro.nn.kernels import cpu

CHUNK = 1024
"""Tokens whose logits exist at a time."""


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of x @ W^T."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
        loss_T = torch.empty(len(x_TD))
        d_x_TD, d_weight_VD = torch.empty_like(x_TD), torch.zeros_like(weight_VD)
        cast_VD = weight_VD.to(x_TD.dtype)
        logit_CV = x_TD.new_empty(min(CHUNK, len(x_TD)), len(weight_VD))
        for x_PD, target_P, loss_P, d_x_PD in zip(
            *(tensor.split(CHUNK) for tensor in (x_TD, target_T, loss_T, d_x_TD)), strict=True
        ):
            logit_PV = torch.mm(x_PD, cast_VD.t(), out=logit_CV[: len(x_PD)])
            cpu.cross_entropy_(logit_PV, target_P, loss_P, 1 / len(x_TD))
            torch.mm(logit_PV, cast_VD, out=d_x_PD)
            d_weight_VD += logit_PV.t() @ x_PD
        ctx.save_for_backward(d_x_TD, d_weight_VD)
        return loss_T.mean()

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        d_x_TD, d_weight_VD = ctx.saved_tensors
        return d_x_TD * d_outputs[0].to(d_x_TD.dtype), d_weight_VD * d_outputs[0], None


def head_loss(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """Mean cross-entropy in nats; x float32 or bfloat16 and contiguous, the weight float32."""
    loss: Tensor = HeadLoss.apply(x_TD, weight_VD, target_T)
    return loss
