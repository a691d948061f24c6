"""Held-out loss and bytes of every way to synchronise and compress, at equal tokens, against the synchronous run.

    python benchmarks/synchronise.py [--seeds 3] [--steps 600] [--modes NAME ...] [--link 5]
                                     [--out benchmarks/results/synchronise.json]

Losses are compared seed by seed: the same weights at first, the same batches. Forked gloo ranks on this machine, one
thread each; the standard library's source in bytes. Bytes are those one rank sends to other copies for gradients or
updates; token exchange between experts is not among them. --out keeps every run as soon as it has ended, and a run that
is there already is not repeated. Time comes from another few steps, a whole number of meetings, between two hosts whose
uplinks carry --link Mbit/s (lab.py: root and iproute2; without them, or with 0, it is left out). Prints a table, then
one JSON line.
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
HELD_OUT = 1024
"""Sequences that the loss is measured on."""
BASE: dict[str, Any] = {
    "model": {
        "num_layers": 1,
        "width": 32,
        "attention": {"num_heads": 2, "qk_norm": "head"},
        "moe": {"num_experts": 4, "expert_width": 48},
    },
    "train": {"steps": 600, "length": 64, "sequences": 32, "precision": "fp32", "evaluate_every": 0},
    "optimizer": {"lr": 1.5e-2, "warmup_steps": 40, "decay_share": 0.4},
    "dist": {"timeout_s": 1800.0},
}
FIRST = "synchronous"
UPDATES = ["dist.sync=local", "dist.sync_every=1"]
LOCAL = ["dist.sync=local", "dist.sync_every=8"]
MODES = {
    FIRST: [],
    "local, H = 8, int8": [*LOCAL, "dist.compression=int8"],
    "local, H = 2, 1-bit sign": ["dist.sync=local", "dist.sync_every=2", "dist.compression=sign"],
    "updates, 1-bit sign": [*UPDATES, "dist.compression=sign"],
    "updates, top-k 1 %": [*UPDATES, "dist.compression=topk"],
    "updates, top-k 1 %, layer-wise": [*UPDATES, "dist.compression=topk", "dist.layerwise=true"],
    "local, H = 8": LOCAL,
    "int8 per block": ["dist.compression=int8"],
    "bf16": ["dist.compression=bf16"],
    "fp16": ["dist.compression=fp16"],
    "PowerSGD rank 4": ["dist.compression=powersgd"],
    "top-k 1 %": ["dist.compression=topk"],
    "top-k 1 %, layer-wise": ["dist.compression=topk", "dist.layerwise=true"],
    "1-bit sign": ["dist.compression=sign"],
    "local, H = 20": ["dist.sync=local", "dist.sync_every=20"],
    "post-local, H = 20": ["dist.sync=local", "dist.sync_every=20", "dist.sync_after=160"],
    "DiLoCo, H = 8, int8": [
        "dist.sync=diloco",
        "dist.sync_every=8",
        "dist.compression=int8",
        "dist.outer_momentum=0.5",
    ],
    "DiLoCo, H = 20": ["dist.sync=diloco", "dist.sync_every=20", "dist.outer_momentum=0.5"],
    "stale, S = 1": ["dist.sync=stale", "dist.staleness=1"],
    "stale, S = 4": ["dist.sync=stale", "dist.staleness=4"],
    "hybrid, 2 x 2, S = 1": ["dist.sync=hybrid", "dist.dp_shard=2"],
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
    found = evaluate(trainer.model, tokens, length=recipe.train.length, limit=HELD_OUT, split=engine.split)
    inside = engine.sum_gradients.sent_bytes if engine.apart else 0.0  # of hybrid copies
    return found.bits_per_byte, engine.sent_bytes - inside, seconds


def step_s(recipe: Recipe, data: Path, steps: int) -> float:
    """Seconds per step of the slowest rank; of stale copies the last updates may still be under way."""
    engine = Ranks(fit(recipe.dist, dist.get_world_size()), torch.device("cpu"), recipe)
    trainer = Trainer(recipe, open_data(data), engine)

    def walk(steps: int) -> None:
        for _ in range(steps):
            trainer.run_step()

    walk(recipe.dist.sync_every)
    return slowest_s(lambda: walk(steps)) / steps


class Kept:
    """Runs that have ended, in a file; of one setting only."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.runs: dict[str, list[float]] = {}
        if path and path.exists():
            found = json.loads(path.read_text())
            if found.get("base") != BASE:
                raise SystemExit(f"{path} has runs of another model or schedule; move it away or name another --out")
            self.runs = found["runs"]

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
            aside.write_text(json.dumps(result | {"base": BASE, "runs": self.runs}, indent=1) + "\n")
            aside.replace(self.path)


