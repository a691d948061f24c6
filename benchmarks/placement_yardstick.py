"""Our solver on the cases of a placement yardstick, scored by the yardstick's own cost model.

    python benchmarks/placement_yardstick.py --module FILE [--effort 1] [--bound-limit 20] [--table] [--seeds 1 2 3]
                                             [--cases sym_thin rails]

FILE has `build_cases()`, which returns {name: Instance}, and `score(instance, x)`, as in ../shared/placement/
yardstick.py; only these two and the Instance's fields are used. --cases takes those whose name has one of the words.

Prints one JSON object {case: {step_ms, bound_ms, seconds}}: the score of our placement (under the best split), a lower
bound on any placement's, and the seconds that placing took (after one call to compile and with the closed-form bound;
the tighter bound printed here, a linear programme, is not in them). With several seeds: the first one's, the longest
seconds, and beside them `all_step_ms` and `all_own_ms`, every answer under the best split and under its own. --table
also prints a table to stderr.
"""

import argparse
import importlib.util
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from moestro.cluster.links import from_use
from moestro.place.bound import dual_bound, quick_bound, relaxed_bound
from moestro.place.cost import Layer, TokenSet
from moestro.place.solve import solve


def load_module(path: Path) -> ModuleType:
    """FILE as a module of its own name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def layer_of(case: Any) -> Layer:
    """An Instance in our terms: milliseconds and megabytes become seconds and bytes."""
    topo = case.topo
    links = from_use(topo.host, tuple(topo.names), np.asarray(topo.bw) * 1e9, np.asarray(topo.use, bool), topo.above)
    return Layer(
        links=replace(links, latency_s=topo.latency_ms * 1e-3),
        token_SE=np.asarray(case.T, float),
        tokens_per_s_G=np.asarray(case.speed, float) * 1e3,
        slot_G=np.asarray(case.slots, np.int64),
        token_bytes=case.token_mb * 1e6,
        held_EG=np.asarray(case.x0) > 0,
        gradient_bytes=case.grad_mb * 1e6,
        state_bytes=case.state_mb * 1e6,
        sync_share=case.w_sync,
        horizon_steps=case.horizon,
        sets=[TokenSet(host, tuple(experts), tokens) for host, experts, tokens in case.types] if case.dedup else (),
    )


def run_case(module: ModuleType, case: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Place with every seed, score, bound once."""
    layer = layer_of(case)
    answers, seconds, steps_ms = [], [], []
    for seed in args.seeds:
        began = time.perf_counter()
        answers.append(solve(layer, effort=args.effort, seed=seed))
        quick_bound(layer)
        seconds.append(time.perf_counter() - began)
        steps_ms.append(float(module.score(case, answers[-1].placement.held_EG.astype(int))["step_ms"]))
    best = min(answers, key=lambda answer: answer.time.total_s)
    bound_s = max(relaxed_bound(layer, args.bound_limit, best.time.total_s), dual_bound(layer, best.state))
    row: dict[str, Any] = {"step_ms": steps_ms[0], "bound_ms": min(bound_s * 1e3, *steps_ms), "seconds": max(seconds)}
    if len(answers) > 1:
        row |= {"all_step_ms": steps_ms, "all_own_ms": [answer.time.total_s * 1e3 for answer in answers]}
    return row


def main() -> None:
    """Run every case; the JSON object is the only thing on stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", type=Path, required=True)
    parser.add_argument("--effort", type=float, default=1.0)
    parser.add_argument("--bound-limit", type=float, default=20.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--cases", nargs="*", default=[""])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    module = load_module(args.module)
    cases = module.build_cases()
    solve(layer_of(next(iter(cases.values()))), effort=0.05)
    results = {}
    for name, case in cases.items():
        if not any(word in name for word in args.cases):
            continue
        results[name] = run_case(module, case, args)
        if args.table:
            row = results[name]
            gap = 100 * (row["step_ms"] / row["bound_ms"] - 1)
            line = f"{name:32s} {row['step_ms']:9.3f} ms  bound {row['bound_ms']:9.3f} (+{gap:5.1f} %)"
            print(f"{line} in {row['seconds'] * 1e3:6.1f} ms", file=sys.stderr, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
