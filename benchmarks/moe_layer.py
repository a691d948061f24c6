"""The MoE layer after routing, forward and backward, beside other projects' and beside dense matrix products.

    python benchmarks/moe_layer.py [--quick] [--dtype float32] [--experts 16] [--out FILE]

T = 4096 tokens, d = 512, f = 1024, E in {16, 64}; K = 2 and mean K = 1.35; even and Zipf-1 loads; fp32 and bf16. Every
repetition routes anew, as training does: oneDNN compiles bfloat16 products per shape, so a benchmark that repeats one
routing hides a cost that every step pays. All contestants see the same routings in the same order, in turn, so that a
drift of the machine hits all alike. Times are lower quartiles in milliseconds, because what else a machine does only
ever adds: on the wall's clock, and of the processor over all threads, which holds on a machine that others use too (it
leaves out waiting for one another). The ceiling is the same FLOPs as six dense products; `memory` is the growth of the
peak resident size of a process that runs the layer once.

Prints a table, then one JSON line. Parts (`--dtype`, `--experts`) can be run at different times and put together in one
file (`--out`).
"""

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from peers import BF16_ONLY, PEERS, VARIABLE_K, Peer
from torch import Tensor

from moestro.train.device import keep_freed_memory

TOKENS, WIDTH, HIDDEN = 4096, 512, 1024
DTYPES = ("float32", "bfloat16")
WARM_UP = 10
"""Rounds before any is counted: until freed blocks fit what is asked for next, pages are mapped and zeroed anew."""
Routing = tuple[Tensor, Tensor]


def draw_routing(num_experts: int, mean_k: float, zipf: bool, seed: int) -> Routing:
    """expert_TK and weight_TK: even or Zipf-1 popularity; below K = 2 some second slots are unused."""
    draw = torch.Generator().manual_seed(seed)
    popularity_E = 1 / torch.arange(1, num_experts + 1) if zipf else torch.ones(num_experts)
    expert_TK = torch.multinomial(popularity_E.expand(TOKENS, -1), 2, generator=draw)
    weight_TK = torch.rand(TOKENS, 2, generator=draw)
    if mean_k < 2:
        unused_T = torch.rand(TOKENS, generator=draw) > mean_k - 1
        expert_TK[unused_T, 1] = num_experts
        weight_TK[unused_T, 1] = 0
    return expert_TK, weight_TK


def ceiling(rows: int, dtype: torch.dtype) -> Callable[[], None]:
    """The FLOPs of a forward and backward pass as six dense products."""
    x, up, act = (torch.randn(rows, size, dtype=dtype) for size in (WIDTH, 2 * HIDDEN, HIDDEN))
    weight_up, weight_down = torch.randn(WIDTH, 2 * HIDDEN, dtype=dtype), torch.randn(HIDDEN, WIDTH, dtype=dtype)
    outs = [
        torch.empty(shape, dtype=dtype) for shape in (up.shape, x.shape, act.shape, weight_up.shape, weight_down.shape)
    ]

    def run() -> None:
        torch.mm(x, weight_up, out=outs[0])
        torch.mm(act, weight_down, out=outs[1])
        torch.mm(x, weight_down.t(), out=outs[2])
        torch.mm(act.t(), x, out=outs[4])
        torch.mm(x.t(), up, out=outs[3])
        torch.mm(up, weight_up.t(), out=outs[1])

    return run


def one_pass(peer: Peer, x_TD: Tensor, routing: Routing, d_y_TD: Tensor) -> None:
    """Forward and backward, gradients to input, weights and routing weights."""
    for tensor in (x_TD, *peer.parameters):
        tensor.grad = None
    peer.layer(x_TD, routing[0], routing[1].detach().requires_grad_()).backward(d_y_TD)


def seconds(call: Callable[[], None]) -> tuple[float, float]:
    """Wall-clock seconds, and processor seconds of all threads."""
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - begun_s, time.process_time() - begun_cpu_s


