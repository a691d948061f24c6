"""Products in 8 bits: exact on numbers that 8 bits hold, close on others; in the interpreter where there is no GPU."""

import pytest
import torch
from torch import Tensor

GPU = torch.cuda.is_available()
pytest.importorskip("triton")

from moestro.nn.kernels.gpu import launch_fp8
from moestro.nn.kernels.gpu.experts import sort_tiles, triton_experts

pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning"),
    pytest.mark.skipif(GPU and torch.cuda.get_device_capability() < (8, 9), reason="no products in 8 bits"),
]
DEVICE = "cuda" if GPU else "cpu"
E, D, WIDE = 2, 128, 256


def whole(scaled: launch_fp8.Scaled, high: int) -> Tensor:
    """The numbers that 8 bits and scales stand for; a scale is for `high` rows and 128 columns."""
    scale = scaled.scale.repeat_interleave(128, -1)
    return scaled.value.float() * (scale.repeat_interleave(high, -2) if high > 1 else scale)


def test_quantising_keeps_three_binary_digits_and_each_blocks_largest() -> None:
    sort_tiles(torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), 1)  # the interpreter is repaired
    x = torch.randn(5, 256, device=DEVICE) * torch.tensor([[1e-3], [1.0], [1e3], [0.0], [1.0]], device=DEVICE)
    found = whole(launch_fp8.quantise_rows(x), 1)
    largest = x.view(5, 2, 128).abs().amax(-1, keepdim=True).expand(5, 2, 128).reshape(5, 256)
    near = (found - x).abs() <= x.abs() / (16 if GPU else 8) + largest / 448
    assert near.float().mean() >= (1.0 if GPU else 0.9)  # the interpreter loses a carry where it rounds up to 2^n
    torch.testing.assert_close(found.view(5, 2, 128).abs().amax(-1), x.view(5, 2, 128).abs().amax(-1))
    w = torch.randn(E, D, WIDE, device=DEVICE)
    for turn in (True, False):
        back = whole(launch_fp8.quantise_weight(w, turn), 128)
        assert float(((back.mT if turn else back) - w).norm() / w.norm()) < (0.04 if GPU else 0.15)


def case(tokens: int = 9) -> tuple[Tensor, ...]:
    """Small whole numbers, or sixteenths: 8 bits hold them."""
    torch.manual_seed(0)
    x, d_y = (torch.randint(-2, 3, (tokens, D), device=DEVICE).float() for _ in range(2))
    weights = [torch.randint(-1, 2, size, device=DEVICE).float() / 16 for size in ((E, D, 2 * WIDE), (E, WIDE, D))]
    expert = torch.tensor([[0, 1], [1, E], [0, E]] * 3, device=DEVICE)[:tokens]
    return x, d_y, *weights, expert, torch.rand(tokens, 2, device=DEVICE)


def scaled_by_2(exact: Tensor) -> launch_fp8.Scaled:
    """Half the numbers, and scales of 2."""
    blocks = [size // 128 if place else size for place, size in enumerate(exact.shape)]
    return launch_fp8.Scaled((exact / 2).to(torch.float8_e4m3fn), torch.full(blocks, 2.0, device=exact.device))


def test_the_first_product_is_exact_where_numbers_fit() -> None:
    x, _, gate_up, _, expert, share = case()
    tiles = sort_tiles(expert, E)
    rows, weight = scaled_by_2(x), scaled_by_2(gate_up.mT.contiguous())
    product = launch_fp8.gate_up_act(rows, share, tiles, weight, torch.float32, True)[1]
    used = int(tiles.offset_X[E])
    source = tiles.source_A[:used].long()
    right = torch.einsum("nd,ndf->nf", x[source // 2], gate_up[expert.flatten()[source]])
    torch.testing.assert_close(product[:used], right, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["product", "input"])
def test_a_layer_in_8_bits_is_close_and_its_weights_gradients_too(keep: str) -> None:
    x, d_y, gate_up, down, expert, share = case()
    found = []
    for eight in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, share, gate_up, down)]
        y = triton_experts(leaves[0], leaves[1], sort_tiles(expert, E), leaves[2], leaves[3], keep, eight)
        found.append([y, *torch.autograd.grad(y, leaves, d_y)])
    for plain, near in zip(*found, strict=True):
        assert 0 < float((near - plain).detach().norm() / plain.detach().norm()) < 0.12
