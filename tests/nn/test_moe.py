"""The sparse layer: every path equals an obviously right loop over tokens, values and gradients, for any load."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.core.specs import MoESpec, RouterSpec
from moestro.nn.experts import Experts, LowRankExperts, Path
from moestro.nn.kernels import cpu
from moestro.nn.moe import MoE
from moestro.nn.routing_rules import Choice

needs_kernels = pytest.mark.skipif(cpu.library() is None, reason=cpu.why_not())
PATHS: list[Any] = ["loop", "grouped", pytest.param("fused", marks=needs_kernels)]
E, D, WIDE = 6, 16, 24


def layer(path: Path, **fields: Any) -> MoE:
    torch.manual_seed(0)
    made = MoE(D, MoESpec(num_experts=E, expert_width=WIDE, **fields), path)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3)
    return made


def token_by_token(x_TD: Tensor, choice: Choice, gate_up: Tensor, down: Tensor) -> Tensor:
    """y[t] = sum over chosen e of w_te * down_e(silu(gate_e x) * up_e x), written as it is read."""
    rows = []
    for x_D, experts, weights in zip(x_TD, choice.expert_TK.tolist(), choice.weight_TK, strict=True):
        y_D = 0 * x_D
        for expert, weight in zip(experts, weights, strict=True):
            if expert < E:
                gate, up = (x_D @ gate_up[expert]).chunk(2)
                y_D = y_D + weight.to(x_D.dtype) * (F.silu(gate) * up) @ down[expert]
        rows.append(y_D)
    return torch.stack(rows)


LOADS = {
    "even": torch.arange(40).view(20, 2) % E,
    "variable K": torch.where(torch.arange(40).view(20, 2) % 3 == 0, E, torch.arange(40).view(20, 2) % E),
    "one expert": torch.stack([torch.full((20,), 2), torch.full((20,), E)], 1),
    "idle experts and tokens": torch.where(torch.arange(20)[:, None] < 7, torch.tensor([[1, 4]]), E),
    "nothing": torch.full((20, 2), E),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("load", LOADS)
def test_paths_equal_the_loop_over_tokens(path: Path, load: str) -> None:
    made = layer(path)
    assert isinstance(made.experts, Experts)
    parameters = [made.experts.gate_up_EDF, made.experts.down_EFD]
    x_TD = torch.randn(20, D, requires_grad=True)
    weight_TK = torch.rand(20, 2, requires_grad=True)
    choice = Choice(LOADS[load], weight_TK * (LOADS[load] < E))
    upstream_TD = torch.randn(20, D)
    outs = [made.dispatcher(x_TD, choice, made.experts, path), token_by_token(x_TD, choice, *parameters)]
    leaves = [x_TD, weight_TK, *parameters]
    grads = [torch.autograd.grad(out, leaves, upstream_TD, retain_graph=True, allow_unused=True) for out in outs]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-6)
    for mine, right, leaf in zip(*grads, leaves, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(
            zero if mine is None else mine, zero if right is None else right, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("path", PATHS)
def test_recomputing_experts_keep_their_input_alone(path: Path) -> None:
    made, choice = layer(path), Choice(LOADS["even"], torch.rand(20, 2))
    x_TD = torch.randn(20, D, requires_grad=True)
    kept: list[list[int]] = []
    for made.experts.recompute in (False, True):
        kept.append([])

        def note(saved: Tensor) -> Tensor:
            if saved.dim() == 2 and len(saved) == 40:  # a row for every slot
                kept[-1].append(saved.shape[1])
            return saved

        with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
            made.dispatcher(x_TD, choice, made.experts, path)
    assert {WIDE, 2 * WIDE} & set(kept[0])
    assert kept[1] == []


@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_activations_with_float32_weights_stay_close(path: Path) -> None:
    exact, rounded = layer("loop"), layer(path)
    x_BSD = torch.randn(2, 32, D)
    y_BSD, _ = exact(x_BSD.bfloat16().float())
    near_BSD, _ = rounded(x_BSD.bfloat16())
    assert near_BSD.dtype == torch.bfloat16
    torch.testing.assert_close(near_BSD.float(), y_BSD, rtol=0.05, atol=0.05)
    near_BSD.float().square().mean().backward()
    y_BSD.square().mean().backward()
    for near, right in zip(rounded.parameters(), exact.parameters(), strict=True):
        assert near.grad is not None
        assert right.grad is not None
        assert float((near.grad - right.grad).norm() / right.grad.norm()) < 0.03


@needs_kernels
def test_the_fused_path_is_the_same_from_run_to_run() -> None:
    made, x_BSD = layer("fused"), torch.randn(2, 50, D)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        made.zero_grad()
        y_BSD, _ = made(x_BSD)
        y_BSD.square().sum().backward()
        results.append([y_BSD.detach(), *(p.grad.clone() for p in made.parameters() if p.grad is not None)])
    for again in results[2:]:
        assert all(torch.equal(left, right) for left, right in zip(results[1], again, strict=True))


@needs_kernels
def test_bfloat16_padding_leaks_nothing_between_experts() -> None:
    """Row counts that need padding: a NaN in one expert's weights must not reach tokens of another."""
    made = layer("fused")
    expert_TK = torch.tensor([[0]] * 33 + [[1]] * 5 + [[2]] * 70)
    choice = Choice(expert_TK, torch.ones(108, 1))
    with torch.no_grad():
        made.experts.gate_up_EDF[1] = torch.nan
    y_TD = made.dispatcher(torch.randn(108, D).bfloat16(), choice, made.experts, "fused")
    assert y_TD.isnan().any(-1).tolist() == [False] * 33 + [True] * 5 + [False] * 70


