"""Two stages of `moe_layer_gpu.py`: routing alone, and whole training steps of a model of 1 B active parameters.

Model FLOP utilisation counts 6 FLOPs per active parameter and token, plus causal attention's products, over the bf16
rate of the vendor's data sheet (989 TFLOP/s for H100 SXM and H200); recomputation counts for nothing.
"""

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from moestro.core.config import build
from moestro.core.specs import RouterSpec
from moestro.core.tokens import ByteTokenizer
from moestro.nn.router import Router
from moestro.train.data import TokenData, TokenFile
from moestro.train.recipe import Recipe
from moestro.train.trainer import Trainer

PEAK_FLOP_PER_S = 989e12
Say = Callable[[str], None]
ONE_BILLION = {
    "num_layers": 16, "width": 2048, "vocab_size": 32000,
    "attention": {"num_heads": 16, "num_kv_heads": 8, "qk_norm": "head"},
    "moe": {"num_experts": 24, "expert_width": 1024, "router": {"rule": "topk", "k": 8}},
}  # fmt: skip
"""1.1 B of 2.7 B parameters are used per token; weights, moments and gradients in float32 are 43 GB."""
TINY = {
    "num_layers": 2, "width": 32, "vocab_size": 512, "attention": {"num_heads": 2},
    "moe": {"num_experts": 4, "expert_width": 32, "router": {"rule": "topk", "k": 2}},
}  # fmt: skip


ROUTINGS = [(32768, 2048, 128, "topk", 8), (32768, 2048, 512, "topk", 10), (16384, 4096, 8, "topk", 2),
            (8192, 1024, 16, "gap", 2)]  # fmt: skip
"""Tokens, width, experts, rule, k."""


def route(tokens: int, width: int, experts: int, rule: Any, k: int, device: str, fused: bool) -> Callable[[], None]:
    """A router's forward and backward pass."""
    router = Router(width, experts, RouterSpec(rule=rule, k=k, z_loss=1e-3)).to(device)
    torch.nn.init.normal_(router.weight_ED, std=0.02)
    router.fused = fused
    x_TD = torch.randn(tokens, width, device=device, dtype=torch.bfloat16).requires_grad_()

    def run() -> None:
        choice, record = router(x_TD)
        (choice.weight_TK.sum() + record.loss).backward()

    return run


def time_routing(device: str, say: Say, clock: Callable[[list[Callable[[], Any]]], float]) -> list[dict[str, Any]]:
    """The router after its linear map, fused and in plain torch: forward and backward."""
    rows = []
    for case in [(64, 8, 4, "topk", 2)] if device == "cpu" else ROUTINGS:
        row: dict[str, Any] = dict(zip(("tokens", "width", "experts", "rule", "k"), case, strict=True))
        for fused in (False, True):
            row["fused_ms" if fused else "torch_ms"] = clock([route(*case, device, fused)] * 6)
        say(f"  routing {row}")
        rows.append(row)
    return rows


def make_trainer(device: str, parts: int) -> Trainer:
    """The model on random tokens; a step is cut into `parts`."""
    toy = device == "cpu"
    train = {
        "steps": 100,
        "length": 16 if toy else 2048,
        "sequences": 4 if toy else 16,
        "micro_batches": 1 if toy else parts,
    }
    table = {"model": TINY if toy else ONE_BILLION, "train": train | {"device": device}}
    token_N = np.random.default_rng(0).integers(0, 512 if toy else 32000, 2_000_000).astype(np.uint16)
    tokens = TokenFile(token_N, len(token_N), ["random"], [0])
    data = TokenData(tokens, tokens, ByteTokenizer(), {})
    return Trainer(build(Recipe, table), data, draw_on=torch.device(device))  # billions of weights, in no time


def warmed_trainer(device: str, parts: int) -> Trainer:
    """After steps that compile, measure paths and reach the allocator's size."""
    trainer = make_trainer(device, parts)
    for _ in range(3):
        trainer.run_step()
    return trainer


def largest_trainer(device: str, say: Say) -> Trainer:
    """With as few micro-batches as the card's memory allows: each costs a pass over all weights and gradients."""
    for parts in (4, 8, 16):
        try:
            return warmed_trainer(device, parts)
        except torch.OutOfMemoryError:
            say(f"  whole step: too little memory for {parts} micro-batches")
        gc.collect()  # outside of the handler, whose traceback holds the trainer that was too large
        torch.cuda.empty_cache()
    raise MemoryError("the 16-layer model does not fit")


def time_step(device: str, say: Say, steps: int) -> dict[str, Any]:
    """Seconds of a step and its share of the card's product rate."""
    trainer = largest_trainer(device, say)
    spec, train = trainer.model.spec, trainer.recipe.train
    if device == "cuda":
        torch.cuda.synchronize()
    begun_s = time.perf_counter()
    results = [trainer.run_step() for _ in range(steps)]
    if device == "cuda":
        torch.cuda.synchronize()
    step_s = (time.perf_counter() - begun_s) / steps
    head = spec.width // spec.attention.num_heads
    attention = 12 * spec.num_layers * spec.attention.num_heads * head * train.length / 2
    flops = (6 * trainer.active_parameters + attention) * train.tokens_per_step
    found = {
        "parameters": trainer.parameters, "active": round(trainer.active_parameters), "tokens": train.tokens_per_step,
        "micro_batches": train.micro_batches,
        "step_s": step_s, "tflop_per_s": flops / step_s / 1e12, "mfu": flops / step_s / PEAK_FLOP_PER_S,
        "parts_s": {name: getattr(results[-1], name) for name in ("data_s", "forward_s", "backward_s", "update_s")},
    }  # fmt: skip
    if device == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    say(
        f"\nwhole step: {found['active'] / 1e9:.2f} B of {found['parameters'] / 1e9:.2f} B parameters active, "
        f"{train.tokens_per_step} tokens: {step_s:.3f} s, {found['tflop_per_s']:.0f} TFLOP/s, "
        f"MFU {found['mfu']:.1%} (aim 40 %)"
    )
    return found
