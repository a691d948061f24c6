"""Held-out loss of a small model whose experts multiply in 8 bits, against 16 bits, beside what rounding alone does.

    python benchmarks/fp8_loss.py [--seeds 3] [--steps 300] [--only NAME ...] [--routers NAME ...] [--jobs 1]
                                  [--folder runs/fp8-loss] [--out benchmarks/results/fp8_loss.json]

No GPU: the arithmetic of the Triton kernels in plain torch (moestro/nn/fp8_reference.py; tests/nn/test_gpu_fp8.py
compares them). Both products of the forward pass and of the input's gradient are in 8 bits; what is kept, weights'
gradients and everything outside the experts stay in bf16. Runs are compared seed by seed: the same weights at first,
the same batches. Two ways to compute in 16 bits that differ by rounding show how far apart runs end anyway, worse ways
to use 8 bits whether the measurement can tell. Says nothing about speed.

Runs have one thread each, --jobs at a time, and are kept in --folder: one that is there is not repeated. Prints a table
of all that are there, then one JSON line; --out gets the same.
"""

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from moestro.core.config import build, with_overrides
from moestro.nn.experts import AnyExperts, Experts
from moestro.nn.experts import Path as ExpertPath
from moestro.nn.fp8_reference import Blocks, Narrowing, narrow_experts
from moestro.nn.kernels.gpu import BLOCK_FP8
from moestro.nn.moe import MoE
from moestro.nn.permute import sort_by_expert
from moestro.nn.routing_rules import Choice
from moestro.train.data import TokenData, open_data, prepare
from moestro.train.device import environment
from moestro.train.evaluate import evaluate
from moestro.train.recipe import Recipe
from moestro.train.trainer import Trainer

ROOT = Path(__file__).parents[1]
BASE: dict[str, Any] = {
    "data": {"source": "stdlib", "tokenizer": "bpe:2048"},
    "model": {
        "num_layers": 2,
        "width": 256,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": "head"},
        "moe": {"num_experts": 8, "expert_width": 256},
    },
    "train": {"length": 128, "sequences": 8, "precision": "bf16", "threads": 1, "evaluate_every": 0},
    "optimizer": {"lr": 5e-4, "warmup_steps": 40, "decay_share": 0.4},
}
HELD_OUT = 512
"""Sequences that the loss is measured on."""
ROUTERS = {
    "top-2": ["model.moe.router.rule=top2", "model.moe.router.weights=renormalise"],
    "gap 1.35": ["model.moe.router.rule=gap", "model.moe.router.mean_experts=1.35"],
}


