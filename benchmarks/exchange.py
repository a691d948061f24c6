"""Token exchange, measured: against raw gloo, two levels against one over throttled links, and what each axis costs.

    python benchmarks/exchange.py [--only bandwidth levels axes] [--repeats 7] [--out FILE]

bandwidth  rows of one layer to their experts and back: the dispatcher's exchange, and the whole dispatcher with
           experts that do nothing (sorting and summing included), beside torch's all_to_all_single with the same
           splits, taken in turn; on this machine, and over links of lab.py
levels     flat and hierarchical dispatch, forward and backward, on two hosts with a slow link between them: bytes on
           the link from its counters beside the formula, and the ratio of times beside what the formula predicts
axes       a training step on two ranks with one thread each, along every axis, beside one rank with two threads

Prints tables, then one JSON line. `levels` and a part of `bandwidth` need root and iproute2, see lab.py.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from math import comb
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from lab import Host, Lab, missing

from moestro.core.config import build, with_overrides
from moestro.core.specs import MoESpec, RouterSpec
from moestro.core.tokens import ByteTokenizer
from moestro.dist.dispatch import AllToAll, Hierarchical
from moestro.dist.layout import Layout, fit
from moestro.dist.mesh import Mesh
from moestro.dist.testing import run_on_ranks
from moestro.nn.experts import Experts
from moestro.nn.routing_rules import Choice
from moestro.train.data import TokenData, TokenFile
from moestro.train.device import environment, keep_freed_memory
from moestro.train.ranks import Ranks
from moestro.train.recipe import Recipe
from moestro.train.trainer import Trainer

Row = dict[str, Any]
Floats = NDArray[np.float64]
START_S = 0.02
"""In which all ranks hear when to begin."""


def slowest_s(work: Callable[[], object]) -> float:
    """Seconds from a moment at which all ranks begin until the last has ended; one machine, so one clock."""
    dist.barrier()
    began_s = latest(time.perf_counter() + START_S)
    time.sleep(max(began_s - time.perf_counter(), 0.0))
    work()
    return latest(time.perf_counter()) - began_s


def latest(moment_s: float) -> float:
    """Of all ranks' moments."""
    moments = torch.tensor([moment_s], dtype=torch.float64)
    dist.all_reduce(moments, op=dist.ReduceOp.MAX)
    return float(moments)


