"""Experts on 8 bits in plain torch: what rounds, what does not, and that scaling first changes nothing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moestro.core.specs import MoESpec
from moestro.nn.experts import Experts
from moestro.nn.fp8_reference import Blocks, Narrowing, narrow_experts
from moestro.nn.permute import sort_by_expert

E, D, WIDE = 3, 128, 256
EXACT = Narrowing(*[Tensor.float] * 6)


def case(tokens: int = 12) -> tuple[Experts, Tensor, Tensor, Tensor, Tensor]:
    """Experts of which the last is idle, x, chosen experts, weights and d_y."""
    torch.manual_seed(0)
    experts = Experts(D, MoESpec(num_experts=E, expert_width=WIDE))
    experts.initialise(0.1, 0.1)
    expert_TK = torch.tensor([[0, 1], [1, E], [E, E]]).repeat(4, 1)[:tokens]
    return experts, torch.randn(tokens, D), expert_TK, torch.rand(tokens, 2), torch.randn(tokens, D)


def gradients(way: Narrowing | None) -> list[Tensor]:
    """y, and d_x, d_weight, d_gate_up, d_down; by the loop where `way` is None."""
    experts, x_TD, expert_TK, weight_TK, d_y_TD = case()
    leaves = [x_TD.requires_grad_(), weight_TK.requires_grad_(), experts.gate_up_EDF, experts.down_EFD]
    order = sort_by_expert(expert_TK, E)
    y_TD = experts(x_TD, weight_TK, order) if way is None else narrow_experts(x_TD, weight_TK, order, *leaves[2:], way)
    return [y_TD.detach(), *torch.autograd.grad(y_TD, leaves, d_y_TD)]


def test_with_nothing_narrowed_it_is_the_loop() -> None:
    for mine, right in zip(gradients(EXACT), gradients(None), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


def test_eight_bits_are_near() -> None:
    for mine, right in zip(gradients(Narrowing()), gradients(None), strict=True):
        assert 0.01 < float((mine - right).norm() / right.norm()) < 0.1


@pytest.mark.parametrize(
    ("operand", "reaches"),
    [
        ("x", {"y", "d_x", "d_weight", "d_gate_up", "d_down"}),  # what is kept comes from the narrow product
        ("act", {"y"}),
        ("d_y", {"d_x", "d_weight", "d_gate_up"}),
        ("d_gate_up", {"d_x"}),
    ],
)
def test_an_operand_reaches_products_of_8_bits_and_no_gradient_of_weights(operand: str, reaches: set[str]) -> None:
    names = ("y", "d_x", "d_weight", "d_gate_up", "d_down")
    found = zip(names, gradients(replace(EXACT, **{operand: lambda x: 2 * x.float()})), gradients(EXACT), strict=True)
    assert {name for name, other, exact in found if not torch.equal(other, exact)} == reaches


def test_scaling_before_multiplying_equals_scaling_the_sums_of_blocks() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(5, 384), torch.randn(384, 256)
    (small_x, scale_x), (small_w, scale_w) = Blocks().scaled(x), Blocks(128, 128).scaled(w)
    total = torch.zeros(5, 2, 128)
    for k in range(3):  # as the kernels do: 128 of the sum, times both scales, added in float32
        part = torch.einsum("rk,kob->rob", small_x[:, 0, k].float(), small_w[k].float())
        total += part * scale_x[:, :, k] * scale_w[k]
    product = Blocks()(x) @ Blocks(128, 128)(w)
    assert float((product - total.view(5, 256)).norm() / product.norm()) < 3e-7
    assert float((product - x @ w).norm() / product.norm()) > 0.03


def test_a_block_has_its_own_scale_and_its_largest_number_stays() -> None:
    x = torch.full((2, 256), 1.0)
    x[0, 128:] = 1e-6
    x[0, 200] = 1e9
    narrow = Blocks()(x)
    torch.testing.assert_close(narrow[:, :128], x[:, :128])
    torch.testing.assert_close(narrow[1], x[1])
    assert narrow[0, 128:].nonzero().flatten().tolist() == [72]  # 1e-6 beside 1e9 is nothing
    torch.testing.assert_close(narrow[0, 200], x[0, 200])
    assert Blocks(0, 0)(x).nonzero().tolist() == [[0, 200]]  # one scale for all


def test_rows_that_are_zero_or_absent_pass() -> None:
    assert torch.equal(Blocks()(torch.zeros(3, 128)), torch.zeros(3, 128))
    assert Blocks()(torch.zeros(0, 128)).shape == (0, 128)
    experts, x_TD, _, weight_TK, _ = case()
    order = sort_by_expert(torch.full((12, 2), E), E)
    assert not narrow_experts(x_TD, weight_TK, order, experts.gate_up_EDF, experts.down_EFD).any()