def weights_for(num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return (
        (0.02 * torch.randn(num_experts, WIDTH, 2 * HIDDEN, generator=draw)).to(dtype),
        (0.02 * torch.randn(num_experts, HIDDEN, WIDTH, generator=draw)).to(dtype),
    )


def make_peers(num_experts: int, dtype: torch.dtype, variable_k: bool) -> tuple[dict[str, Peer], dict[str, str]]:
    """Contestants that can run here, and why others cannot."""
    peers, absent = {}, {}
    for name, make in PEERS.items():
        if (variable_k and name not in VARIABLE_K) or (dtype == torch.float32 and name in BF16_ONLY):
            continue
        try:
            peers[name] = make(*weights_for(num_experts, dtype))
        except ImportError as error:
            absent[name] = str(error)
    return peers, absent


def peak_growth_mib(name: str, num_experts: int, dtype: torch.dtype) -> float:
    """Run one pass in a child process; growth of its peak resident memory in MiB."""
    read, write = os.pipe()
    if os.fork() == 0:
        torch.set_num_threads(1)  # a forked process has no OpenMP pool
        peer = PEERS[name](*weights_for(num_experts, dtype))
        x_TD, routing = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_(), draw_routing(num_experts, 2, False, 1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        one_pass(peer, x_TD, routing, torch.randn(TOKENS, WIDTH).to(dtype))
        os.write(write, str((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024).encode())
        os._exit(0)
    os.close(write)
    os.wait()
    return float(os.read(read, 100) or b"nan")


def run_case(num_experts: int, dtype: torch.dtype, mean_k: float, zipf: bool, repeats: int) -> dict[str, list[float]]:
    """Wall-clock and processor milliseconds of the ceiling and of every contestant, measured in turn."""
    rows = sum(int((draw_routing(num_experts, mean_k, zipf, seed)[0] < num_experts).sum()) for seed in range(4)) // 4
    dense, (peers, _) = ceiling(rows, dtype), make_peers(num_experts, dtype, mean_k < 2)
    x_TD, d_y_TD = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_(), torch.randn(TOKENS, WIDTH).to(dtype)
    times: dict[str, list[tuple[float, float]]] = {"ceiling": [], **{name: [] for name in peers}}
    for repeat in range(-WARM_UP, repeats):
        routing = draw_routing(num_experts, mean_k, zipf, seed=1000 + repeat)
        spent = {"ceiling": seconds(dense)}
        spent |= {name: seconds(partial(one_pass, peer, x_TD, routing, d_y_TD)) for name, peer in peers.items()}
        if repeat >= 0:
            for name, pair in spent.items():
                times[name].append(pair)
    return {
        name: [round(1e3 * statistics.quantiles(kind, n=4)[0], 1) for kind in zip(*pairs, strict=True)]
        for name, pairs in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--dtype", choices=DTYPES, help="only this type")
    parser.add_argument("--experts", type=int, choices=(16, 64), help="only this many")
    parser.add_argument("--out", type=Path, help="a JSON file to add the rows to, in place of the same cases there")
    options = parser.parse_args()
    keep_freed_memory()
    for name, why in make_peers(2, torch.float32, False)[1].items():
        print(f"{name} is not installed: {why}", file=sys.stderr)
    facts = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    rows: list[dict[str, Any]] = []
    dtypes, experts = [options.dtype] if options.dtype else DTYPES, [options.experts] if options.experts else (16, 64)
    for dtype, num_experts in itertools.product(dtypes, experts):
        names = make_peers(2, getattr(torch, dtype), False)[0]
        memory = {name: round(peak_growth_mib(name, num_experts, getattr(torch, dtype))) for name in names}
        rows.append({"dtype": dtype, "experts": num_experts, "memory_mib": memory})
        print(f"\n{dtype}, {num_experts} experts, peak memory growth of one pass, MiB:", memory)
        for zipf, mean_k in itertools.product((False, True), (2.0, 1.35)):
            found = run_case(num_experts, getattr(torch, dtype), mean_k, zipf, 3 if options.quick else 7)
            load = "zipf" if zipf else "even"
            rows.append({"dtype": dtype, "experts": num_experts, "load": load, "k": mean_k, "ms": found})
            print_case(rows[-1], found)
            table = {"bench": "moe_layer", "date": time.strftime("%Y-%m-%d"), **facts, "rows": rows}
            if options.out:
                keep(options.out, table)
    print(json.dumps(table))


def keep(path: Path, table: dict[str, Any]) -> None:
    """Write the rows, and those of other cases that the file has."""
    rows = table["rows"]
    if path.exists():
        mine = [case_of(row) for row in rows]
        rows = [row for row in json.loads(path.read_text())["rows"] if case_of(row) not in mine] + rows
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.write_text(json.dumps({**table, "rows": []}).removesuffix("]}") + f"\n  {lines}\n]}}\n")


def case_of(row: dict[str, Any]) -> list[Any]:
    """What a row is about."""
    return [row.get(key) for key in ("dtype", "experts", "load", "k")]


def print_case(case: dict[str, Any], found: dict[str, list[float]]) -> None:
    print(f"\n{case['dtype']}, {case['experts']} experts, {case['load']} load, mean K = {case['k']}")
    for name, (wall, cpu) in found.items():
        print(
            f"  {name:26s} {wall:8.1f} ms   {wall / found['ceiling'][0]:.2f} x ceiling"
            f"   processor {cpu:8.1f} ms   {cpu / found['ceiling'][1]:.2f} x"
        )
    sys.stdout.flush()


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