def turns_s(works: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Of each, all taken in turn, after one turn to warm up."""
    found = [[slowest_s(work) for work in works] for _ in range(repeats + 1)]
    return [list(seconds) for seconds in zip(*found[1:], strict=True)]


def median_s(works: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Of each, all taken in turn."""
    return [float(np.median(seconds)) for seconds in turns_s(works, repeats)]


class Nothing(torch.nn.Module):
    """Experts that return the rows they get; `combine` then sums them."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x_ND: torch.Tensor, weight_NK: torch.Tensor, order: Any, path: str = "loop") -> torch.Tensor:
        """Rows as they came."""
        return x_ND * 1.0


def choose(tokens: int, experts: int, slots: int, seed: int) -> Choice:
    """Every token's experts, drawn evenly and distinct."""
    draw = torch.Generator().manual_seed(seed)
    expert_TK = torch.rand(tokens, experts, generator=draw).topk(slots).indices
    return Choice(expert_TK, torch.full((tokens, slots), 1.0 / slots))


def bandwidth_on_rank(tokens: int, width: int, slots: int, experts: int, repeats: int) -> tuple[list[float], int]:
    """Seconds (raw, exchange alone, dispatcher), and bytes that one rank sends to others, there and back."""
    keep_freed_memory()  # as the trainer does
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mesh = Mesh(Layout(dp_shard=ranks, ep=ranks), torch.device("cpu"))
    choice = choose(tokens, experts, slots, rank)
    sent_R = torch.bincount(choice.expert_TK.flatten() // (experts // ranks), minlength=ranks)
    came_R = torch.empty_like(sent_R)
    dist.all_to_all_single(came_R, sent_R)
    send, receive = sent_R.tolist(), came_R.tolist()
    x_ND, y_ND, back_ND = (torch.randn(rows, width) for rows in (sum(send), sum(receive), sum(send)))
    x_TD, local = torch.randn(tokens, width), Nothing(experts // ranks)
    dispatcher = AllToAll(mesh["ep"])

    def raw() -> None:
        dist.all_to_all_single(y_ND, x_ND, receive, send)
        dist.all_to_all_single(back_ND, y_ND, send, receive)

    def ours() -> None:
        came_ND = mesh["ep"].begin_swap(x_ND, send, receive).wait()
        mesh["ep"].begin_swap(came_ND, receive, send).wait()

    def whole() -> None:
        dispatcher(x_TD, choice, local, "loop")  # type: ignore[arg-type]

    moved = 4 * width * (sum(send) - send[rank] + sum(receive) - receive[rank])
    return median_s([raw, ours, whole], repeats), moved


def bandwidth(args: argparse.Namespace) -> list[Row]:
    """Ours against gloo's."""
    places: list[tuple[str, int, int, Lab | None]] = [("this machine", 2, 4096, None), ("this machine", 4, 4096, None)]
    if not missing():
        places += [(f"2 hosts x {n}, 200 Mbit/s", 2 * n, 1024, Lab([Host(n, 1000, 200)] * 2)) for n in (1, 2)]
    rows = []
    for name, ranks, tokens, lab in places:
        given = (tokens, 512, 2, 8, args.repeats)
        if lab is None:
            results = run_on_ranks(bandwidth_on_rank, *given, ranks=ranks, timeout_s=120)
        else:
            with lab:
                results = lab.call(bandwidth_on_rank, *given, timeout_s=240)
        raw, ours, whole = results[0][0]
        moved = max(moved for _, moved in results)
        rows.append(
            {
                "where": name,
                "ranks": ranks,
                "mb": moved / 1e6,
                "raw_mb_per_s": moved / raw / 1e6,
                "exchange_over_raw": raw / ours,
                "dispatcher_over_raw": raw / whole,
            }
        )
        show(rows[-1])
    return rows


def levels_on_rank(
    node: int, slots: int, experts: int, tokens: int, width: int, repeats: int, kind: str
) -> list[float]:
    """Seconds of forward and backward of one dispatch, turn by turn."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mesh = Mesh(Layout(dp_shard=ranks, ep=ranks, node=node), torch.device("cpu"))
    own = Experts(width, MoESpec(num_experts=experts // ranks, expert_width=4, router=RouterSpec(rule="top1")))
    own.initialise(0.1, 0.1)
    choice, x_TD = choose(tokens, experts, slots, rank), torch.randn(tokens, width, requires_grad=True)
    flat = AllToAll(mesh["ep"], node)
    dispatcher = flat if kind == "flat" else Hierarchical(mesh["ep_node"], mesh["ep_rail"], node)

    def work() -> None:
        dispatcher(x_TD, choice, own, "loop").sum().backward()

    return [slowest_s(work) for _ in range(repeats)]


def expected_rows(slots: int, experts: int, nodes: int) -> tuple[float, float]:
    """Rows per token that cross to other nodes: flat, and once per token and node, of drawn as by `choose`."""
    missed = comb(experts - experts // nodes, slots) / comb(experts, slots)
    return slots * (1 - 1 / nodes), (nodes - 1) * (1 - missed)


def predicted_s(lab: Lab, slots: int, experts: int, tokens: int, width: int) -> dict[str, float]:
    """Fluid seconds of forward and backward: each exchange lasts as long as its busiest link; two levels add up."""
    ranks, nodes, links = lab.ranks, len(lab.hosts), lab.links()
    host_R = np.array(lab.host_of)
    per_node, row_bytes = ranks // nodes, 4 * width
    flat_rows, rail_rows = expected_rows(slots, experts, nodes)
    near_RR = host_R[:, None] == host_R
    rail_RR = ~near_RR & (np.arange(ranks)[:, None] % per_node == np.arange(ranks) % per_node)
    copies = tokens * slots / per_node  # of one rank's share of a node's rows to each rank of the node

    def slowest(rows_RR: Floats, bytes_per_row: float) -> float:
        return float((links.sums(rows_RR * bytes_per_row) / links.bytes_per_s_L).max())

    even_RR = np.full((ranks, ranks), tokens * slots / ranks)
    cross_RR, inside_RR = rail_RR * (tokens * rail_rows / (nodes - 1)), near_RR * copies
    extra = 4 * slots + 8 * slots  # weights and experts of all slots
    assert np.isclose((even_RR * ~near_RR).sum(), tokens * ranks * flat_rows)
    flat = sum(slowest(even_RR, row_bytes + more) for more in (4, 0, 0, 4))
    rail = sum(slowest(cross_RR, row_bytes + more) for more in (extra, 0, 0, 4 * slots))
    inside = sum(slowest(inside_RR, row_bytes + more) for more in (4, 0, 0, 4))
    return {"flat": flat, "hierarchical": rail + inside}


def levels(args: argparse.Namespace) -> list[Row]:
    """Two levels against one."""
    rows = []
    experts, width, nodes, up_mbit = 16, 512, 2, 50
    for per_node, slots in ((2, 2), (2, 4), (2, 8), (4, 2), (4, 4), (4, 8)):
        tokens = 512 // per_node
        given = (per_node, slots, experts, tokens, width, args.repeats + 1)
        seconds, link_bytes, spread = {}, {}, {}
        with Lab([Host(per_node, 1000, up_mbit)] * nodes) as lab:
            predicted = predicted_s(lab, slots, experts, tokens, width)
            for kind in ("flat", "hierarchical"):
                before = lab.uplinks()
                turns = lab.call(levels_on_rank, *given, kind, timeout_s=240)[0]
                moved = sum(now.out_bytes - then.out_bytes for now, then in zip(lab.uplinks(), before, strict=True))
                seconds[kind], link_bytes[kind] = float(np.median(turns[1:])), moved / len(turns)
                spread |= {f"{kind}_least_s": min(turns[1:]), f"{kind}_most_s": max(turns[1:])}
        row_bytes, ranks = 4 * width, per_node * nodes
        flat_rows, rail_rows = expected_rows(slots, experts, nodes)
        formula = {
            "flat": ranks * tokens * flat_rows * (4 * row_bytes + 8),
            "hierarchical": ranks * tokens * rail_rows * (4 * row_bytes + 16 * slots),
        }
        ratio, wanted = seconds["flat"] / seconds["hierarchical"], predicted["flat"] / predicted["hierarchical"]
        rows.append(
            {
                "hosts x ranks": f"{nodes} x {per_node}",
                "k": slots,
                **{f"{kind}_mb": link_bytes[kind] / 1e6 for kind in link_bytes},
                **{f"{kind}_bytes_over_formula": link_bytes[kind] / formula[kind] for kind in link_bytes},
                **{f"{kind}_s": seconds[kind] for kind in seconds},
                **spread,
                **{f"{kind}_over_predicted": seconds[kind] / predicted[kind] for kind in seconds},
                "times_faster": ratio,
                "predicted": wanted,
                "off": ratio / wanted - 1,
            }
        )
        show(rows[-1])
    return rows


AXES = {
    "one rank, 2 threads": [],
    "dp": ["dist.dp_shard=2"],
    "zero 1": ["dist.dp_shard=2", "dist.zero=1"],
    "zero 2": ["dist.dp_shard=2", "dist.zero=2"],
    "zero 3": ["dist.dp_shard=2", "dist.zero=3"],
    "tp": ["dist.tp=2"],
    "ep": ["dist.dp_shard=2", "dist.ep=2"],
    "pp, 1f1b": ["dist.pp=2"],
    "pp, interleaved": ["dist.pp=2", "dist.schedule=interleaved"],
    "pp, zero bubble": ["dist.pp=2", "dist.schedule=zero_bubble"],
}
STEP: dict[str, Any] = {
    "model": {
        "num_layers": 4,
        "width": 128,
        "attention": {"num_heads": 4, "qk_norm": "head"},
        "moe": {"num_experts": 8, "expert_width": 256},
    },
    "train": {"steps": 100, "length": 128, "sequences": 16, "micro_batches": 4, "precision": "fp32"},
}


def steps_on_rank(settings: list[str], repeats: int) -> float:
    """Median seconds of a step."""
    ranks = dist.get_world_size()
    recipe = build(Recipe, with_overrides(STEP, [f"train.threads={2 // ranks}", *settings]))
    token_N = np.random.default_rng(0).integers(0, 256, 100_000).astype(np.uint16)
    text = TokenFile(token_N, len(token_N), ["random"], [0])
    engine = Ranks(fit(recipe.dist, ranks), torch.device("cpu"), recipe) if ranks > 1 else None
    trainer = Trainer(recipe, TokenData(text, text, ByteTokenizer(), {}), engine)
    return float(np.median([slowest_s(trainer.run_step) for _ in range(repeats + 2)][2:]))


def axes(args: argparse.Namespace) -> list[Row]:
    """What ranks cost where there is nothing to gain from them."""
    rows: list[Row] = []
    for name, settings in AXES.items():
        seconds = run_on_ranks(steps_on_rank, settings, args.repeats, ranks=2 if settings else 1, timeout_s=200)[0]
        first = rows[0]["ms"] / 1e3 if rows else seconds
        rows.append({"axis": name, "ms": 1e3 * seconds, "overhead": seconds / first - 1})
        show(rows[-1])
    return rows


def show(row: Row) -> None:
    """One line."""
    cells = [f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()]
    print("  ".join(cells), flush=True)


PARTS = {"bandwidth": bandwidth, "levels": levels, "axes": axes}


def main() -> None:
    """Print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    reason = missing()
    result: Row = {"bench": "exchange", "date": time.strftime("%Y-%m-%d"), **environment(torch.device("cpu"))}
    for name in args.only:
        if name == "levels" and reason:
            print(f"skipped: {name}: {reason}")
            continue
        print(f"-- {name}")
        result[name] = PARTS[name](args)
    print(json.dumps(result))
    if args.out:
        kept = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps(kept | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