def run_key(name: str, steps: int, seed: int) -> str:
    """A run's name in the file."""
    return f"{' '.join(MODES[name])} steps={steps} seed={seed}"


def link_key(name: str, link_mbit: float) -> str:
    """That of its seconds per step."""
    return f"{' '.join(MODES[name])} link={link_mbit:g}"


def step_ms(name: str, kept: Kept, args: argparse.Namespace) -> float:
    """Over the link; a mode that begins synchronous, over all its steps."""
    late_s, early_s = (kept.runs.get(link_key(mode, args.link), [float("nan")])[0] for mode in (name, FIRST))
    early = recipe_for(MODES[name], 0, args.steps, COPIES).dist.sync_after / args.steps
    return 1e3 * (early * early_s + (1 - early) * late_s if early else late_s)


def table(modes: Sequence[str], kept: Kept, args: argparse.Namespace) -> list[list[Any]]:
    """A row for every mode with runs; losses are compared seed by seed."""
    rows: list[list[Any]] = []
    for name in modes:
        pairs = [
            [kept.runs.get(run_key(mode, args.steps, seed)) for mode in (name, FIRST)] for seed in range(args.seeds)
        ]
        both = [(run, exact) for run, exact in pairs if run and exact]
        if not both:
            continue
        bits, sent, most = (
            statistics.mean(numbers) for numbers in zip(*((r[0], r[1], e[1]) for r, e in both), strict=True)
        )
        over = [100 * (run[0] / exact[0] - 1) for run, exact in both]
        spread = statistics.stdev(over) if len(over) > 1 else 0.0
        rows.append(
            [name, len(both), bits, statistics.mean(over), spread, sent / args.steps, step_ms(name, kept, args)]
        )
        print(
            f"{name:30} {bits:.4f} bits/byte ({statistics.mean(over):+.2f} +- {spread:.2f} %, {len(both)} seeds)  "
            f"{sent / 1e3 / args.steps:8.2f} kB/step ({most / sent:6.1f}x fewer)  {rows[-1][-1]:7.1f} ms/step"
        )
    return rows


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--link", type=float, default=5.0)
    parser.add_argument("--link-steps", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept = Kept(args.out)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare(recipe_for([], 0, args.steps, COPIES).data, data)
        for seed, name in itertools.product(range(args.seeds), args.modes):
            recipe = recipe_for(MODES[name], seed, args.steps, COPIES)
            key = run_key(name, args.steps, seed)
            found = kept.get(
                key,
                lambda recipe=recipe: run_on_ranks(held_out, recipe, data, ranks=ranks_of(recipe), timeout_s=3600)[0],
            )
            print(f"{key:70} {found[0]:.4f} bits/byte {found[2]:.0f} s", flush=True)
        slow = [name for name in args.modes if link_key(name, args.link) not in kept.runs]
        for name in slow if args.link and not missing() else []:
            recipe = recipe_for([*MODES[name], "dist.sync_after=0"], 0, args.steps, COPIES)  # as it is later on
            with Lab([Host(ranks_of(recipe) // COPIES, 1000, args.link)] * COPIES) as lab:
                kept.get(
                    link_key(name, args.link),
                    lambda recipe=recipe, lab=lab: lab.call(step_s, recipe, data, args.link_steps, timeout_s=600)[:1],
                )
    rows = table(args.modes, kept, args)
    columns = ["mode", "seeds", "bits_per_byte", "over_percent", "over_stdev", "step_bytes", "link_step_ms"]
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
