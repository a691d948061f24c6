"""Parameter groups and schedules, at points one can compute."""

import pytest
import torch

from moestro.core.specs import ModelSpec, MoESpec
from moestro.nn.decoder import Decoder
from moestro.train.optim import OnePassAdamW, clip_scale, gradient_norm, group_of, lr_share, make_optimizer, set_lr
from moestro.train.recipe import OptimizerSpec

MODEL = ModelSpec(num_layers=1, width=16, vocab_size=9, moe=MoESpec(num_experts=2, expert_width=8, shared_width=8))


def test_every_parameter_is_in_its_group() -> None:
    groups = {name: group_of(name) for name, _ in Decoder(MODEL).named_parameters()}
    assert groups["blocks.0.feed_forward.router.weight_ED"] == "router"
    assert groups["blocks.0.feed_forward.experts.down_EFD"] == "expert"
    assert groups["blocks.0.feed_forward.shared.gate.weight"] == "matrix"
    assert groups["blocks.0.attention.q.weight"] == "matrix"
    assert groups["blocks.0.attention_norm.scale_D"] == "plain"
    assert groups["embedding.weight"] == "embedding"


def test_only_matrices_and_experts_decay_and_scales_apply() -> None:
    spec = OptimizerSpec(lr=0.5, weight_decay=0.1, router_lr_scale=0.1, expert_lr_scale=2.0)
    optimizer = make_optimizer(Decoder(MODEL), spec)
    set_lr(optimizer, 0.5)
    found = {group["name"]: (group["weight_decay"], group["lr"]) for group in optimizer.param_groups}
    assert found == {
        "embedding": (0.0, 0.25),
        "expert": (0.1, 0.5),
        "matrix": (0.1, 0.25),
        "plain": (0.0, 0.25),
        "router": (0.0, 0.025),
    }


@pytest.mark.parametrize(
    ("schedule", "step", "share"),
    [
        ("wsd", 0, 0.1),
        ("wsd", 9, 1.0),
        ("wsd", 79, 1.0),
        ("wsd", 90, 0.5 * 0.8 + 0.2),
        ("wsd", 99, 0.05 * 0.8 + 0.2),
        ("cosine", 9, 1.0),
        ("cosine", 54, 0.5 * 0.8 + 0.2),
        ("cosine", 99, 0.2),
        ("constant", 4, 0.5),
        ("constant", 99, 1.0),
    ],
)
def test_schedules(schedule: str, step: int, share: float) -> None:
    spec = OptimizerSpec(schedule=schedule, warmup_steps=9, decay_share=0.2, final_lr_share=0.2)  # type: ignore[arg-type]
    assert lr_share(spec, step, steps=100) == pytest.approx(share, abs=0.01)


def test_clipping_shrinks_only_what_is_too_long() -> None:
    assert clip_scale(4.0, most=1.0) == pytest.approx(0.25, rel=1e-6)
    assert clip_scale(0.5, most=1.0) == 1
    assert clip_scale(1e9, most=0.0) == 1


@pytest.mark.parametrize("kernel", [True, False])
def test_one_pass_equals_torchs_clip_and_step(monkeypatch: pytest.MonkeyPatch, kernel: bool) -> None:
    if not kernel:
        monkeypatch.setattr("moestro.nn.kernels.cpu.usable", lambda *tensors: False)
    torch.manual_seed(0)
    shapes = [(40_001,), (3, 5), (), (7, 1)]
    mine, right = ([torch.nn.Parameter(p.clone()) for p in start] for start in 2 * [[torch.randn(s) for s in shapes]])
    options = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-8}
    one_pass, torchs = OnePassAdamW(mine, **options), torch.optim.AdamW(right, **options)
    for step in range(5):
        for parameter, twin in zip(mine, right, strict=True):
            parameter.grad = None if step == 2 and parameter.dim() == 2 else torch.randn_like(parameter)
            twin.grad = None if parameter.grad is None else parameter.grad.clone()
        norm = float(gradient_norm(mine))
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(right, 3.0)), rel=1e-5)
        one_pass.apply(clip_scale(norm, 3.0))
        torchs.step()
        for parameter, twin in zip(mine, right, strict=True):
            torch.testing.assert_close(parameter, twin, rtol=1e-5, atol=1e-6)
            assert one_pass.state[parameter]["step"] == torchs.state[twin]["step"]
            for moment in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(one_pass.state[parameter][moment], torchs.state[twin][moment])
