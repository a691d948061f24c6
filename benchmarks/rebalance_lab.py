"""Whole training steps over throttled links: live balancing beside fixed placements, and a link that gets slow.

    python benchmarks/rebalance_lab.py [--steps 12] [--live 48] [--out FILE]

Four hosts of two ranks (`lab.py`), one of them on a slow card; the trainer itself, two sparse layers of 16 experts, the
router as it begins without a balance loss, so that loads are as uneven as text is. Placements in a row, EPLB's and a
spread over hosts are made from loads counted in a first run, as is the best a long search finds; live balancing knows
nothing beforehand and probes the network. Then one link is cut to an eighth while training goes on. On an even network:
live balancing beside routing that is forced to be even. Curves are compared. Needs what lab.py needs, and numba.

Prints a table, then one JSON line.
"""

import argparse
import json
import platform
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from lab import Host, Lab, missing
from place import eplb_placement, near_placement

from moestro.core.config import build
from moestro.core.tokens import ByteTokenizer
from moestro.dist.layout import fit
from moestro.nn.experts import AnyExperts
from moestro.nn.experts import Path as ExpertPath
from moestro.nn.moe import Dispatcher, MoE
from moestro.nn.routing_rules import Choice
from moestro.place.cost import Layer, Placement, contiguous, even_split, step_time
from moestro.place.plan_file import save_placements
from moestro.place.planner import compile_searches
from moestro.place.solve import solve, spread_start
from moestro.train.data import TokenData, TokenFile
from moestro.train.ranks import Ranks
from moestro.train.recipe import Recipe
from moestro.train.trainer import Trainer

EXPERTS, LAYERS, WIDTH, HIDDEN, SLOTS = 16, 2, 128, 64, 4
LENGTH, SEQUENCES = 128, 64
UNEVEN = [Host(ranks=2, port_mbit=800, up_mbit=up) for up in (200, 200, 200, 50)]
EVEN = [Host(ranks=2, port_mbit=800, up_mbit=200)] * 4
CUT_HOST, CUT_MBIT = 1, 25
WARM_UP = 2
NOTED = ("moved", "problem", "now_ms", "planned_ms", "search_s", "seconds")
Row = dict[str, Any]


class Counting:
    """Counts what tokens choose; `forced` replaces it by an even choice."""

    def __init__(self, inner: Dispatcher, forced: bool) -> None:
        self.inner, self.forced = inner, forced
        self.count_E = torch.zeros(EXPERTS, dtype=torch.int64)

    def __call__(self, x_TD: Tensor, choice: Choice, experts: AnyExperts, path: ExpertPath) -> Tensor:
        """See `nn.moe.Dispatcher`."""
        self.count_E += torch.bincount(choice.expert_TK.flatten(), minlength=EXPERTS + 1)[:EXPERTS]
        if self.forced:
            slot_A = torch.arange(choice.expert_TK.numel()) + 2 * dist.get_rank()
            choice = replace(choice, expert_TK=(slot_A % EXPERTS).view_as(choice.expert_TK))
        return self.inner(x_TD, choice, experts, path)


def text() -> TokenData:
    """The standard library's source, in bytes."""
    files = sorted(Path(platform.__file__).parent.glob("*.py"))
    token_N = np.frombuffer(b"".join(file.read_bytes() for file in files)[:2_000_000], np.uint8).astype(np.uint16)
    tokens = TokenFile(token_N, len(token_N), ["stdlib"], [0])
    return TokenData(tokens, tokens, ByteTokenizer(), {})


def train(ranks: int, steps: int, balance: Row, forced: bool, note: str) -> Row:
    """On every rank: seconds and loss of each step, loads per layer, what was moved. `note` gets the step begun."""
    torch.set_num_threads(1)
    table = {
        "model": {
            "num_layers": LAYERS,
            "width": WIDTH,
            "attention": {"num_heads": 4, "num_kv_heads": 1},
            "moe": {"num_experts": EXPERTS, "expert_width": HIDDEN, "router": {"rule": "top2", "aux_loss": 0.0}},
        },
        "train": {"steps": 1_000, "length": LENGTH, "sequences": SEQUENCES, "precision": "fp32"},
        "optimizer": {"lr": 3e-4},
        "dist": {"ep": ranks, "timeout_s": 120},
        "balance": balance,
    }
    recipe = build(Recipe, table)
    trainer = Trainer(recipe, text(), Ranks(fit(recipe.dist, ranks, 2), torch.device("cpu"), recipe))
    counting = [Counting(m.dispatcher, forced) for m in trainer.model.modules() if isinstance(m, MoE)]
    for layer, counter in zip((m for m in trainer.model.modules() if isinstance(m, MoE)), counting, strict=True):
        layer.router.weight_ED.data.mul_(5.0)
        layer.dispatcher = counter
    spent_s, losses, moved = [], [], []
    for step in range(steps):
        if dist.get_rank() == 0:
            Path(note).write_text(str(step))
        dist.barrier()
        begun_s = time.perf_counter()
        result = trainer.run_step()
        dist.barrier()
        spent_s.append(time.perf_counter() - begun_s)
        losses.append(float(result.loss))
        moved += [
            {"step": step, **{key: value for key, value in news.fields.items() if key in NOTED}}
            for news in trainer.engine.news(trainer.step)
            if news.event == "balance"
        ]
    return {
        "step_s": spent_s,
        "loss": losses,
        "count_LE": [(counter.count_E / steps).tolist() for counter in counting],
        "news": moved,
    }


