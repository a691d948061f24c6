"""The compiled CPU kernels equal their plain torch twins, and their absence is said, not hidden."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from moestro.core.specs import RopeSpec
from moestro.nn.experts import swiglu
from moestro.nn.kernels import cpu
from moestro.nn.kernels.causal_attention import causal_attention
from moestro.nn.kernels.fused_experts import padded_rows
from moestro.nn.kernels.head_loss import head_loss
from moestro.nn.rope import Rotary

pytestmark = pytest.mark.skipif(cpu.library() is None, reason=cpu.why_not())
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 0.02, "atol": 0.02}}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64])
def test_swiglu_and_its_gradient(dtype: torch.dtype, width: int) -> None:
    gate_up = (3 * torch.randn(9, 2 * width)).to(dtype).requires_grad_()
    weight = torch.rand(9, requires_grad=True)
    d_act = torch.randn(9, width).to(dtype)
    act, again, d_gate_up, d_weight = (
        torch.empty_like(d_act),
        torch.empty_like(d_act),
        torch.empty_like(gate_up),
        torch.empty(9),
    )
    cpu.swiglu(gate_up.detach(), weight.detach(), act)
    cpu.swiglu_backward(gate_up.detach(), weight.detach(), d_act, again, d_gate_up, d_weight)
    right = swiglu(gate_up, weight)
    right.backward(d_act)
    assert torch.equal(act, again)
    torch.testing.assert_close(act, right, **TOLERANCE[dtype])
    torch.testing.assert_close(d_gate_up, gate_up.grad, **TOLERANCE[dtype])
    torch.testing.assert_close(d_weight, weight.grad, rtol=0.05, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


def test_not_a_number_stays_visible() -> None:
    act = torch.empty(1, 2)
    cpu.swiglu(torch.tensor([[torch.nan, 1e30, 1.0, 1e30]]), torch.ones(1), act)
    assert act[0, 0].isnan()
    assert act[0, 1].isinf()
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
def test_converting_and_gathering(dtype: torch.dtype) -> None:
    x = torch.randn(7, 5).to(dtype)
    out, other = torch.full((4, 5), 9.0).to(dtype), torch.bfloat16 if dtype == torch.float32 else torch.float32
    cpu.gather(x, torch.tensor([6, 0, 6]), out)
    assert torch.equal(out, torch.cat([x[[6, 0, 6]], torch.zeros(1, 5).to(dtype)]))
    large = torch.cat([torch.randn(40_000), torch.tensor([torch.nan, torch.inf, 1 + 2**-8, 3 * 2**-9 + 1])]).to(dtype)
    converted = torch.empty_like(large, dtype=other)
    cpu.convert(large, converted)
    torch.testing.assert_close(converted, large.to(other), rtol=0, atol=0, equal_nan=True)


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


@pytest.mark.parametrize("size", [1, 8, 31, 33, 100, 1000, 4097])
def test_padding_is_small_and_shapes_are_few(size: int) -> None:
    assert size <= padded_rows(size) <= max(size + 7, size * 17 / 16)
    assert len({padded_rows(n) for n in range(1, 5000)}) < 140


def test_without_a_compiler_the_reason_is_said() -> None:
    ask = "from moestro.nn.kernels import cpu; import sys; sys.exit(cpu.library() is not None or cpu.why_not() != {!r})"
    cases = {
        "no C++ compiler found; install g++ to get them": {"CXX": "absent-compiler", "PATH": "/nonexistent"},
        "MOESTRO_CPU_KERNELS is off": {"MOESTRO_CPU_KERNELS": "off"},
    }
    for reason, changes in cases.items():
        command = [sys.executable, "-c", "import torch; " + ask.format(reason)]
        assert subprocess.run(command, env=os.environ | changes, check=False).returncode == 0, reason
