"""A training step's layers and routers never ask the device for a value: checked on tensors that have none.

Meta tensors take every branch that is not for CPUs, and whatever reads a value (item, boolean masks, bincount) raises.
Runs without a GPU; real kernels are checked on one by tests/nn/test_gpu_kernels.py.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from moestro.core.specs import AttentionSpec, ModelSpec, MoESpec, RouterSpec
from moestro.nn.decoder import Decoder
from moestro.nn.moe import MoE
from moestro.nn.permute import count_of
from moestro.nn.router import merge

ROUTERS: list[dict[str, Any]] = [
    {"rule": "gap"},
    {"rule": "topk", "z_loss": 0.1, "aux_scope": "sequence"},
    {"rule": "topk", "selection_bias": "loss_free", "score": "sigmoid", "aux_scope": "global"},
    {"rule": "relu"},
]


@pytest.fixture(autouse=True)
def without_values(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh tensors have a shape and no values."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know meta tensors
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    with torch.device("meta"):
        yield


def test_what_is_asked_for_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="item"):
        int(torch.ones(3).sum())


@pytest.mark.parametrize("path", ["grouped", "triton"])
@pytest.mark.parametrize("fields", ROUTERS, ids=lambda fields: fields["rule"])
def test_a_layer_and_its_router_ask_for_nothing(path: Any, fields: dict[str, Any]) -> None:
    if path == "triton":
        pytest.importorskip("triton")
    layer = MoE(64, MoESpec(num_experts=4, expert_width=64, router=RouterSpec(**fields)), path)
    x_BSD = torch.randn(2, 8, 64, dtype=torch.bfloat16, requires_grad=True)
    y_BSD, record = layer(x_BSD)
    (y_BSD.float().square().mean() + record.loss).backward()
    layer.router.count_micro_batch(record)
    layer.router.update(merge([record, record]), progress=0.5)
    assert x_BSD.grad is not None
    assert x_BSD.grad.shape == x_BSD.shape


def test_a_whole_model_asks_for_nothing() -> None:
    pytest.importorskip("triton")
    moe = MoESpec(num_experts=4, expert_width=64)
    attention = AttentionSpec(num_heads=2, qk_norm="head")
    model = Decoder(ModelSpec(num_layers=2, width=64, vocab_size=64, attention=attention, moe=moe))
    for block in model.blocks:
        assert isinstance(block.feed_forward, MoE)
        block.feed_forward.path = "triton"
    loss, records = model.loss(torch.zeros(2, 17, dtype=torch.int64))
    sum((record.loss for record in records), start=loss).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
    assert model.embedding.weight.grad is not None


def test_counting_without_asking_is_counting() -> None:
    index = torch.randint(5, (40,), device="cpu")
    counted = torch.zeros(7, dtype=torch.int64, device="cpu").scatter_add_(0, index, torch.ones_like(index))
    assert torch.equal(counted, torch.bincount(index, minlength=7))
    assert count_of(torch.zeros(40, dtype=torch.int64), 7).shape == (7,)
