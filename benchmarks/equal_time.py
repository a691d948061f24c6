"""Two recipes trained for the same time on one device: held-out curves over seconds, and what each reached.

    python benchmarks/equal_time.py [FIRST.toml SECOND.toml] [--out FOLDER] [--seconds S | --steps N] [KEY=VALUE ...]

The recipes are h200-top2 and h200-gap unless others are given. Both are timed before, the second at its final budget,
as it takes two experts at first. The first trains for as many steps as fit into the seconds, or for those asked for;
the second gets as many as fit into the same time. Each run is evaluated twelve times on its way.
Seconds are those of steps; evaluations do not count. MFU is that of the last tenth of steps, over the bf16 rate of H100
and H200 (989 TFLOP/s).

Writes FOLDER/curves.json and prints a table, then one JSON line.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_step import PEAK_FLOP_PER_S

from moestro.core.events import read_events
from moestro.train.data import open_data, prepare
from moestro.train.device import environment, pick_device
from moestro.train.loop import start
from moestro.train.recipe import Recipe, load_recipe
from moestro.train.trainer import Trainer

AT_BUDGET = ["model.moe.router.anneal_share=0"]
WARM_UP, TIMED = 20, 30
"""Steps before and in a timing: the first ones compile and measure paths."""
EVALUATIONS = 12


def timed_step_s(recipe: Recipe, data: Path) -> float:
    """Median seconds of a step."""
    if not data.exists():
        prepare(recipe.data, data)
    trainer = Trainer(recipe, open_data(data))
    if trainer.model.spec.moe is not None:
        for router in trainer.model.routers:
            router.budget.threshold.fill_(0.2)  # near a trained budget's; the first updates move it there
    warm, timed = (WARM_UP, TIMED) if trainer.device.type == "cuda" else (1, 2)
    for _ in range(warm):
        trainer.run_step()
    return statistics.median(trainer.run_step().step_s for _ in range(timed))


def budgeted(path: str, overrides: list[str]) -> Recipe:
    """The recipe with its budget at its end from the first step."""
    recipe = load_recipe(Path(path), overrides)
    router = recipe.model.moe.router if recipe.model.moe else None
    if router is None or router.rule != "gap":
        return recipe
    return load_recipe(Path(path), [*overrides, *AT_BUDGET, f"model.moe.router.start_experts={router.mean_experts}"])


def steps_in(seconds: float, full_s: float, lean_s: float, anneal_share: float) -> int:
    """Steps that fit: a step's time falls from full to lean over the anneal, then stays."""
    mean_s = anneal_share * (full_s + lean_s) / 2 + (1 - anneal_share) * lean_s
    return max(round(seconds / mean_s), 1)


def train(path: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """One run; its curve over seconds of steps."""
    every = max(steps // EVALUATIONS, 1)
    recipe = load_recipe(Path(path), [*overrides, f"train.steps={steps}", f"train.evaluate_every={every}"])
    begun_s = time.perf_counter()
    outcome = start(recipe)
    events = read_events(recipe_out(recipe) / "events.jsonl")
    known = [event for event in events if event["event"] == "step"]
    rate = {event["step"]: recipe.train.tokens_per_step / event["tokens_per_s"] for event in known}
    last = statistics.median(list(rate.values())[-max(len(rate) // 10, 1) :])
    active = next(event["active_parameters"] for event in events if event["event"] == "started")
    flops = 6 * active * recipe.train.tokens_per_step
    curve, spent, done = [], 0.0, 0
    for event in events:
        if event["event"] == "step":
            spent, done = spent + (event["step"] - done) * rate[event["step"]], event["step"]
        elif event["event"] == "evaluation":
            curve.append([event["step"], round(spent, 2), event["bits_per_byte"]])
    assert outcome.evaluation is not None
    return {
        "recipe": path, "steps": recipe.train.steps, "seconds": round(spent, 2),
        "wall_s": round(time.perf_counter() - begun_s, 1),
        "step_ms": round(1e3 * last, 3), "mfu": round(flops / last / PEAK_FLOP_PER_S, 4), "curve": curve,
        "bits_per_byte": outcome.evaluation.bits_per_byte, "loss": outcome.evaluation.loss,
        "experts": outcome.evaluation.mean_experts,
    }  # fmt: skip


def recipe_out(recipe: Recipe) -> Path:
    return Path(recipe.out)


def main() -> None:
    """Time, train both, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="two recipes, then KEY=VALUE for both")
    parser.add_argument("--out", default=os.environ.get("OUT") or "runs/equal-time")
    parser.add_argument("--steps", type=int, default=0, help="of the first; 0: as its recipe says")
    parser.add_argument("--seconds", type=float, default=0, help="of the first, instead of steps")
    options = parser.parse_intermixed_args()
    keys = [word for word in options.words if "=" in word]
    recipes = [word for word in options.words if "=" not in word] or ["recipes/h200-top2.toml", "recipes/h200-gap.toml"]
    first, second = (str(ROOT / path) if not Path(path).exists() else path for path in recipes)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if torch.cuda.is_available():
        import gpu_compile

        print(*gpu_compile.compile_all(["recipes"]), flush=True)
    step_s = {
        name: timed_step_s(recipe, out / "data")
        for name, recipe in (("first", load_recipe(Path(first), keys)), ("second", budgeted(second, keys)))
    }
    print(f"a step: {step_s['first'] * 1e3:.2f} ms and, at its budget, {step_s['second'] * 1e3:.2f} ms", flush=True)
    stamp = time.strftime("%H%M%S")
    same = [*keys, f"data.tokenizer={out / 'data' / 'tokenizer.json'}"]  # learned once
    steps = options.steps or load_recipe(Path(first), keys).train.steps
    steps = steps_in(options.seconds, step_s["first"], step_s["first"], 0.0) if options.seconds else steps
    runs = [train(first, [*same, f"out={out / f'first-{stamp}'}"], steps)]
    router = load_recipe(Path(second), keys).model.moe
    share = router.router.anneal_share if router else 0.0
    steps = steps_in(runs[0]["seconds"], step_s["first"], step_s["second"], share)
    runs.append(train(second, [*same, f"out={out / f'second-{stamp}'}"], steps))
    print(f"{'recipe':28s} {'steps':>6s} {'seconds':>8s} {'step ms':>8s} {'MFU':>6s} {'bits/byte':>9s} {'experts':>8s}")
    for run in runs:
        print(
            f"{Path(run['recipe']).name:28s} {run['steps']:6d} {run['seconds']:8.1f} {run['step_ms']:8.2f} "
            f"{run['mfu']:6.1%} {run['bits_per_byte']:9.4f} {run['experts']:8.3f}"
        )
    facts = {"date": time.strftime("%Y-%m-%d"), **environment(pick_device(load_recipe(Path(first), keys).train.device))}
    found = {"bench": "equal_time", **facts, "gpu": torch.cuda.is_available(), "step_s": step_s, "runs": runs}
    (out / "curves.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
