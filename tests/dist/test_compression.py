"""`dist.compression`: what comes out is near the sum, what is left out comes later, and bytes are what they should be."""

import pytest
import torch
from torch import Tensor

from moestro.dist.compression import BLOCK, TopK, make, methods_by_tensor, ring_bytes
from moestro.dist.layout import Layout
from moestro.dist.mesh import Axis, Mesh
from moestro.dist.spec import DistSpec
from moestro.dist.testing import run_on_ranks

SHAPES = [torch.Size([32, 24]), torch.Size([40])]
NUMBERS = sum(shape.numel() for shape in SHAPES)


def dp() -> Axis:
    return Mesh(Layout(dp_shard=4), torch.device("cpu"))["dp"]


def gradient(rank: int, step: int) -> Tensor:
    draw = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(NUMBERS, generator=draw)


def summed(method: str, steps: int, constant: bool) -> tuple[Tensor, Tensor, float]:
    """Sums of all steps, got and wanted, and the bytes sent."""
    axis = dp()
    compressor = make(method, DistSpec(density=0.05), axis)
    got, wanted = torch.zeros(NUMBERS), torch.zeros(NUMBERS)
    for step in range(steps):
        which = 0 if constant else step
        got += compressor.sum(gradient(axis.index, which), SHAPES)
        wanted += torch.stack([gradient(rank, which) for rank in range(4)]).sum(0)
    return got, wanted, compressor.sent_bytes


@pytest.mark.parametrize(("method", "error"), [("none", 1e-6), ("bf16", 0.01), ("fp16", 0.002), ("int8", 0.02)])
def test_dense_codes_are_near_the_sum_on_every_rank_alike(method: str, error: float) -> None:
    results = run_on_ranks(summed, method, 1, False, ranks=4)
    for got, wanted, _ in results:
        assert float((got - wanted).norm() / wanted.norm()) < error
        assert torch.equal(got, results[0][0])


@pytest.mark.parametrize("method", ["int8", "topk", "sign", "powersgd"])
def test_what_was_left_out_is_sent_later(method: str) -> None:
    """Of a gradient that stays the same, the mean over many steps comes out right: nothing is lost, only late."""
    few, many = (run_on_ranks(summed, method, steps, True, ranks=4)[0] for steps in (1, 60))
    errors = [float((got - wanted).norm() / wanted.norm()) for got, wanted, _ in (few, many)]
    assert errors[1] < 0.35
    assert errors[1] < errors[0] / 2 or errors[0] < 0.01


def low_rank_bytes(shape: torch.Size) -> float:
    """Sent in a step after PowerSGD's warm-up."""
    axis = dp()
    compressor = make("powersgd", DistSpec(powersgd_rank=2), axis)
    draw = torch.Generator().manual_seed(axis.index)
    before = 0.0
    for _ in range(3):
        before = compressor.sent_bytes
        compressor.sum(torch.randn(shape.numel(), generator=draw), [shape])
    return compressor.sent_bytes - before


def test_experts_are_factored_as_one_tall_matrix() -> None:
    factors = 2 * (4 * 16 + 24)
    assert run_on_ranks(low_rank_bytes, torch.Size([4, 16, 24]), ranks=4)[0] == ring_bytes(4 * factors, 4)


def test_bytes_are_counted_as_sent() -> None:
    sent = {method: run_on_ranks(summed, method, 1, False, ranks=4)[0][2] for method in ("none", "bf16", "int8", "topk")}
    padded = -(-NUMBERS // (4 * BLOCK)) * 4 * BLOCK
    assert sent["none"] == ring_bytes(4 * NUMBERS, 4) == 1.5 * 4 * NUMBERS
    assert sent["bf16"] == 1.5 * 2 * padded
    assert sent["int8"] == 1.5 * (padded + 4 * padded / BLOCK)
    assert sent["topk"] == 3 * sum(round(0.05 * shape.numel()) for shape in SHAPES) * (4 + 2)


def test_top_k_sends_the_largest() -> None:
    coder = TopK(Axis("dp", (0,), 0), density=0.25)
    codes = coder.encode(torch.tensor([1.0, -8.0, 2.0, 0.5]), [torch.Size([4])])
    assert coder.decode(codes, 4).tolist() == [0, -8, 0, 0]


def test_top_k_sends_the_largest_of_every_tensor() -> None:
    coder = TopK(Axis("dp", (0,), 0), density=0.5)
    codes = coder.encode(torch.tensor([9.0, 8.0, 0.1, -0.2]), [torch.Size([2]), torch.Size([1, 2])])
    assert coder.decode(codes, 4).tolist() == pytest.approx([9, 0, 0, -0.2], rel=0.01)


def test_routers_and_norms_stay_exact_and_small_tensors_are_compressed_less() -> None:
    sizes = {
        "blocks.0.feed_forward.router.weight_ED": 64,
        "norm.scale_D": 8,
        "blocks.0.feed_forward.experts.gate_up_EDF": 9000,
        "blocks.0.attention.q.weight": 500,
    }
    plain = methods_by_tensor(sizes, DistSpec(compression="topk"))
    assert list(plain.values()).count("none") == 2
    assert plain["blocks.0.attention.q.weight"] == "topk"
    graded = methods_by_tensor(sizes, DistSpec(compression="topk", layerwise=True))
    assert graded["blocks.0.attention.q.weight"] == "int8"
    assert graded["blocks.0.feed_forward.experts.gate_up_EDF"] == "topk"
