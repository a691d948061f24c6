"""Products in 8 bits equal plain torch's (nn/fp8_reference.py); in the interpreter where there is no GPU."""

import pytest
import torch
from torch import Tensor

GPU = torch.cuda.is_available()
pytest.importorskip("triton")

from moestro.nn.fp8_reference import Blocks, narrow_experts
from moestro.nn.kernels.gpu import launch_fp8
from moestro.nn.kernels.gpu.experts import sort_tiles, triton_experts
from moestro.nn.permute import sort_by_expert

pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning"),
    pytest.mark.skipif(GPU and torch.cuda.get_device_capability() < (8, 9), reason="no products in 8 bits"),
]
DEVICE = "cuda" if GPU else "cpu"
NEAR = 0.01 if GPU else 3e-5
"""A GPU's division is not rounded exactly: here and there an 8-bit number is its neighbour."""
E, D, WIDE = 2, 256, 256


def whole(scaled: launch_fp8.Scaled, high: int) -> Tensor:
    """The numbers that 8 bits and scales stand for; a scale is for `high` rows and 128 columns."""
    scale = scaled.scale.repeat_interleave(128, -1)
    return scaled.value.float() * (scale.repeat_interleave(high, -2) if high > 1 else scale)


def apart(found: Tensor, right: Tensor) -> float:
    return float((found - right).detach().norm() / right.detach().norm())


@pytest.mark.parametrize("size", [1e-15, 1e-3, 1e5])
def test_quantising_is_the_reference_bit_for_bit(size: float) -> None:
    sort_tiles(torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), 1)  # the interpreter is repaired
    torch.manual_seed(0)
    x = size * torch.randn(37, 256, device=DEVICE) * torch.randn(37, 256, device=DEVICE).exp()
    w = size * torch.randn(E, D, WIDE, device=DEVICE)
    x[3] = 0
    pairs = [(whole(launch_fp8.quantise_rows(x), 1), Blocks()(x))]
    pairs += [(whole(launch_fp8.quantise_weight(w, False), 128), Blocks(128, 128)(w))]
    pairs += [(whole(launch_fp8.quantise_weight(w, True), 128).mT, Blocks(128, 128)(w))]
    for found, right in pairs:
        assert apart(found, right) < NEAR if GPU else torch.equal(found, right)


def case(tokens: int = 9) -> tuple[Tensor, ...]:
    """x, d_y, both weights, chosen experts and their weights."""
    torch.manual_seed(0)
    x, d_y = (torch.randn(tokens, D, device=DEVICE) for _ in range(2))
    weights = [torch.randn(size, device=DEVICE) / 16 for size in ((E, D, 2 * WIDE), (E, WIDE, D))]
    expert = torch.tensor([[0, 1], [1, E], [0, E]] * 3, device=DEVICE)[:tokens]
    return x, d_y, *weights, expert, torch.rand(tokens, 2, device=DEVICE)


def test_the_first_product_adds_up_blocks_with_their_scales() -> None:
    x, _, gate_up, _, expert, share = case()
    tiles = sort_tiles(expert, E)
    rows, weight = launch_fp8.quantise_rows(x), launch_fp8.quantise_weight(gate_up, turn=True)
    product = launch_fp8.gate_up_act(rows, share, tiles, weight, torch.float32, True)[1]
    used = int(tiles.offset_X[E])
    source = tiles.source_A[:used].long()
    narrow_x, narrow_w = whole(rows, 1)[source // 2], whole(weight, 128)[expert.flatten()[source]]
    torch.testing.assert_close(product[:used], torch.einsum("nd,nfd->nf", narrow_x, narrow_w), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["product", "input"])
def test_a_layer_in_8_bits_and_all_its_gradients_are_the_reference(keep: str) -> None:
    x, d_y, gate_up, down, expert, share = case()
    share *= expert < E
    found = []
    for kernels in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, share, gate_up, down)]
        if kernels:
            y = triton_experts(leaves[0], leaves[1], sort_tiles(expert, E), leaves[2], leaves[3], keep, eight=True)
        else:
            order = sort_by_expert(expert, E)
            y = narrow_experts(leaves[0], leaves[1], order, leaves[2], leaves[3])
        found.append([y, *torch.autograd.grad(y, leaves, d_y)])
    for mine, right in zip(*found, strict=True):
        assert apart(mine, right) < NEAR
