"""The compiled CPU kernels equal their plain torch twins, and their absence is said, not hidden."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.core.specs import MoESpec, RopeSpec
from moestro.nn.experts import Experts, Path
from moestro.nn.kernels import cpu
from moestro.nn.kernels.causal_attention import causal_attention
from moestro.nn.kernels.head_loss import head_loss
from moestro.nn.permute import sort_by_expert
from moestro.nn.rope import Rotary

pytestmark = pytest.mark.skipif(cpu.library() is None, reason=cpu.why_not())
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 0.02, "atol": 0.02}}


def expert_layer(
    path: Path, x: Tensor, weight_TK: Tensor, expert_TK: Tensor, weights: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """y, and the gradients of x, routing weights, gate_up and down, of sum(y * x)."""
    experts, d_y = Experts(x.shape[1], MoESpec(num_experts=len(weights[0]), expert_width=weights[1].shape[1])), x
    inputs = [tensor.clone().requires_grad_() for tensor in (x, weight_TK)]
    for parameter, weight in zip(experts.parameters(), weights, strict=True):
        parameter.data = weight.clone()
    y = experts(inputs[0], inputs[1], sort_by_expert(expert_TK, len(weights[0])), path)
    return y.detach(), *torch.autograd.grad(y, [*inputs, *experts.parameters()], d_y)


@pytest.mark.parametrize("pair", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize("sizes", [(1, 3, 5), (33, 34, 47), (2500, 70, 40), (150, 40, 1100)])
def test_the_expert_layer_equals_the_loop_in_float64(pair: tuple[str, str], sizes: tuple[int, int, int]) -> None:
    """One row; ragged tiles; more rows than a block of a sum takes; a deeper sum than a block."""
    torch.manual_seed(0)
    tokens, width, hidden = sizes
    kind, weight_kind = (getattr(torch, name) for name in pair)
    x = torch.randn(tokens, width).to(kind)
    weights = tuple(
        (torch.randn(shape) / shape[1] ** 0.5).to(weight_kind) for shape in ((3, width, 2 * hidden), (3, hidden, width))
    )
    expert_TK = torch.stack([torch.full((tokens,), 1), torch.arange(tokens) % 3 + 1], 1)  # 0 is idle, 3 means unused
    expert_TK[expert_TK[:, 1] == 1, 1] = 3
    weight_TK = torch.rand(tokens, 2)
    mine = expert_layer("fused", x, weight_TK, expert_TK, weights)
    right = expert_layer("loop", x.double(), weight_TK.double(), expert_TK, tuple(w.double() for w in weights))
    for got, wanted in zip(mine, right, strict=True):
        error = float((got.double() - wanted).norm() / wanted.norm())
        assert error < (2e-6 if kind == torch.float32 else 0.015)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_expert_layer_does_not_depend_on_threads(dtype: torch.dtype) -> None:
    x, weights = torch.randn(700, 24).to(dtype), (torch.randn(4, 24, 80), torch.randn(4, 40, 24))
    weight_TK, expert_TK = torch.rand(700, 2), torch.rand(700, 4).argsort()[:, :2]
    before, results = torch.get_num_threads(), []
    for threads in (1, 3, 3):
        torch.set_num_threads(threads)
        results.append(expert_layer("fused", x, weight_TK, expert_TK, weights))
    torch.set_num_threads(before)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[1], results[2]))


def test_not_a_number_stays_visible() -> None:
    x, weights = torch.tensor([[1.0], [torch.nan]]), (torch.full((2, 1, 2), 1e30), torch.ones(2, 1, 1))
    y, *_ = expert_layer("fused", x, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64), weights)
    assert y[0].isinf()
    assert y[1].isnan()
    logits = torch.tensor([[0.0, torch.nan]])
    loss = torch.empty(1)
    cpu.cross_entropy_(logits, torch.tensor([0]), loss, 1.0)
    assert loss.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", [False, True])
def test_turning_equals_torchs_arithmetic(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, cut: bool) -> None:
    rotary = Rotary(RopeSpec(), 6)
    x = torch.randn(2, 5, 3, 8 if cut else 6).to(dtype)[..., :6].transpose(1, 2).requires_grad_()
    angles, d_y = rotary.angles(3, 5), torch.randn(2, 5, 3, 6).to(dtype).transpose(1, 2)
    mine = rotary(x, angles)
    (d_mine,) = torch.autograd.grad(mine, x, d_y)
    monkeypatch.setattr(cpu, "usable", lambda *tensors: False)
    right = rotary(x, angles)
    (d_right,) = torch.autograd.grad(right, x, d_y)
    assert mine.is_contiguous()
    torch.testing.assert_close(mine, right, **TOLERANCE[dtype])
    torch.testing.assert_close(d_mine, d_right, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_causal_attention_equals_torchs(dtype: torch.dtype, groups: int) -> None:
    q = torch.randn(2, 13, 4, 8).to(dtype).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(2, 13, groups, 8).to(dtype).transpose(1, 2).requires_grad_() for _ in range(2))
    d_y = torch.randn(2, 4, 13, 8).to(dtype)
    mine = torch.autograd.grad(causal_attention(q, k, v, None), (q, k, v), d_y)
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups != 4)
    torch.testing.assert_close(
        causal_attention(q, k, v, None), whole, rtol=0.02, atol=0.02 if dtype == torch.bfloat16 else 1e-6
    )
    for grad, right in zip(mine, torch.autograd.grad(whole, (q, k, v), d_y), strict=True):
        torch.testing.assert_close(grad, right, rtol=0.02, atol=0.04 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_loss_equals_the_loss_of_the_logits(dtype: torch.dtype) -> None:
    x = torch.randn(2050, 8).to(dtype).requires_grad_()  # more than two chunks
    weight, target = torch.randn(30, 8, requires_grad=True), torch.randint(0, 30, (2050,))
    loss = head_loss(x, weight, target)
    right = F.cross_entropy(F.linear(x, weight.to(dtype)).float(), target)
    assert float(loss.detach()) == pytest.approx(float(right.detach()), rel=1e-5)
    grads = [torch.autograd.grad(2 * out, (x, weight)) for out in (loss, right)]
    for mine, wanted in zip(*grads, strict=True):
        assert float((mine - wanted).float().norm() / wanted.float().norm()) < (
            0.01 if dtype == torch.bfloat16 else 1e-5
        )


def test_without_a_compiler_the_reason_is_said() -> None:
    ask = "from moestro.nn.kernels import cpu; import sys; sys.exit(cpu.library() is not None or cpu.why_not() != {!r})"
    cases = {
        "no C++ compiler found; install g++ to get them": {"CXX": "absent-compiler", "PATH": "/nonexistent"},
        "MOESTRO_CPU_KERNELS is off": {"MOESTRO_CPU_KERNELS": "off"},
    }
    for reason, changes in cases.items():
        command = [sys.executable, "-c", "import torch; " + ask.format(reason)]
        assert subprocess.run(command, env=os.environ | changes, check=False).returncode == 0, reason


def test_tensors_of_a_gpu_do_not_have_the_cpu_kernels_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: pytest.fail("built"))
    assert not cpu.usable(torch.empty(2, device="meta"))
