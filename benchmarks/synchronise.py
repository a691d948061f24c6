"""Held-out loss and bytes of every way to synchronise and compress, at equal tokens, against the synchronous run.

    python benchmarks/synchronise.py [--seeds 3] [--steps 480] [--modes NAME ...] [--link 50]
                                     [--out benchmarks/results/synchronise.json]

Forked gloo ranks on this machine, one thread each; the standard library's source in bytes. Bytes are those one rank
sends to other copies for gradients or updates; token exchange between experts is not among them. --out keeps every run
as soon as it has ended, and a run that is there already is not repeated. Seconds per step come from another few steps
between two hosts whose uplinks carry --link Mbit/s (lab.py: root and iproute2; without them, or with 0, they are left
out). Prints a table, then one JSON line.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from exchange import slowest_s
from lab import Host, Lab, missing

from moestro.core.config import build, with_overrides
from moestro.dist.layout import fit
from moestro.dist.testing import run_on_ranks
from moestro.train.data import open_data, prepare
from moestro.train.device import environment
from moestro.train.evaluate import evaluate
from moestro.train.ranks import Ranks
from moestro.train.recipe import Recipe
from moestro.train.trainer import Trainer

COPIES = 2
BASE: dict[str, Any] = {
    "model": {
        "num_layers": 1,
        "width": 64,
        "attention": {"num_heads": 4, "qk_norm": "head"},
        "moe": {"num_experts": 4, "expert_width": 96},
    },
    "train": {"steps": 480, "length": 64, "sequences": 8, "precision": "fp32", "evaluate_every": 0},
    "optimizer": {"lr": 3e-3, "warmup_steps": 40, "decay_share": 0.4},
}
MODES = {
    "synchronous": [],
    "local, H = 8, int8": ["dist.sync=local", "dist.sync_every=8", "dist.compression=int8"],
    "updates, top-k 1 %": ["dist.sync=local", "dist.sync_every=1", "dist.compression=topk"],
    "DiLoCo, H = 8, int8": [
        "dist.sync=diloco",
        "dist.sync_every=8",
        "dist.compression=int8",
        "dist.outer_momentum=0.5",
    ],
    "synchronous, rate x 1.4": ["optimizer.lr=4.2e-3"],
    "local, H = 8, int8, rate x 1.4": [
        "dist.sync=local",
        "dist.sync_every=8",
        "dist.compression=int8",
        "optimizer.lr=4.2e-3",
    ],
    "updates, top-k 1 %, rate x 1.4": [
        "dist.sync=local",
        "dist.sync_every=1",
        "dist.compression=topk",
        "optimizer.lr=4.2e-3",
    ],
    "top-k 1 %": ["dist.compression=topk"],
    "local, H = 8": ["dist.sync=local", "dist.sync_every=8"],
    "DiLoCo, H = 20": ["dist.sync=diloco", "dist.sync_every=20", "dist.outer_momentum=0.5"],
    "stale, S = 1": ["dist.sync=stale", "dist.staleness=1"],
    "int8 per block": ["dist.compression=int8"],
    "PowerSGD rank 4": ["dist.compression=powersgd"],
    "1-bit sign": ["dist.compression=sign"],
    "updates, 1-bit sign": ["dist.sync=local", "dist.sync_every=1", "dist.compression=sign"],
    "local, H = 20": ["dist.sync=local", "dist.sync_every=20"],
    "post-local, H = 20": ["dist.sync=local", "dist.sync_every=20", "dist.sync_after=120"],
    "stale, S = 4": ["dist.sync=stale", "dist.staleness=4"],
    "top-k 1 %, layer-wise": ["dist.compression=topk", "dist.layerwise=true"],
    "hybrid, 2 x 2, S = 1": ["dist.sync=hybrid", "dist.dp_shard=2"],
    "bf16": ["dist.compression=bf16"],
    "fp16": ["dist.compression=fp16"],
}


def recipe_for(settings: list[str], seed: int, steps: int, ranks: int) -> Recipe:
    """One run."""
    table = with_overrides(BASE, [f"seed={seed}", f"train.steps={steps}", "train.checkpoint_every=0", *settings])
    table["dist"] = table.get("dist", {}) | {"dp_replicate": ranks}
    return build(Recipe, table)


def ranks_of(recipe: Recipe) -> int:
    """Hybrid copies are several ranks."""
    return recipe.dist.dp_replicate * max(recipe.dist.dp_shard, 1)


def held_out(recipe: Recipe, data: Path) -> tuple[float, float, float]:
    """(bits per byte, bytes sent, seconds) of a run, the same on all its ranks."""
    engine = Ranks(fit(recipe.dist, dist.get_world_size()), torch.device("cpu"), recipe)
    tokens = open_data(data)
    trainer = Trainer(recipe, tokens, engine)
    begun_s = time.perf_counter()
    for _ in range(recipe.train.steps):
        trainer.run_step()
    seconds = time.perf_counter() - begun_s
    engine.meet()
    found = evaluate(trainer.model, tokens, length=recipe.train.length, limit=256, split=engine.split)
    inside = engine.sum_gradients.sent_bytes if engine.apart else 0.0  # of hybrid copies
    return found.bits_per_byte, engine.sent_bytes - inside, seconds


def step_s(recipe: Recipe, data: Path, steps: int) -> float:
    """Seconds per step of the slowest rank, over steps that are a whole number of meetings."""
    engine = Ranks(fit(recipe.dist, dist.get_world_size()), torch.device("cpu"), recipe)
    trainer = Trainer(recipe, open_data(data), engine)
    for _ in range(recipe.dist.sync_every):
        trainer.run_step()

    def work() -> None:
        for _ in range(steps):
            trainer.run_step()
        engine.meet()

    return slowest_s(work) / steps


class Kept:
    """Runs that have ended, in a file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.runs: dict[str, list[float]] = {}
        if path and path.exists():
            self.runs = json.loads(path.read_text())["runs"]

    def get(self, key: str, run: Callable[[], Sequence[float]]) -> list[float]:
        """A kept run, or a new one."""
        if key not in self.runs:
            self.runs[key] = list(run())
            self.save({})
        return self.runs[key]

    def save(self, result: dict[str, Any]) -> None:
        """Whole or not at all."""
        if self.path:
            aside = self.path.with_suffix(".aside")
            aside.write_text(json.dumps(result | {"runs": self.runs}, indent=1) + "\n")
            aside.replace(self.path)


