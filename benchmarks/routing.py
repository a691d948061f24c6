"""Routing rules on the same text and token budget: held-out loss, expert work and step time, with intervals.

    python benchmarks/routing.py [--jobs 2] [--seeds 3] [--pair-seeds 8] [--steps 300] [--only NAME ...]

`make bench-routing`. Every rule trains recipes/routing.toml with every seed, the pair that the claim is about with more
(a seed draws weights and the order of the text). Runs are processes of one thread, `--jobs` at a time; finished ones
are kept in --folder and not done again. Then the rules' steps are timed in turn in one process, budgets held at their
final value, and `equal time` runs give cheaper rules the extra steps that their speed buys against top-2. Intervals are
95 % t-intervals over seeds; differences are paired.

Writes benchmarks/results/routing.json and docs/routing.svg; prints a table, then one JSON line.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scipy.stats import t as student

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).parents[1]
ROUTER = "model.moe.router."
RULES: dict[str, dict[str, Any]] = {
    "top-1": {"rule": "top1", "weights": "straight"},
    "top-2": {"rule": "top2", "weights": "renormalise"},
    "gap 1.2": {"rule": "gap", "weights": "pair", "mean_experts": 1.2},
    "gap 1.35": {"rule": "gap", "weights": "pair", "mean_experts": 1.35},
    "gap 1.5": {"rule": "gap", "weights": "pair", "mean_experts": 1.5},
    "top-p 1.35": {"rule": "topp", "weights": "straight", "mean_experts": 1.35},
    "gshard": {"rule": "gshard", "weights": "pair"},
    "gap 1.35 keep": {"rule": "gap", "weights": "keep", "mean_experts": 1.35},
    "gap 1.35 ramp": {"rule": "gap", "weights": "ramp", "mean_experts": 1.35},
}
EQUAL_TIME = ("top-1", "gap 1.35")
"""Rules that also train for as long as top-2 does."""
CLOSEST = ("top-2", "gap 1.35")
"""The pair that the claim is about, and whose difference is small beside that of seeds."""


def settings(rule: str) -> list[str]:
    return [f"{ROUTER}{key}={value}" for key, value in RULES[rule].items()]


def train_one(rule: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """One run in a process of its own; returns and keeps its figures."""
    name = f"{rule} s{seed} n{steps}".replace(" ", "-")
    kept = folder / f"{name}.json"
    if not kept.exists():
        command = [sys.executable, __file__, "--run", rule, "--seed", str(seed), "--steps", str(steps)]
        subprocess.run([*command, "--folder", str(folder)], check=True)
    return dict(json.loads(kept.read_text()))


def run_here(rule: str, seed: int, steps: int, folder: Path) -> None:
    """Train in this process and write the figures."""
    import shutil

    import torch

    from moestro.core.events import read_events
    from moestro.train.loop import start
    from moestro.train.recipe import load_recipe

    torch.set_num_threads(1)
    name = f"{rule} s{seed} n{steps}".replace(" ", "-")
    out = folder / name
    shutil.rmtree(out, ignore_errors=True)
    overrides = [f"out={out}", f"seed={seed}", f"train.steps={steps}", "train.threads=1", *settings(rule)]
    outcome = start(load_recipe(ROOT / "recipes/routing.toml", overrides))
    events = read_events(out / "events.jsonl")
    taken = [event for event in events if event["event"] == "step"]
    experts = [statistics.mean(event["experts"]) for event in taken]
    after = [value for value, event in zip(experts, taken, strict=True) if event["step"] > 0.45 * steps + 50]
    windows = [statistics.mean(after[i : i + 200]) for i in range(max(len(after) - 199, 0))]
    target = RULES[rule].get("mean_experts")
    assert outcome.evaluation is not None
    figures = {
        "rule": rule,
        "seed": seed,
        "steps": steps,
        "loss": outcome.evaluation.loss,
        "bits_per_byte": outcome.evaluation.bits_per_byte,
        "experts_at_the_end": outcome.evaluation.mean_experts,
        "experts_over_training": statistics.mean(experts),
        "off_budget": max((abs(mean - target) for mean in windows), default=None) if target else None,
        "busiest_over_mean": outcome.evaluation.busiest_over_mean,
        "curve": [[event["step"], event["loss"]] for event in events if event["event"] == "evaluation"],
        "experts_curve": [round(value, 4) for value in experts[:: max(steps // 100, 1)]],
    }
    (folder / f"{name}.json").write_text(json.dumps(figures))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def time_steps(folder: Path, rounds: int = 25) -> dict[str, list[float]]:
    """Seconds of a step under every rule, in turn, in one process of one thread, at the rule's final budget."""
    import torch

    from moestro.train.data import open_data, prepare
    from moestro.train.recipe import load_recipe
    from moestro.train.trainer import Trainer

    torch.set_num_threads(1)
    trainers = {}
    for rule, fields in RULES.items():
        at_budget = [f"{ROUTER}start_experts={fields.get('mean_experts', 2.0)}", f"{ROUTER}anneal_share=0"]
        recipe = load_recipe(ROOT / "recipes/routing.toml", ["train.threads=1", *settings(rule), *at_budget])
        if not (folder / "data").exists():
            prepare(recipe.data, folder / "data")
        trainers[rule] = Trainer(recipe, open_data(folder / "data"))
    seconds: dict[str, list[float]] = {rule: [] for rule in RULES}
    for turn in range(-8, rounds):
        for rule, trainer in trainers.items():
            spent = trainer.run_step().step_s
            if turn >= 0:
                seconds[rule].append(spent)
    return seconds


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % t-interval."""
    if len(values) < 2:
        return values[0], math.nan
    quantile = float(student.ppf(0.975, len(values) - 1))
    return statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def table(runs: list[dict[str, Any]], seconds: dict[str, list[float]], steps: int) -> list[dict[str, Any]]:
    """One row per rule, relative to top-2."""
    reference = {run["seed"]: run for run in runs if run["rule"] == "top-2" and run["steps"] == steps}
    rows = []
    for rule in RULES:
        mine = [run for run in runs if run["rule"] == rule and run["steps"] == steps]
        longer = [run for run in runs if run["rule"] == rule and run["steps"] > steps]
        if not mine:
            continue
        rows.append(
            {
                "rule": rule,
                "seeds": len(mine),
                "loss": interval([run["loss"] for run in mine]),
                "against_top2_percent": interval([_percent(run, reference) for run in mine]),
                "equal_time_percent": interval([_percent(run, reference) for run in longer]) if longer else None,
                "equal_time_steps": longer[0]["steps"] if longer else None,
                "experts_at_the_end": statistics.mean(run["experts_at_the_end"] for run in mine),
                "expert_flops_over_training": statistics.mean(run["experts_over_training"] for run in mine) / 2,
                "step_time": _step_time(seconds, rule),
                "off_budget": max((run["off_budget"] for run in mine if run["off_budget"] is not None), default=None),
                "busiest_over_mean": statistics.mean(run["busiest_over_mean"] for run in mine),
            }
        )
    return rows


def _percent(run: dict[str, Any], reference: dict[int, dict[str, Any]]) -> float:
    return 100 * (run["loss"] / reference[run["seed"]]["loss"] - 1)


def _step_time(seconds: dict[str, list[float]], rule: str) -> float:
    """Median over rounds of the step's time over top-2's in the same round."""
    pairs = zip(seconds[rule], seconds["top-2"], strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def print_table(rows: list[dict[str, Any]]) -> None:
    head = (
        "rule",
        "seeds",
        "held-out loss",
        "against top-2",
        "at equal time",
        "experts",
        "expert FLOPs",
        "step time",
        "off budget",
    )
    print("".join(f"{name:>20s}" for name in head))
    for row in rows:
        equal = row["equal_time_percent"]
        cells = (
            row["rule"],
            str(row["seeds"]),
            "{:.4f} ± {:.4f}".format(*row["loss"]),
            "{:+.2f} ± {:.2f} %".format(*row["against_top2_percent"]),
            "{:+.2f} ± {:.2f} %".format(*equal) if equal else "",
            f"{row['experts_at_the_end']:.3f}",
            f"{row['expert_flops_over_training']:.3f} x",
            f"{row['step_time']:.3f} x",
            f"{row['off_budget']:.4f}" if row["off_budget"] is not None else "",
        )
        print("".join(f"{cell:>20s}" for cell in cells))


def draw(rows: list[dict[str, Any]], runs: list[dict[str, Any]], steps: int) -> str:
    """Loss against work, and the curves, as one SVG."""
    from moestro.core.axes import Axis
    from moestro.core.bars import Bar, bars
    from moestro.core.charts import Series, line_chart, standalone_svg

    shown = [row for row in rows if row["rule"] != "top-2"]
    difference = bars(
        "Held-out loss against top-2, same tokens",
        [
            Bar(
                name=row["rule"],
                value=row["against_top2_percent"][0],
                low=row["against_top2_percent"][0] - row["against_top2_percent"][1],
                high=row["against_top2_percent"][0] + row["against_top2_percent"][1],
                note=f"{row['expert_flops_over_training']:.0%} of the expert work",
            )
            for row in shown
        ],
        x=Axis(label="percent more loss (95 % interval over seeds)"),
        note="Left of zero is better than top-2.",
    )
    curves = []
    for number, rule in enumerate(("top-1", "top-2", "gap 1.35", "gap 1.2")):
        mine = [dict(map(tuple, run["curve"])) for run in runs if run["rule"] == rule and run["steps"] == steps]
        if mine:
            at = sorted(mine[0])
            curves.append(
                Series(
                    name=rule,
                    x=at,
                    y=[statistics.mean(c[step] for c in mine) for step in at],
                    colour=f"c{number}",
                )
            )
    learning = line_chart("Held-out loss while training", curves, x=Axis(label="step"), y=Axis(label="nats per token"))
    return standalone_svg(difference, learning)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pair-seeds", type=int, default=8, help=f"of {' and '.join(CLOSEST)}")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="*", choices=[*RULES], default=[*RULES])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/routing")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.run:
        run_here(options.run, options.seed, options.steps, options.folder)
        return
    seeds = {rule: max(options.pair_seeds if rule in CLOSEST else 0, options.seeds) for rule in options.only}
    jobs = [(rule, seed, options.steps) for rule in options.only for seed in range(seeds[rule])]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(lambda job: train_one(*job, options.folder), jobs))
    seconds = time_steps(options.folder)
    ratio = {rule: _step_time(seconds, rule) for rule in EQUAL_TIME if rule in options.only}
    longer = [(rule, seed, round(options.steps / ratio[rule])) for rule in ratio for seed in range(seeds[rule])]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs += list(pool.map(lambda job: train_one(*job, options.folder), longer))
    rows = table(runs, seconds, options.steps)
    print_table(rows)
    found = {"bench": "routing", "date": time.strftime("%Y-%m-%d"), "steps": options.steps, "rows": rows}
    if [*options.only] == [*RULES]:
        (ROOT / "benchmarks/results").mkdir(exist_ok=True)
        (ROOT / "benchmarks/results/routing.json").write_text(json.dumps(found, indent=1))
        (ROOT / "docs/routing.svg").write_text(draw(rows, runs, options.steps))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
