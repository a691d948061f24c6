"""What exchange in chunks saves, and what timing every message costs.

    python benchmarks/overlap.py [--mbit 400] [--ranks 2] [--repeats 7]

A layer of experts forward and backward on gloo ranks of one thread each, tokens cut into 1, 2, 4 parts (dist.chunks):
over the loopback, and with --mbit over links of that rate between the ranks (benchmarks/lab.py, needs root). Turns are
taken chunk by chunk, so that a busy machine slows all alike. Printed are the slowest rank's seconds, median and best of
all turns, and processor seconds of all ranks, which say what chunks cost whatever else runs. Then the cost of the clock
that all messages pass, and of the account that ranks make of five steps of 100 messages each.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from lab import Host, Lab, skip_without_lab

from moestro.core.specs import MoESpec
from moestro.dist.dispatch import AllToAll
from moestro.dist.layout import Layout
from moestro.dist.mesh import Mesh
from moestro.dist.testing import run_on_ranks
from moestro.dist.timeline import CLOCK, agree
from moestro.nn.experts import Experts
from moestro.nn.routing_rules import Choice

CHUNKS = (1, 2, 4)
TOKENS, WIDTH, HIDDEN, EXPERTS, SLOTS = 2048, 256, 512, 8, 2
MESSAGES, STEPS = 100, 5


def layer_s(repeats: int, ranks: int) -> dict[int, list[float]]:
    """By number of chunks: median and best seconds of the slowest rank, median processor seconds of all ranks."""
    mesh = Mesh(Layout(dp_shard=ranks, ep=ranks), torch.device("cpu"))
    torch.manual_seed(mesh.rank)
    experts = Experts(WIDTH, MoESpec(num_experts=EXPERTS // ranks, expert_width=HIDDEN))
    experts.initialise(0.02, 0.02)
    x_TD = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight_TK = torch.rand(TOKENS, SLOTS, requires_grad=True)
    expert_TK = torch.rand(TOKENS, EXPERTS).topk(SLOTS).indices
    dispatchers = {chunks: AllToAll(mesh["ep"], chunks=chunks) for chunks in CHUNKS}
    taken: dict[int, list[tuple[float, float]]] = {chunks: [] for chunks in CHUNKS}
    for turn in range(repeats + 1):
        for chunks, dispatcher in dispatchers.items():
            dist.barrier()
            begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
            dispatcher(x_TD, Choice(expert_TK, weight_TK), experts, "fused").square().mean().backward()
            slowest, cpu = torch.tensor([time.perf_counter() - begun_s, time.process_time() - begun_cpu_s]).split(1)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            dist.all_reduce(cpu)
            taken[chunks] += [(float(slowest), float(cpu))] if turn else []
    walls = {chunks: [wall for wall, _ in times] for chunks, times in taken.items()}
    cpus = {chunks: statistics.median(cpu for _, cpu in times) for chunks, times in taken.items()}
    return {chunks: [statistics.median(wall), min(wall), cpus[chunks]] for chunks, wall in walls.items()}


def clock_s(repeats: int, ranks: int) -> tuple[float, float]:
    """Seconds that one message costs the clock, and processor seconds that an account of some steps takes a rank."""
    mesh = Mesh(Layout(dp_shard=ranks), torch.device("cpu"))
    one, accounts = torch.zeros(1), []
    for _ in range(repeats):
        for step in range(STEPS):
            CLOCK.begin()
            begun_s = time.perf_counter()
            for _ in range(MESSAGES):
                with CLOCK.message(mesh["dp"], one.is_cuda):
                    pass
            message_s = (time.perf_counter() - begun_s) / MESSAGES
            CLOCK.end(step)
        dist.barrier()
        begun_s = time.process_time()
        agree(CLOCK, mesh)
        accounts.append(time.process_time() - begun_s)
    return message_s, statistics.median(accounts)


def main() -> None:
    """Print both tables and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--mbit", type=float, default=0)
    given = parser.parse_args()

    def on_ranks(work: Callable[..., Any]) -> Any:
        if not given.mbit:
            return run_on_ranks(work, given.repeats, given.ranks, ranks=given.ranks)[0]
        with Lab([Host(ranks=1, up_mbit=given.mbit)] * given.ranks) as lab:
            return lab.call(work, given.repeats, given.ranks, timeout_s=120)[0]

    if given.mbit:
        skip_without_lab()
    times = on_ranks(layer_s)
    link = f"{given.mbit:g} Mbit/s" if given.mbit else "loopback"
    sizes = f"{TOKENS} tokens of width {WIDTH} each, {SLOTS} of {EXPERTS} experts of {HIDDEN} for each"
    print(f"{given.ranks} ranks, {link}, {sizes}")
    print("chunks   median ms     best ms   processor ms")
    for chunks, seconds in times.items():
        cells = [f"{1e3 * s:6.0f} ({s / one:4.2f})" for s, one in zip(seconds, times[1], strict=True)]
        print(f"{chunks:6d} {'  '.join(cells)}")
    message_s, account_s = on_ranks(clock_s)
    print(f"clock: {1e6 * message_s:.1f} us a message; account of {STEPS} steps: {1e3 * account_s:.2f} ms of processor")
    row = {"bench": "overlap", "ranks": given.ranks, "mbit": given.mbit, "layer_s": times}
    print(json.dumps({**row, "message_s": message_s, "account_s": account_s}))


if __name__ == "__main__":
    main()
