"""Held-out loss and bytes of every way to synchronise and compress, at equal tokens, against the synchronous run.

    python benchmarks/synchronise.py [--seeds 3] [--steps 240] [--ranks 2] [--out benchmarks/results/synchronise.json]

Forked gloo ranks on this machine, one thread each; the standard library's source in bytes. Prints a table, then one
JSON line. Bytes are those one rank sends for gradients or updates; token exchange between experts is not among them.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from moestro.core.config import build, with_overrides
from moestro.dist.layout import fit
from moestro.dist.testing import run_on_ranks
from moestro.train.data import open_data, prepare
from moestro.train.device import environment
from moestro.train.evaluate import evaluate
from moestro.train.ranks import Ranks
from moestro.train.recipe import Recipe
from moestro.train.trainer import Trainer

BASE: dict[str, Any] = {
    "model": {
        "num_layers": 2,
        "width": 64,
        "attention": {"num_heads": 4, "qk_norm": "head"},
        "moe": {"num_experts": 4, "expert_width": 96},
    },
    "train": {"steps": 240, "length": 64, "sequences": 8, "precision": "fp32", "evaluate_every": 0},
    "optimizer": {"lr": 3e-3, "warmup_steps": 20, "decay_share": 0.4},
}
MODES = {
    "synchronous": [],
    "top-k 1 %": ["dist.compression=topk"],
    "local, H = 20": ["dist.sync=local", "dist.sync_every=20"],
    "post-local, H = 20": ["dist.sync=local", "dist.sync_every=20", "dist.sync_after=40"],
    "DiLoCo, H = 20": ["dist.sync=diloco", "dist.sync_every=20"],
    "1-bit sign": ["dist.compression=sign"],
    "int8 per block": ["dist.compression=int8"],
    "local, H = 8, int8": ["dist.sync=local", "dist.sync_every=8", "dist.compression=int8"],
    "stale, S = 1": ["dist.sync=stale", "dist.staleness=1"],
    "stale, S = 4": ["dist.sync=stale", "dist.staleness=4"],
    "PowerSGD rank 4": ["dist.compression=powersgd"],
    "top-k 1 %, layer-wise": ["dist.compression=topk", "dist.layerwise=true"],
    "bf16": ["dist.compression=bf16"],
    "local, H = 8": ["dist.sync=local", "dist.sync_every=8"],
}


def recipe_for(settings: list[str], seed: int, steps: int, ranks: int) -> Recipe:
    """One run."""
    table = with_overrides(BASE, [f"seed={seed}", f"train.steps={steps}", "train.checkpoint_every=0", *settings])
    table["dist"] = table.get("dist", {}) | {"dp_replicate": ranks}
    return build(Recipe, table)


def held_out(recipe: Recipe, data: Path) -> tuple[float, float, float]:
    """(bits per byte, bytes sent, seconds) of a run, on one of its ranks."""
    engine = Ranks(fit(recipe.dist, torch.distributed.get_world_size()), torch.device("cpu"), recipe)
    tokens = open_data(data)
    trainer = Trainer(recipe, tokens, engine)
    begun_s = time.perf_counter()
    for _ in range(recipe.train.steps):
        trainer.run_step()
    seconds = time.perf_counter() - begun_s
    engine.meet()
    found = evaluate(trainer.model, tokens, length=recipe.train.length, limit=256, split=engine.split)
    return found.bits_per_byte, engine.sent_bytes, seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare(recipe_for([], 0, args.steps, args.ranks).data, data)
        for name, settings in MODES.items():
            runs = [
                run_on_ranks(
                    held_out, recipe_for(settings, seed, args.steps, args.ranks), data, ranks=args.ranks, timeout_s=900
                )[0]
                for seed in range(args.seeds)
            ]
            bits, sent, seconds = (statistics.mean(values) for values in zip(*runs, strict=True))
            spread = statistics.stdev(run[0] for run in runs) if len(runs) > 1 else 0.0
            first = rows[0] if rows else [name, bits, 0, sent]
            rows.append([name, bits, spread, sent, seconds])
            print(
                f"{name:24} {bits:.4f} +- {spread:.4f} bits/byte ({bits / first[1] - 1:+.2%})  "
                f"{sent / 1e6 / args.steps:8.4f} MB/step ({first[3] / sent:6.1f}x fewer)  {seconds:6.1f} s",
                flush=True,
            )
    columns = ["mode", "bits_per_byte", "stdev", "sent_bytes", "seconds"]
    result = {"bench": "synchronise", "columns": columns, "rows": rows, "steps": args.steps, "seeds": args.seeds}
    result |= {"ranks": args.ranks, "environment": environment(torch.device("cpu"))}
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