class Unscaled(Blocks):
    """8 bits as they are."""

    def scaled(self, x_RC: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks.scaled with scales of 1."""
        largest = torch.finfo(self.kind).max
        whole = x_RC.float()[..., None, :, None, :]
        return whole.clamp(-largest, largest).to(self.kind), torch.ones(())


def in_all(rows: Any, weights: Any) -> Narrowing:
    """One way for everything that comes in rows, and one for weights."""
    return Narrowing(rows, rows, rows, rows, weights, weights)


EXACT, REPEAT, EIGHT = "16 bits", "16 bits, the product's kernels", "8 bits"
WAYS: dict[str, Narrowing | None] = {
    EXACT: in_all(Tensor.float, Tensor.float),
    REPEAT: None,
    EIGHT: Narrowing(),
    "8 bits, a scale per tensor": in_all(Blocks(0, 0), Blocks(0, 0)),
    "8 bits, e5m2": in_all(Blocks(kind=torch.float8_e5m2), Blocks(BLOCK_FP8, BLOCK_FP8, torch.float8_e5m2)),
    "8 bits, no scales": in_all(Unscaled(), Unscaled()),
}


class Tally:
    """Narrows, and counts the numbers that become zero, fall below what has all digits, or are too large."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks, self.numbers, self.zero, self.short, self.clipped = blocks, 0, 0, 0, 0

    def __call__(self, x_RC: Tensor) -> Tensor:
        """The blocks' result."""
        if x_RC.numel():
            (small, scale), kind = self.blocks.scaled(x_RC), torch.finfo(self.blocks.kind)
            before = x_RC.float().reshape(small.shape).abs()
            self.numbers += x_RC.numel()
            self.zero += int(((small == 0) & (before > 0)).sum())
            self.short += int(((small.float().abs() < kind.tiny) & (before > 0)).sum())
            self.clipped += int((before > scale * kind.max * 1.001).sum())
        return self.blocks(x_RC)

    def shares(self) -> list[float]:
        """Of all numbers: zero, short of digits (zero too), clipped."""
        return [count / max(self.numbers, 1) for count in (self.zero, self.short, self.clipped)]


@dataclass(slots=True)
class Narrowed:
    """A dispatcher that computes experts in a way of narrowing."""

    way: Narrowing

    def __call__(self, x_TD: Tensor, choice: Choice, experts: AnyExperts, path: ExpertPath) -> Tensor:
        """The layer's output."""
        assert isinstance(experts, Experts)
        order = sort_by_expert(choice.expert_TK, experts.num_experts)
        return narrow_experts(x_TD, choice.weight_TK, order, experts.gate_up_EDF, experts.down_EFD, self.way)


def use(trainer: Trainer, way: Narrowing) -> None:
    """Let all sparse layers compute like this from now on."""
    for module in trainer.model.modules():
        if isinstance(module, MoE):
            module.dispatcher = Narrowed(way)


def tallied(trainer: Trainer, way: Narrowing) -> dict[str, list[float]]:
    """Shares of numbers, by operand, in one more step."""
    counted = {fact.name: Tally(getattr(way, fact.name)) for fact in fields(way)}
    use(trainer, Narrowing(**counted))
    trainer.run_step()
    return {name: tally.shares() for name, tally in counted.items()}


def run(name: str, router: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train and evaluate, or what is kept of it."""
    kept = folder / f"{name}, {router}, seed {seed}, {steps} steps.json".replace(" ", "-")
    settings = [f"seed={seed}", f"train.steps={steps}", *ROUTERS[router]]
    asked = {"base": BASE, "settings": settings, "held_out": HELD_OUT}
    if kept.exists() and (found := json.loads(kept.read_text()))["asked"] == asked:
        return dict(found)
    trainer = Trainer(build(Recipe, with_overrides(BASE, settings)), open_data(folder / "data"))
    way, data, begun_s = WAYS[name], open_data(folder / "data"), time.perf_counter()
    if way is not None:
        use(trainer, way)
    losses = [trainer.run_step().loss for _ in range(steps)]
    figures = {"asked": asked, "name": name, "router": router, "seed": seed, "steps": steps}
    figures |= {"bits_per_byte": held_out(trainer, data), "seconds": time.perf_counter() - begun_s, "losses": losses}
    if way is not None and isinstance(way.x, Blocks):
        use(trainer, in_all(Tensor.float, Tensor.float))
        figures["bits_per_byte_in_16_bits"] = held_out(trainer, data)
        figures["shares"] = tallied(trainer, way)
    kept.write_text(json.dumps(figures))
    print(f"{kept.stem}: {figures['bits_per_byte']:.4f} bits/byte, {figures['seconds']:.0f} s", flush=True)
    return figures


def kept_runs(folder: Path, steps: int) -> list[dict[str, Any]]:
    """All that are there of this model, measured like this, after so many steps."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [
        run
        for run in found
        if (run["asked"]["base"], run["asked"]["held_out"], run["steps"]) == (BASE, HELD_OUT, steps)
    ]


def held_out(trainer: Trainer, data: TokenData) -> float:
    """Bits per byte by the model as it computes now."""
    length = trainer.recipe.train.length
    return evaluate(trainer.model, data, length=length, limit=HELD_OUT, dtype=trainer.dtype).bits_per_byte


def unigram_bits(data: TokenData) -> float:
    """Bits per byte of held-out text by how often tokens occur in training."""
    size = data.tokenizer.vocab_size
    seen_V = 1 + np.bincount(np.asarray(data.train.token_N, dtype=np.int64), minlength=size)
    bits_V = -np.log2(seen_V / seen_V.sum())
    return float(bits_V[np.asarray(data.heldout.token_N, dtype=np.int64)].sum() / data.heldout.text_bytes)


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every way and router; differences are by seed."""
    exact = {(run["router"], run["seed"]): run["bits_per_byte"] for run in runs if run["name"] == EXACT}
    rows = []
    for router in ROUTERS:
        for name in WAYS:
            mine = [run for run in runs if (run["name"], run["router"]) == (name, router)]
            mine = [run for run in mine if (router, run["seed"]) in exact]
            if not mine:
                continue
            over = [100 * (run["bits_per_byte"] / exact[router, run["seed"]] - 1) for run in mine]
            shares = [run["shares"] for run in mine if "shares" in run]
            rows.append(
                {
                    "name": name, "router": router, "seeds": [run["seed"] for run in mine],
                    "bits_per_byte": [run["bits_per_byte"] for run in mine],
                    "bits_per_byte_in_16_bits": [run.get("bits_per_byte_in_16_bits") for run in mine],
                    "over_percent": over, "mean_percent": statistics.mean(over),
                    "stdev_percent": statistics.stdev(over) if len(over) > 1 else None,
                    "shares": {
                        operand: [statistics.mean(values) for values in zip(*(s[operand] for s in shares), strict=True)]
                        for operand in (shares[0] if shares else ())
                    },
                }
            )  # fmt: skip
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Losses; under each way in 8 bits what becomes of its numbers."""
    for row in rows:
        print(
            f"{row['router']:9s} {row['name']:32s} {statistics.mean(row['bits_per_byte']):.4f} bits/byte "
            f"{row['mean_percent']:+7.2f} ± {row['stdev_percent'] or 0:.2f} %  ({len(row['seeds'])} seeds)"
        )
        for operand, (zero, short, clipped) in row["shares"].items():
            print(f"{'':12s}{operand:10s} zero {zero:9.4%}   fewer digits {short:9.4%}   clipped {clipped:9.4%}")


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="*", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--routers", nargs="*", choices=[*ROUTERS], default=[*ROUTERS])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/fp8-loss")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    if not (options.folder / "data").exists():
        prepare(build(Recipe, with_overrides(BASE, ["train.steps=1"])).data, options.folder / "data")
    asked = [
        (name, router, seed, options.steps, options.folder)
        for seed in range(options.seeds)
        for router in options.routers
        for name in options.only
    ]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for ended in [pool.submit(run, *job) for job in asked]:
            ended.result()
    rows = table(kept_runs(options.folder, options.steps))
    print_table(rows)
    data = open_data(options.folder / "data")
    result = {
        "bench": "fp8_loss", "date": time.strftime("%Y-%m-%d"), "environment": environment(torch.device("cpu")),
        "base": BASE, "steps": options.steps, "unigram_bits_per_byte": unigram_bits(data), "rows": rows,
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
