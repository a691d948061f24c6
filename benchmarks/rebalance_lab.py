"""Whole training steps over throttled links: live balancing beside fixed placements, and a link that gets slow.

    python benchmarks/rebalance_lab.py [--steps 12] [--live 48] [--only fixed live cut even] [--folder F] [--out FILE]

Four hosts of two ranks (`lab.py`), one of them on a slow card; the trainer itself, two sparse layers of 16 experts, the
router as it begins without a balance loss, so that loads are as uneven as text is. Placements in a row, EPLB's and a
spread over hosts are made from loads counted in a first run, as is the best a long search finds; live balancing knows
nothing beforehand and probes the network. Then one link is cut to an eighth while training goes on. On an even network:
live balancing beside routing that is forced to be even. Curves are compared. Needs what lab.py needs, and numba.

Whole steps are predicted as the balancer predicts them: from what was measured under ONE placement, links as the
balancer's probe found them and experts as fast as it measured, for every OTHER placement.

Parts can run one by one (`--only`), each leaving its rows in `--folder`; what is there already is taken from there.
Prints a table, then one JSON line.
"""

import argparse
import json
import pickle
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

from moestro.cluster.links import Links
from moestro.core.config import build
from moestro.core.tokens import ByteTokenizer
from moestro.dist.layout import fit
from moestro.nn.experts import AnyExperts
from moestro.nn.experts import Path as ExpertPath
from moestro.nn.moe import Dispatcher, MoE
from moestro.nn.routing_rules import Choice
from moestro.place.cost import Layer, Placement, contiguous, even_split
from moestro.place.plan_file import read_placements, save_placements
from moestro.place.planner import compile_searches
from moestro.place.solve import solve, spread_start
from moestro.train.data import TokenData, TokenFile
from moestro.train.ranks import Ranks
from moestro.train.rebalance import modelled_times
from moestro.train.recipe import Recipe
from moestro.train.trainer import Trainer
from moestro.train.whole_steps import Measured, beside

EXPERTS, LAYERS, WIDTH, HIDDEN, SLOTS = 16, 2, 128, 64, 4
LENGTH, SEQUENCES = 128, 64
UNEVEN = [Host(ranks=2, port_mbit=800, up_mbit=up) for up in (200, 200, 200, 50)]
EVEN = [Host(ranks=2, port_mbit=800, up_mbit=200)] * 4
CUT_HOST, CUT_MBIT = 1, 25
WARM_UP = 2
NOTED = (
    "moved", "problem", "now_ms", "planned_ms", "measured_ms", "expected_ms", "search_s", "seconds", "links_slower",
)  # fmt: skip
FIXED = ("in a row", "EPLB", "host spread", "long search")
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
    engine = Ranks(fit(recipe.dist, ranks, 2), torch.device("cpu"), recipe)
    trainer = Trainer(recipe, text(), engine)
    balancer = engine.balance.rebalancer if engine.balance else None
    found = {"links": balancer.links, "costs": balancer.costs} if balancer else {}  # as probed before the first step
    counting = [Counting(m.dispatcher, forced) for m in trainer.model.modules() if isinstance(m, MoE)]
    for layer, counter in zip((m for m in trainer.model.modules() if isinstance(m, MoE)), counting, strict=True):
        layer.router.weight_ED.data.mul_(5.0)
        layer.dispatcher = counter
    spent_s, losses, moved, own_s = [], [], [], []
    for step in range(steps):
        if dist.get_rank() == 0:
            Path(note).write_text(str(step))
        dist.barrier()
        begun_s = time.perf_counter()
        result = trainer.run_step()
        dist.barrier()
        spent_s.append(time.perf_counter() - begun_s)
        losses.append(float(result.loss))
        told = trainer.engine.news(trainer.step)
        own_s += [
            max(news.fields["compute_s"]) + max(news.fields["reduction_s"]) for news in told if news.event == "timeline"
        ]
        moved += [
            {"step": step, **{key: value for key, value in news.fields.items() if key in NOTED}}
            for news in told
            if news.event == "balance"
        ]
    return {
        "step_s": spent_s,
        "loss": losses,
        "count_LE": [(counter.count_E / steps).tolist() for counter in counting],
        "news": moved,
        "own_s": own_s,
        **found,
    }


def run(lab: Lab, steps: int, balance: Row, folder: Path, forced: bool = False, cut_at: int = 0) -> Row:
    """One training run; at step `cut_at` one uplink is cut. Rank 0's times and losses, everybody's loads."""
    note, over = folder / "step", threading.Event()
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