@pytest.mark.parametrize("path", ["loop", "grouped"])
def test_low_rank_experts_equal_experts_with_the_product_written_out(path: Path) -> None:
    made = layer(path, sharing="low_rank", sharing_rank=4)
    shared = made.experts
    assert isinstance(shared, LowRankExperts)
    gate_up = shared.gate_up_DF + shared.gate_up_a_EDR @ shared.gate_up_b_ERF
    down = shared.down_FD + shared.down_a_EFR @ shared.down_b_ERD
    x_BSD = torch.randn(2, 10, D)
    y_BSD, _ = made(x_BSD)
    choice, _ = made.router(x_BSD.flatten(0, 1))
    torch.testing.assert_close(
        y_BSD.flatten(0, 1), token_by_token(x_BSD.flatten(0, 1), choice, gate_up, down), rtol=1e-4, atol=1e-5
    )
    own, full = (
        sum(p.numel() for p in layer("loop", **kind).experts.parameters())
        for kind in ({"sharing": "low_rank", "sharing_rank": 1}, {})
    )
    assert own < full / 2


def test_the_shared_expert_serves_every_token() -> None:
    made = layer("loop", shared_width=12)
    assert made.shared is not None
    x_BSD = torch.randn(1, 7, D)
    both, _ = made(x_BSD)
    shared, made.shared = made.shared, None
    routed, _ = made(x_BSD)
    torch.testing.assert_close(both, routed + shared(x_BSD))


@pytest.mark.parametrize("rule", ["gap", "top2", "relu", "null"])
def test_a_layer_gives_its_record(rule: str) -> None:
    made = layer("loop", router=RouterSpec(rule=rule, num_null=3))  # type: ignore[arg-type]
    _, record = made(torch.randn(2, 9, D))
    assert record.tokens == 18
    assert record.experts_T.shape == (18,)


def test_auto_takes_what_the_tensors_allow() -> None:
    own, shared = layer("loop"), layer("loop", sharing="low_rank", sharing_rank=4)
    own.path = shared.path = "auto"
    x_TD = torch.randn(4, D)
    assert own.fastest_path(x_TD) == ("fused" if cpu.library() else "grouped")
    assert own.fastest_path(x_TD.double()) == "loop"
    assert shared.fastest_path(x_TD) == "grouped"
    assert shared.fastest_path(x_TD.bfloat16()) == "loop"  # rank 4 is 8 bytes: grouped_mm wants 16