def table(modes: Sequence[str], kept: Kept, args: argparse.Namespace) -> list[list[Any]]:
    """A row for every mode with runs of all seeds."""
    rows: list[list[Any]] = []
    for name in modes:
        keys = [f"{' '.join(MODES[name])} steps={args.steps} seed={seed}" for seed in range(args.seeds)]
        runs = [kept.runs[key] for key in keys if key in kept.runs]
        if not runs:
            continue
        bits, sent, _ = (statistics.mean(values) for values in zip(*runs, strict=True))
        spread = statistics.stdev(run[0] for run in runs) if len(runs) > 1 else 0.0
        slow = kept.runs.get(f"{' '.join(MODES[name])} link={args.link:g}", [float("nan")])[0]
        first = rows[0] if rows else [name, 0, bits, 0.0, sent, slow]
        rows.append([name, len(runs), bits, spread, sent, slow])
        print(
            f"{name:30} {bits:.4f} +- {spread:.4f} bits/byte ({bits / first[2] - 1:+.2%}, {len(runs)} seeds)  "
            f"{sent / 1e6 / args.steps:8.4f} MB/step ({first[4] / sent:6.1f}x fewer)  {1e3 * slow:7.1f} ms/step"
        )
    return rows


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--link", type=float, default=50.0)
    parser.add_argument("--link-steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept = Kept(args.out)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare(recipe_for([], 0, args.steps, COPIES).data, data)
        for seed, name in itertools.product(range(args.seeds), args.modes):
            recipe = recipe_for(MODES[name], seed, args.steps, COPIES)
            key = f"{' '.join(MODES[name])} steps={args.steps} seed={seed}"
            found = kept.get(
                key,
                lambda recipe=recipe: run_on_ranks(held_out, recipe, data, ranks=ranks_of(recipe), timeout_s=1800)[0],
            )
            print(f"{key:70} {found[0]:.4f} bits/byte {found[2]:.0f} s", flush=True)
        for name in args.modes if args.link and not missing() else []:
            recipe = recipe_for(MODES[name], 0, args.steps, COPIES)
            with Lab([Host(ranks_of(recipe) // COPIES, 1000, args.link)] * COPIES) as lab:
                kept.get(
                    f"{' '.join(MODES[name])} link={args.link:g}",
                    lambda recipe=recipe, lab=lab: lab.call(step_s, recipe, data, args.link_steps, timeout_s=600)[:1],
                )
    rows = table(args.modes, kept, args)
    columns = ["mode", "seeds", "bits_per_byte", "stdev", "sent_bytes", "link_step_s"]
    result = {"bench": "synchronise", "columns": columns, "rows": rows, "steps": args.steps, "copies": COPIES}
    result |= {
        "link_mbit": args.link,
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(torch.device("cpu")),
    }
    print(json.dumps(result))
    kept.save(result)


if __name__ == "__main__":
    main()
