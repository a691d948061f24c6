"""What live rebalancing costs while nothing moves, on ranks of this machine.

    python benchmarks/rebalance.py [--ranks 4] [--steps 40]

Trainers of the same model take turns, step by step, on the same ranks, so that all see the same machine: experts in
order, the same with `balance.enabled` between decisions (one slot of five is empty, and stepped by the optimiser), the
same without an empty slot, and with every expert held twice. Compared are sums of steps:
single ones shake more than the difference. Then, on one rank, seconds of recording: counts by source, imbalance, bytes
and the trace in every step, pairs of experts in one of train.pairs_every; and of one decision, in its way and beside.

Prints a table, then one JSON line.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moestro.cluster.links import links_of
from moestro.cluster.topology import read_cluster
from moestro.core.config import build
from moestro.core.tokens import ByteTokenizer
from moestro.dist.layout import fit
from moestro.dist.testing import run_on_ranks
from moestro.nn.permute import pairs_of
from moestro.place.cost import contiguous, even_split
from moestro.place.loads import LoadWriter
from moestro.place.plan_file import save_placements
from moestro.place.planner import compile_searches
from moestro.train.data import TokenData, TokenFile
from moestro.train.loop import loads_of
from moestro.train.ranks import Ranks
from moestro.train.recipe import Recipe
from moestro.train.trainer import Trainer

EXPERTS, LAYERS, LENGTH, SEQUENCES, WARM_UP = 16, 4, 256, 8, 2
CLUSTER = """name = "here"
[device]
name = "CPU"
memory_gib = 64
memory_gb_per_s = 10
[device.peak_tflops]
fp32 = 0.1
[[network]]
name = "host"
gb_per_s = 2
"""


def trainer(ranks: int, balance: dict[str, Any]) -> Trainer:
    """The benchmark's model on random tokens."""
    table = {
        "model": {
            "num_layers": LAYERS,
            "width": 256,
            "vocab_size": 4096,
            "attention": {"num_heads": 4},
            "moe": {"num_experts": EXPERTS, "expert_width": 512, "router": {"rule": "top2"}},
        },
        "train": {"steps": 10_000, "length": LENGTH, "sequences": SEQUENCES, "precision": "fp32", "pairs_every": 0},
        "dist": {"ep": ranks},
        "balance": {"interval": 5_000, **balance},
    }
    recipe = build(Recipe, table)
    token_N = np.random.default_rng(0).integers(0, 4096, 400_000).astype(np.uint16)
    tokens = TokenFile(token_N, len(token_N), ["random"], [0])
    engine = Ranks(fit(recipe.dist, ranks), torch.device("cpu"), recipe)
    return Trainer(recipe, TokenData(tokens, tokens, ByteTokenizer(), {}), engine)


def measure(ranks: int, steps: int, folder: str) -> dict[str, Any]:
    """Milliseconds of each kind of step, and of recording and deciding."""
    kinds = {
        "in order": trainer(ranks, {}),
        "balance.enabled": trainer(ranks, {"enabled": True, "cluster": f"{folder}/cluster.toml"}),
        "no empty slot": trainer(
            ranks, {"enabled": True, "cluster": f"{folder}/cluster.toml", "slots": EXPERTS // ranks}
        ),
        "experts held twice": trainer(ranks, {"placement": f"{folder}/twice.toml"}),
    }
    spent_s: dict[str, list[float]] = {name: [] for name in kinds}
    for step in range(steps + WARM_UP):
        for name, one in kinds.items():
            dist.barrier()
            begun_s = time.perf_counter()
            result = one.run_step()
            dist.barrier()
            if step >= WARM_UP:
                spent_s[name].append(time.perf_counter() - begun_s)
    engine = kinds["balance.enabled"].engine
    assert isinstance(engine, Ranks)
    assert engine.balance is not None
    assert engine.balance.rebalancer is not None
    assert engine.exchanges is not None
    own = dict(zip(engine.layers, result.records, strict=True))
    assert engine.record_sums is not None
    writer = LoadWriter(Path(folder, f"loads-{dist.get_rank()}.trace"), LAYERS, EXPERTS)

    def record(pairs: bool) -> None:
        assert engine.balance is not None
        assert engine.balance.rebalancer is not None
        assert engine.exchanges is not None
        assert engine.record_sums is not None
        seen = own
        if pairs:
            seen = {layer: replace(one, pair_X=pairs_of(choice_TK, EXPERTS)) for layer, one in own.items()}
        rows = engine.record_sums.rows(seen, pairs, engine.mesh.device)
        records = engine.record_sums.read(seen, rows, pairs)
        engine.balance.rebalancer.watch(records)
        engine.exchanges.begin()
        engine.exchanges.read(engine.exchanges.numbers(own))
        writer.append(1, *loads_of(records))

    choice_TK = torch.rand(LENGTH * SEQUENCES // ranks, EXPERTS).topk(2).indices
    record_s = {pairs: mean_s(lambda pairs=pairs: record(pairs)) for pairs in (False, True)}
    dist.barrier()
    begun_s = time.perf_counter()
    rebalancer = engine.balance.rebalancer
    rebalancer.begin(kinds["balance.enabled"].step)
    begin_s = time.perf_counter() - begun_s
    if rebalancer.decision:
        rebalancer.decision.result()
    beside_s = time.perf_counter() - begun_s - begin_s
    dist.barrier()
    begun_s = time.perf_counter()
    rebalancer.adopt(kinds["balance.enabled"].step, engine.first, kinds["balance.enabled"].optimizer)
    adopt_s = time.perf_counter() - begun_s
    times = {name: 1e3 * float(np.mean(values)) for name, values in spent_s.items()}
    halves = {name: [1e3 * float(np.mean(values[half::2])) for half in (0, 1)] for name, values in spent_s.items()}
    return {
        "ms": times,
        "halves": halves,
        "record_ms": 1e3 * record_s[False],
        "record_pairs_ms": 1e3 * record_s[True],
        "decide_ms": 1e3 * (begin_s + adopt_s),
        "search_ms": 1e3 * beside_s,
    }


def mean_s(work: Callable[[], None], times: int = 200) -> float:
    """Of one call."""
    begun_s = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - begun_s) / times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "cluster.toml").write_text(CLUSTER)
        compile_searches(links_of(read_cluster(Path(folder, "cluster.toml")), asked.ranks))
        held_EG = contiguous(EXPERTS, np.full(asked.ranks, EXPERTS))
        twice = even_split(held_EG | np.roll(held_EG, 1, axis=1))
        save_placements(Path(folder, "twice.toml"), [twice] * LAYERS)
        found = run_on_ranks(measure, asked.ranks, asked.steps, folder, ranks=asked.ranks, timeout_s=900)[0]
    plain = found["ms"]["in order"]
    for name, ms in found["ms"].items():
        shown = " ".join(f"{half:.1f}" for half in found["halves"][name])
        print(f"{name:20s} {ms:9.1f} ms a step ({ms / plain - 1:+.2%}; odd and even steps {shown})")
    for name, kind in (("recording", "record_ms"), ("recording pairs too", "record_pairs_ms")):
        print(f"{name:20s} {found[kind]:9.3f} ms a step ({found[kind] / plain:.2%})")
    shown = f"{found['decide_ms']:9.1f} ms in the way of steps, {found['search_ms']:.1f} ms beside them"
    print(f"{'one decision':20s} {shown}")
    print(json.dumps({"bench": "rebalance", "ranks": asked.ranks, "steps": asked.steps, **found}))


if __name__ == "__main__":
    main()
