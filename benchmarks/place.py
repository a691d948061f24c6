"""Placement, measured: time of a solve at three scales, gap to a long search, balance beside EPLB's, and whole runs.

    python benchmarks/place.py [--only scale midsize balance replay record] [--samples 500] [--out FILE]

scale    58 layers x 256 experts on 320 devices; 64 devices x 256 experts
midsize  4 hosts x 8 devices, 32 experts, 64 slots on four networks, against a search 150 times as long and the LP bound
balance  max/mean tokens of a device where links are equal, and bytes between hosts, beside EPLB's two policies
replay   steps plus moves over `samples` x 10 steps of seven streams (streams.py) on two networks, against nothing,
         EPLB every 10 and 100 steps, a greedy spread every 10, and that spread with EMA 0.7 and a pay-back gate
record   writing the load trace, per step

The yardstick's cases have a script of their own (placement_yardstick.py). Prints tables, then one JSON line.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from eplb import place_global, place_hierarchical
from streams import STEPS_PER_SAMPLE, all_streams, drawn, zipf

from moestro.cluster.links import exception, links_of
from moestro.cluster.topology import Cluster, DeviceSpec, ExceptionSpec, LevelSpec
from moestro.place.bound import quick_bound, relaxed_bound
from moestro.place.cost import Layer, Placement, contiguous, even_split, exchange_bytes, move_bytes, step_time
from moestro.place.loads import LoadWriter
from moestro.place.planner import Gated
from moestro.place.policy import LONGEST_STEPS
from moestro.place.prepare import fixed_arrays, loaded, placement_of
from moestro.place.replay import Policy, Replay, Stay, replay
from moestro.place.solve import solve, split, spread_start

DEVICE = DeviceSpec(name="H100", memory_gib=80, memory_gb_per_s=3350, peak_tflops={"bf16": 989})
TOKEN_BYTES = 7168 * 2.0
TOKENS_PER_S = 4.5e6
STATE_BYTES = 704e6
Row = dict[str, Any]


def park(levels: Sequence[tuple[str, int, float, float]], *exceptions: ExceptionSpec) -> Cluster:
    """(name, fan_out, GB/s, sharing) from inside out."""
    network = tuple(LevelSpec(name=n, fan_out=f, gb_per_s=b, sharing=s, latency_us=20) for n, f, b, s in levels)
    return Cluster(name="bench", device=DEVICE, network=network, exception=exceptions)


def layer_on(cluster: Cluster, token_SE: NDArray[np.float64], slots: int, **values: Any) -> Layer:
    """A layer with the placement contiguous."""
    links = links_of(cluster, len(token_SE))
    slot_G = np.full(links.devices, slots)
    return Layer(
        links=links,
        token_SE=token_SE,
        tokens_per_s_G=np.full(links.devices, TOKENS_PER_S),
        slot_G=slot_G,
        token_bytes=TOKEN_BYTES,
        held_EG=contiguous(token_SE.shape[1], slot_G),
        **values,
    )


def scale(_: argparse.Namespace) -> list[Row]:
    """Wall time of solving."""
    rows = []
    for devices, slots, layers in (
        (8, 6, 20),
        (16, 8, 20),
        (32, 10, 10),
        (64, 5, 10),
        (64, 8, 10),
        (320, 1, 58),
        (320, 2, 58),
    ):
        experts = 32 if devices == 8 else 64 if devices == 16 else 256
        cluster = park([("host", 8, 450, 1), ("leaf", 4, 50, 1), ("spine", 10, 50, 4)])
        loads = [drawn(zipf(experts, seed, 0.8)[None], devices, 8, seed)[0] for seed in range(layers)]
        first = layer_on(cluster, loads[0], slots)
        solve(first)
        found, seconds = [], []
        for token_SE in loads:
            layer = replace(first, token_SE=token_SE)
            began = time.perf_counter()
            answer = solve(layer)
            bound = quick_bound(layer)
            seconds.append(time.perf_counter() - began)
            found.append((answer.time.total_s, bound, step_time(layer, split(layer, layer.held_EG)).total_s, layer))
        longer = solve(found[0][3], effort=40).time.total_s if devices <= 64 else float("nan")
        rows.append(
            {
                "devices": devices,
                "experts": experts,
                "slots": slots * devices,
                "layers": layers,
                "total_s": sum(seconds),
                "median_ms": 1e3 * float(np.median(seconds)),
                "over_contiguous": float(np.mean([c / a for a, _, c, _ in found])),
                "over_40x_search": found[0][0] / longer,
                "over_quick_bound": float(np.mean([a / b for a, b, _, _ in found])),
            }
        )
        show(rows[-1])
    return rows


def midsize(args: argparse.Namespace) -> list[Row]:
    """Against a long search."""
    rows = []
    nets = {
        "sym_100": park([("host", 8, 300, 1), ("network", 4, 100, 8)]),
        "thin_25": park([("host", 8, 300, 1), ("network", 4, 25, 8)]),
        "one_slow": park([("host", 8, 300, 1), ("network", 4, 100, 8)], exception("network", 3, gb_per_s=25)),
        "racks 4:1": park([("host", 8, 300, 1), ("leaf", 2, 100, 8), ("spine", 2, 50, 16)]),
    }
    for name, cluster in nets.items():
        layer = layer_on(cluster, drawn(zipf(32, 7)[None], 32, 2, 7)[0], 2)
        solve(layer, effort=0.05)
        began = time.perf_counter()
        answer = solve(layer)
        seconds = time.perf_counter() - began
        long = min(solve(layer, effort=args.long / 3, seed=seed).time.total_s for seed in (11, 12, 13))
        rows.append(
            {
                "network": name,
                "ms": 1e3 * seconds,
                "step_ms": 1e3 * answer.time.total_s,
                "over_long_search": answer.time.total_s / long,
                "over_bound": answer.time.total_s / relaxed_bound(layer, 60, long),
                "spread_near_over_long": near_time(layer, spread_start(layer)) / long,
                "eplb_even_over_long": step_time(layer, eplb_placement(layer)).total_s / long,
                "contiguous_over_long": near_time(layer, layer.held_EG) / long,
            }
        )
        show(rows[-1])
    return rows


def near_placement(layer: Layer, held_EG: NDArray[np.bool_]) -> Placement:
    """Every source to the replicas on its host, else to all, evenly."""
    return placement_of(layer, loaded(fixed_arrays(layer), held_EG))


def near_time(layer: Layer, held_EG: NDArray[np.bool_]) -> float:
    return step_time(layer, near_placement(layer, held_EG)).total_s


def eplb_placement(layer: Layer, hierarchical: bool = False) -> Placement:
    """EPLB's plan with the even split it assumes; two copies on one device take two shares."""
    slots, load_E = int(layer.slot_G.min()), layer.token_SE.sum(axis=0)
    hosts, devices = layer.links.hosts, layer.links.devices
    copies_EG = (
        place_hierarchical(load_E, hosts, devices // hosts, slots)
        if hierarchical
        else place_global(load_E, devices, slots)
    )
    even = even_split(copies_EG > 0)
    weight_EP = np.where(even.device_EP >= 0, np.take_along_axis(copies_EG, np.maximum(even.device_EP, 0), 1), 0.0)
    return replace(even, share_AEP=(weight_EP / weight_EP.sum(axis=1, keepdims=True))[None])


def balance(_: argparse.Namespace) -> list[Row]:
    """Where links are equal only compute counts; on hosts, bytes between them."""
    rows = []
    flat = park([("host", 16, 450, 1)])
    hosted = park([("host", 8, 450, 1), ("network", 2, 50, 1)])
    for experts, slots, slope in ((32, 4, 1.0), (64, 6, 0.8), (128, 10, 0.6)):
        token_SE = drawn(zipf(experts, 5, slope)[None], 16, 8, 5)[0]
        row: Row = {"experts": experts, "slots": 16 * slots}
        layer = replace(layer_on(flat, token_SE, slots), exchanges=1e-3)
        row["max_over_mean"] = imbalance(layer, solve(layer).placement)
        row["eplb_max_over_mean"] = imbalance(layer, eplb_placement(layer))
        layer = layer_on(hosted, token_SE, slots)
        ours = solve(layer).placement
        for name, placement in (
            ("", ours),
            ("eplb_", eplb_placement(layer)),
            ("eplb_hier_", eplb_placement(layer, hierarchical=True)),
        ):
            row[f"{name}cross_mb"] = crossing(layer, placement) / 1e6
        row["hosted_max_over_mean"] = imbalance(layer, ours)
        rows.append(row)
        show(row)
    return rows


def imbalance(layer: Layer, placement: Placement) -> float:
    load_G = placement.flow_SG(layer.token_SE).sum(axis=0)
    return float(load_G.max() / load_G.mean())


def crossing(layer: Layer, placement: Placement) -> float:
    """Bytes that leave hosts in one dispatch."""
    names = layer.links.names
    bytes_L = exchange_bytes(layer, placement)
    return float(
        sum(b for b, name in zip(bytes_L, names, strict=True) if name.startswith("host") and name.endswith("out"))
    )


@dataclass(kw_only=True)
class Periodic:
    """Plan anew at every call with some planner."""

    make: Callable[[Layer], Placement]

    def plan(self, layer: Layer, sample: int) -> Placement:
        return self.make(layer)


@dataclass(kw_only=True)
class GatedSpread:
    """The greedy spread with a moving average (0.7) and a pay-back gate: the baseline to beat."""

    total_steps: int
    mean_SE: NDArray[np.float64] | None = None

    def plan(self, layer: Layer, sample: int) -> Placement:
        self.mean_SE = layer.token_SE if self.mean_SE is None else 0.7 * self.mean_SE + 0.3 * layer.token_SE
        seen = replace(layer, token_SE=self.mean_SE)
        held_EG = spread_start(seen)
        stay, go = near_placement(seen, layer.held_EG), near_placement(seen, held_EG)
        left = min(self.total_steps - sample * STEPS_PER_SAMPLE, LONGEST_STEPS)
        gain = (
            step_time(replace(seen, state_bytes=0.0), stay).total_s
            - step_time(replace(seen, state_bytes=0.0), go).total_s
        )
        cost = float((move_bytes(seen, held_EG) / layer.links.bytes_per_s_L).max())
        return go if gain * left > cost else stay


def replays(args: argparse.Namespace) -> list[Row]:
    """Whole runs."""
    nets = {
        "sym_thin": park([("host", 4, 300, 1), ("network", 2, 12.5, 4)]),
        "one_slow_nic": park([("host", 2, 300, 1), ("network", 4, 50, 2)], exception("network", 3, gb_per_s=12.5)),
    }
    rows = []
    for net, cluster in nets.items():
        if args.network and net not in args.network:
            continue
        for name, load_NSE in all_streams(args.samples, 8, 32):
            if args.stream and name not in args.stream:
                continue
            experts = load_NSE.shape[2]
            slots = 6 if experts == 32 else experts * 3 // 16
            layer = layer_on(cluster, load_NSE[0], slots, state_bytes=STATE_BYTES)
            total = (len(load_NSE) - 1) * STEPS_PER_SAMPLE
            ours = Gated(interval_steps=STEPS_PER_SAMPLE, total_steps=total)
            policies: dict[str, tuple[Policy, int]] = {
                "nothing": (Stay(), 1),
                "eplb 10": (Periodic(make=eplb_placement), 1),
                "eplb 100": (Periodic(make=eplb_placement), 10),
                "spread 10": (Periodic(make=lambda seen: near_placement(seen, spread_start(seen))), 1),
                "gated spread": (GatedSpread(total_steps=total), 1),
                "ours": (ours, 1),
            }
            row: Row = {"network": net, "stream": name, "experts": experts, "steps": total}
            for policy_name, (policy, every) in policies.items():
                if args.policy and policy_name not in args.policy:
                    continue
                began = time.perf_counter()
                found = replay(layer, list(load_NSE), policy, STEPS_PER_SAMPLE, every)
                row[policy_name] = summary(found, time.perf_counter() - began)
            rows.append(row)
            show_replay(row)
    return rows


def summary(found: Replay, seconds: float) -> Row:
    return {
        "total_s": round(found.total_s, 3),
        "move_s": round(found.move_s, 3),
        "plans": found.plans,
        "moved": sum(found.moved),
        "median_moved_share": round(found.median_moved_share, 4),
        "seconds": round(seconds, 1),
    }


def show_replay(row: Row) -> None:
    text = "  ".join(
        f"{name} {v['total_s']:.1f} ({v['move_s']:.1f} in {v['plans']} moving {v['moved']})"
        for name, v in row.items()
        if isinstance(v, dict)
    )
    print(f"{row['network']:13s} {row['stream']:9s} {text}", end="")
    if "ours" in row and "gated spread" in row:
        print(f"  gain over gated {100 * (1 - row['ours']['total_s'] / row['gated spread']['total_s']):.1f} %", end="")
    print(flush=True)


def record(_: argparse.Namespace) -> list[Row]:
    """Microseconds to append one step's loads."""
    rows = []
    for layers, experts, sources, pairs in (
        (16, 64, 1, False),
        (58, 256, 1, False),
        (58, 256, 8, False),
        (16, 64, 8, True),
    ):
        count_LSE = np.random.default_rng(0).integers(0, 9999, (layers, sources, experts))
        pair_LX = np.ones((layers, experts * (experts - 1) // 2), np.int64) if pairs else None
        with TemporaryDirectory() as folder:
            writer = LoadWriter(Path(folder, "loads.trace"), layers, experts)
            seconds = []
            for step in range(200):
                began = time.perf_counter()
                writer.append(step, count_LSE, pair_LX)
                seconds.append(time.perf_counter() - began)
            writer.close()
            size = Path(folder, "loads.trace").stat().st_size / 200
        rows.append(
            {
                "layers": layers,
                "experts": experts,
                "sources": sources,
                "pairs": pairs,
                "us_per_step": 1e6 * float(np.median(seconds)),
                "bytes_per_step": size,
            }
        )
        show(rows[-1])
    return rows


def show(row: Row) -> None:
    """One line of a table."""
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


SECTIONS = {"scale": scale, "midsize": midsize, "balance": balance, "replay": replays, "record": record}


def main() -> None:
    """Run the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--stream", nargs="*", default=[])
    parser.add_argument("--network", nargs="*", default=[])
    parser.add_argument("--policy", nargs="*", default=[], help="of replay; all where none is named")
    parser.add_argument("--long", type=float, default=450.0, help="effort of the long search in midsize")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: Row = {"bench": "place", "machine": platform.processor() or platform.machine(), "date": time.strftime("%F")}
    for name in args.only:
        print(f"== {name}", flush=True)
        found[name] = SECTIONS[name](args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