def run(lab: Lab, steps: int, balance: Row, folder: str, forced: bool = False, cut_at: int = 0) -> Row:
    """One training run; at step `cut_at` one uplink is cut. Rank 0's times and losses, everybody's loads."""
    note, over = Path(folder, "step"), threading.Event()
    note.write_text("-1")

    def cut() -> None:
        while not over.wait(0.05):
            if note.read_text() and int(note.read_text() or -1) >= cut_at:
                lab.rate(CUT_HOST, CUT_MBIT)
                return

    if cut_at:
        threading.Thread(target=cut, daemon=True).start()
    try:
        found = lab.call(train, lab.ranks, steps, balance, forced, str(note), timeout_s=900)
    finally:
        over.set()
    count_LSE = np.array([one["count_LE"] for one in found]).transpose(1, 0, 2)
    return {**found[0], "count_LSE": count_LSE}


def layer_of(lab: Lab, token_SE: NDArray[np.float64]) -> Layer:
    """One layer as balancing sees it."""
    slot_G = np.full(lab.ranks, SLOTS)
    numbers = 3 * WIDTH * HIDDEN
    return Layer(
        links=lab.links(),
        token_SE=token_SE,
        tokens_per_s_G=np.full(lab.ranks, 1e6),
        slot_G=slot_G,
        token_bytes=WIDTH * 4 + 2.0,
        held_EG=contiguous(EXPERTS, slot_G),
        gradient_bytes=4.0 * numbers,
        sync_share=1.0,
        homes_move=True,
    )


def placements(layers: list[Layer]) -> dict[str, list[Placement]]:
    """From counted loads, for every layer."""
    return {
        "EPLB": [eplb_placement(layer) for layer in layers],
        "host spread": [near_placement(layer, spread_start(layer)) for layer in layers],
        "long search": [
            min((solve(layer, effort=20, seed=seed) for seed in range(3)), key=lambda one: one.time.total_s).placement
            for layer in layers
        ],
    }


def predicted_s(layers: list[Layer], plans: list[Placement]) -> float:
    """What the cost model makes of all layers."""
    return sum(step_time(layer, plan).total_s for layer, plan in zip(layers, plans, strict=True))


def summary(name: str, found: Row, last: int) -> Row:
    """Median seconds of the last steps."""
    row = {"name": name, "step_s": round(float(np.median(found["step_s"][-last:])), 4), "losses": found["loss"]}
    row["moved"] = sum(one.get("moved", 0) for one in found["news"])
    row["problems"] = [one["problem"] for one in found["news"] if "problem" in one]
    print(f"{name:32s} {row['step_s']:8.3f} s a step   moved {row['moved']}  {row['problems'] or ''}", flush=True)
    return row


def uneven(args: argparse.Namespace, folder: str) -> list[Row]:
    """One host on a slow card."""
    with Lab(UNEVEN) as lab:
        compile_searches(lab.links())
        steps = args.steps + WARM_UP
        first = run(lab, steps, {}, folder)
        rows = [summary("in a row", first, args.steps)]
        layers = [layer_of(lab, token_SE) for token_SE in first["count_LSE"]]
        rows[0]["predicted_s"] = predicted_s(layers, [even_split(layer.held_EG) for layer in layers])
        for name, plans in placements(layers).items():
            file = Path(folder, f"{name.replace(' ', '-')}.toml")
            save_placements(file, plans)
            rows.append(summary(name, run(lab, steps, {"placement": str(file)}, folder), args.steps))
            rows[-1]["predicted_s"] = predicted_s(layers, plans)
        live = {"enabled": True, "slots": SLOTS, "interval": 6}
        found = run(lab, 2 * args.live, live, folder, cut_at=args.live)
        before = {**found, "step_s": found["step_s"][: args.live - 1]}
        rows.append(summary("live", before, args.steps))
        after = found["step_s"][args.live + 2 : args.live + 6]
        rows.append({**summary("live, after the cut", found, args.steps), "right_after_s": float(np.median(after))})
        rows[-1]["steps_s"] = [round(s, 3) for s in found["step_s"]]
        rows[-1]["news"] = found["news"]
        lab.rate(CUT_HOST, CUT_MBIT)
        rows.append(
            summary(
                "long search for before the cut",
                run(lab, steps, {"placement": f"{folder}/long-search.toml"}, folder),
                args.steps,
            )
        )
    return rows


def even(args: argparse.Namespace, folder: str) -> list[Row]:
    """All links alike."""
    with Lab(EVEN) as lab:
        steps = args.steps + WARM_UP
        rows = [summary("even network, forced even", run(lab, steps, {}, folder, forced=True), args.steps)]
        rows.append(summary("even network, in a row", run(lab, steps, {}, folder), args.steps))
        live = {"enabled": True, "slots": SLOTS, "interval": 6}
        rows.append(summary("even network, live", run(lab, args.live, live, folder), args.steps))
    return rows


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="steps that are timed")
    parser.add_argument("--live", type=int, default=48, help="steps of live balancing before the cut, and after it")
    parser.add_argument("--only", nargs="*", choices=["uneven", "even"], default=["uneven", "even"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if why := missing():
        print(f"skipped: {why}")
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for part in args.only for row in {"uneven": uneven, "even": even}[part](args, folder)]
    same = [row["losses"] for row in rows if "forced" not in row["name"]]
    shortest = min(map(len, same))
    apart = max(abs(a / b - 1) for one in same for a, b in zip(one[:shortest], same[0], strict=False))
    print(f"losses differ by {apart:.1e} at most over {shortest} steps")
    for row in rows:
        del row["losses"]
    found = {"bench": "rebalance_lab", "date": time.strftime("%F"), "curves_apart": apart, "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
