"""The router's Triton kernels equal the plain router, values and gradients; interpreted where there is no GPU."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moestro.core.specs import RouterSpec
from moestro.nn.router import Router

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES: list[dict[str, Any]] = [
    {"rule": "gap", "weights": "pair", "z_loss": 0.1},
    {"rule": "gap", "weights": "keep", "score": "sigmoid", "weight_scale": 1.5, "selection_bias": "loss_free"},
    {"rule": "topk", "k": 4, "weights": "renormalise", "aux_scope": "global"},
    {"rule": "topk", "k": 3, "score": "sigmoid", "weights": "renormalise", "z_loss": 0.1},
    {"rule": "top1", "weights": "straight"},
    {"rule": "top2", "weights": "keep"},
]


@pytest.mark.parametrize("fields", CASES, ids=lambda f: f"{f['rule']} {f['weights']} {f.get('score', 'softmax')}")
def test_the_fused_router_equals_the_plain_one(fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    router = Router(12, 7, RouterSpec(**fields)).to(DEVICE)
    torch.nn.init.normal_(router.weight_ED)
    router.budget.threshold.fill_(0.5)
    router.bias_E.normal_(0, 0.3)
    router.step_count_E.copy_(torch.arange(7))
    x_TD = torch.randn(37, 12, device=DEVICE, requires_grad=True)  # not a multiple of a block
    found = []
    for fused in (False, True):
        router.fused = fused
        choice, record = router(x_TD)
        value = (
            choice.weight_TK * torch.linspace(1, 2, choice.weight_TK.numel(), device=DEVICE).view_as(choice.weight_TK)
        ).sum()
        gradients = torch.autograd.grad(value + 3 * record.loss, [x_TD, router.weight_ED])
        found.append([choice.weight_TK, record.loss, record.balance, record.entropy, record.count_E, *gradients])
        found[-1] += [choice.expert_TK, record.experts_T] + ([record.decision_B] if router.steered else [])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def test_a_fused_record_moves_the_threshold_as_a_plain_one() -> None:
    thresholds = []
    for fused in (False, True):
        torch.manual_seed(1)
        router = Router(8, 4, RouterSpec()).to(DEVICE)
        torch.nn.init.normal_(router.weight_ED)
        router.fused = fused
        router.update(router(torch.randn(200, 8, device=DEVICE))[1], progress=1.0)
        thresholds.append(float(router.budget.threshold))
    assert thresholds[0] == pytest.approx(thresholds[1], abs=1e-4)
    assert 0 < thresholds[0] < 1


@pytest.mark.parametrize(("rule", "fusible"), [("topp", False), ("gap", torch.cuda.is_available())])
def test_rules_that_the_kernels_do_not_know_stay_in_torch(rule: Any, fusible: bool) -> None:
    router = Router(8, 4, RouterSpec(rule=rule)).to(DEVICE)
    assert router._fusible(torch.zeros(3, 8, device=DEVICE)) == fusible
