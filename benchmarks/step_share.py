"""Where a whole training step's time goes: matrix products, attention, and everything else.

    python benchmarks/step_share.py [--steps 6]

A model of width 512 (4 layers, 16 experts of 1024, 4096 tokens a step, vocabulary 4096) on random tokens, fp32 and
bf16, K = 2 and mean K = 1.35. Times come from torch's profiler: the time each operation spends in itself; whatever the
profiler cannot see (Python between operations) counts as `everything else`, as wall-clock minus the sum. The experts'
kernel counts the time inside its products itself, summed over threads; its SwiGLU, gathers, packing and conversions
are `everything else`.

Prints a table, then one JSON line.
"""

import argparse
import json
import os
import time
from collections import Counter

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from moe_layer import cpu_name
from torch.profiler import ProfilerActivity, profile

from moestro.core.config import build
from moestro.core.tokens import ByteTokenizer
from moestro.nn.kernels import cpu
from moestro.train.data import TokenData, TokenFile
from moestro.train.recipe import Recipe
from moestro.train.trainer import Trainer

PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::_grouped_mm", "aten::grouped_mm")
ATTENTION = ("CausalAttention", "CausalAttentionBackward", "aten::_scaled_dot_product_flash_attention_for_cpu",
             "aten::_scaled_dot_product_flash_attention_for_cpu_backward")  # fmt: skip
EXPERTS = ("FusedExperts", "FusedExpertsBackward")

WARM_UP = 12
"""Steps until the C library reuses all memory of the step before; until then fresh pages are zeroed, at 0.4 ms each."""


def trainer(precision: str, mean_experts: float) -> Trainer:
    """The benchmark's model on random tokens."""
    table = {
        "model": {
            "num_layers": 4,
            "width": 512,
            "vocab_size": 4096,
            "attention": {"num_heads": 8, "num_kv_heads": 4, "qk_norm": "head"},
            "moe": {
                "num_experts": 16,
                "expert_width": 1024,
                "router": {"mean_experts": mean_experts, "start_experts": mean_experts, "anneal_share": 0.0},
            },
        },
        "train": {"steps": 100, "length": 256, "sequences": 16, "precision": precision},
    }
    token_N = np.random.default_rng(0).integers(0, 4096, 400_000).astype(np.uint16)
    tokens = TokenFile(token_N, len(token_N), ["random"], [0])
    return Trainer(build(Recipe, table), TokenData(tokens, tokens, ByteTokenizer(), {}))


def shares(made: Trainer, steps: int) -> dict[str, float]:
    """Milliseconds per step by kind, and the largest of everything else."""
    for _ in range(WARM_UP):
        made.run_step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        begun_s, multiplied_s = time.perf_counter(), cpu.multiplied_s()
        for _ in range(steps):
            made.run_step()
        wall_ms = 1e3 * (time.perf_counter() - begun_s) / steps
        experts_ms = 1e3 * (cpu.multiplied_s() - multiplied_s) / steps / torch.get_num_threads()
    own: Counter[str] = Counter()
    for event in seen.key_averages():
        own[event.key] += event.self_cpu_time_total / 1e3 / steps
    products = sum(own[name] for name in PRODUCTS) + experts_ms
    around = 1 - experts_ms / max(sum(own[name] for name in EXPERTS), 1e-9)
    for name in EXPERTS:
        own[name] *= around
    attention = sum(own[name] for name in ATTENTION)
    others = Counter({name: ms for name, ms in own.items() if name not in PRODUCTS + ATTENTION})
    found = {"step": wall_ms, "products": products, "attention": attention, "else": wall_ms - products - attention}
    return found | {f"else: {name}": ms for name, ms in others.most_common(8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--precision", default="fp32,bf16")
    options = parser.parse_args()
    rows = []
    for precision in options.precision.split(","):
        for mean_experts in (2.0, 1.35):
            found = shares(trainer(precision, mean_experts), options.steps)
            rows.append({"precision": precision, "k": mean_experts, "ms": {k: round(v, 1) for k, v in found.items()}})
            print(f"\n{precision}, mean K = {mean_experts}")
            for name, value in found.items():
                print(f"  {name:42s} {value:8.1f} ms  {value / found['step']:6.1%}")
    facts = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"bench": "step_share", "date": time.strftime("%Y-%m-%d"), **facts, "rows": rows}))


if __name__ == "__main__":
    main()