def layer_of(links: Links, token_SE: NDArray[np.float64], rows_per_s: float = 1e6) -> Layer:
    """One layer as balancing sees it."""
    slot_G = np.full(links.devices, SLOTS)
    numbers = 3 * WIDTH * HIDDEN
    return Layer(
        links=links,
        token_SE=token_SE,
        tokens_per_s_G=np.full(links.devices, rows_per_s),
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


def agreement(folder: Path, rows: list[Row]) -> list[Row]:
    """Predicted over measured for every fixed placement, from what was measured under each other one."""
    known = pickle.loads((folder / "known.pickle").read_bytes())
    layers = [layer_of(known["links"], token_SE, known["costs"].rows_per_s) for token_SE in known["count_LSE"]]
    plans = {"in a row": [even_split(layer.held_EG) for layer in layers]}
    plans |= {name: read_placements(plan_file(folder, name)) for name in FIXED[1:]}
    measured = {row["name"]: Measured(row["step_s"], row["own_s"]) for row in rows if row["name"] in plans}
    modelled = {name: modelled_times(layers, plan) for name, plan in plans.items()}
    found = []
    for name in FIXED:
        model_s, step_s = sum(one.total_s for one in modelled[name]), measured[name].step_s
        ratio = {
            other: beside(measured[other], modelled[other]).predicted_s(model_s) / step_s
            for other in FIXED
            if other != name
        }
        shown = "  ".join(f"from {other} {100 * (one - 1):+.0f} %" for other, one in ratio.items())
        print(f"{name:20s} measured {step_s:.3f} s, model {model_s:.3f} s, predicted: {shown}")
        found.append({"name": name, "modelled_s": model_s, "predicted_over_measured": ratio})
    return found


def plan_file(folder: Path, name: str) -> Path:
    """Where a fixed placement lies."""
    return folder / f"{name.replace(' ', '-')}.toml"


def summary(name: str, found: Row, last: int) -> Row:
    """Median seconds of the last steps."""
    row = {"name": name, "step_s": round(float(np.median(found["step_s"][-last:])), 4), "losses": found["loss"]}
    row["own_s"] = round(float(np.median(found["own_s"][WARM_UP:])), 4) if found["own_s"] else 0.0
    row["moved"] = sum(one.get("moved", 0) for one in found["news"])
    row["problems"] = [one["problem"] for one in found["news"] if "problem" in one]
    print(f"{name:32s} {row['step_s']:8.3f} s a step   moved {row['moved']}  {row['problems'] or ''}", flush=True)
    return row


LIVE = {"enabled": True, "slots": SLOTS, "interval": 6}


def fixed(args: argparse.Namespace, folder: Path) -> list[Row]:
    """One host on a slow card: placements that stay."""
    with Lab(UNEVEN) as lab:
        steps = args.steps + WARM_UP
        first = run(lab, steps, {}, folder)
        (folder / "counts.pickle").write_bytes(pickle.dumps(first["count_LSE"]))
        rows = [summary("in a row", first, args.steps)]
        layers = [layer_of(lab.links(), token_SE) for token_SE in first["count_LSE"]]
        for name, plans in placements(layers).items():
            save_placements(plan_file(folder, name), plans)
            rows.append(summary(name, fixed_run(lab, steps, name, folder), args.steps))
    return rows


def fixed_run(lab: Lab, steps: int, name: str, folder: Path) -> Row:
    """With one of the placements made in `fixed`."""
    return run(lab, steps, {"placement": str(plan_file(folder, name))}, folder)


def live(args: argparse.Namespace, folder: Path) -> list[Row]:
    """The same hosts, balanced, and one more link that becomes slow."""
    with Lab(UNEVEN) as lab:
        compile_searches(lab.links())
        found = run(lab, 2 * args.live, LIVE, folder, cut_at=args.live)
    known = {name: found.pop(name) for name in ("links", "costs")}
    known["count_LSE"] = pickle.loads((folder / "counts.pickle").read_bytes())
    (folder / "known.pickle").write_bytes(pickle.dumps(known))
    before = {**found, "step_s": found["step_s"][: args.live - 1]}
    after = found["step_s"][args.live + 2 : args.live + 6]
    last = summary("live, after the cut", found, args.steps)
    last |= {"right_after_s": float(np.median(after)), "news": found["news"]}
    last["steps_s"] = [round(s, 3) for s in found["step_s"]]
    print("steps:", *(f"{s:.2f}" for s in found["step_s"]))
    for one in found["news"]:
        print("decision:", {name: value for name, value in one.items() if not isinstance(value, list)})
    return [summary("live", before, args.steps), last]


def cut(args: argparse.Namespace, folder: Path) -> list[Row]:
    """What the placement of before the cut comes to after it."""
    with Lab(UNEVEN) as lab:
        lab.rate(CUT_HOST, CUT_MBIT)
        found = fixed_run(lab, args.steps + WARM_UP, "long search", folder)
    return [summary("long search for before the cut", found, args.steps)]


def even(args: argparse.Namespace, folder: Path) -> list[Row]:
    """All links alike."""
    with Lab(EVEN) as lab:
        compile_searches(lab.links())
        steps = args.steps + WARM_UP
        rows = [summary("even network, forced even", run(lab, steps, {}, folder, forced=True), args.steps)]
        rows.append(summary("even network, in a row", run(lab, steps, {}, folder), args.steps))
        rows.append(summary("even network, live", run(lab, args.live, LIVE, folder), args.steps))
    return rows


PARTS = {"fixed": fixed, "live": live, "cut": cut, "even": even}


def all_rows(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Run the parts asked for; of the others take what lies in the folder."""
    rows: list[Row] = []
    for name, part in PARTS.items():
        file = folder / f"{name}.json"
        if name in args.only:
            file.write_text(json.dumps(part(args, folder)))
        if file.exists():
            rows += json.loads(file.read_text())
    return rows


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="steps that are timed")
    parser.add_argument("--live", type=int, default=48, help="steps of live balancing before the cut, and after it")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--folder", type=Path, help="where parts leave their rows; else a folder for this run alone")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if why := missing():
        print(f"skipped: {why}")
        return
    with tempfile.TemporaryDirectory() as aside:
        folder = args.folder or Path(aside)
        folder.mkdir(parents=True, exist_ok=True)
        rows = all_rows(args, folder)
        predicted = agreement(folder, rows) if (folder / "known.pickle").exists() else []
    same = [row["losses"] for row in rows if "forced" not in row["name"]]
    shortest = min(map(len, same))
    apart = max(abs(a / b - 1) for one in same for a, b in zip(one[:shortest], same[0], strict=False))
    print(f"losses differ by {apart:.1e} at most over {shortest} steps")
    for row in rows:
        del row["losses"]
    found = {"bench": "rebalance_lab", "date": time.strftime("%F"), "curves_apart": apart, "rows": rows}
    found["predicted"] = predicted
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
