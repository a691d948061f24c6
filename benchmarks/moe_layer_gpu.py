"""The sparse layer on a GPU, beside dense products and other ways: times, memory, and the step of a whole model.

    python benchmarks/moe_layer_gpu.py [--out FOLDER] [--quick] [--seconds 300] [--only STAGE,...] [--resume]

One run does, in order of worth: compile every kernel (gpu_compile.py), compare every contestant with float64, time all
shapes (all contestants on balanced loads, ours on all loads), train a 16-layer model for some steps, time routing, and
time the others on uneven loads. Contestants get the same routings, in turn, new ones in every round; times are medians
between events on the device, with all launches queued before. What fails is named and left out, and so is what is left
when the seconds are over; a lost device ends the process with code 75, and --resume does the rest (gpu_report.py).
Without a GPU a dry run of toy shapes goes through Triton's interpreter: it shows that the script works, nothing else.

Prints tables, then one JSON line; writes both into FOLDER ($OUT where that is set, else runs/moe-layer-gpu).

Dimension key:  T tokens   D width   E experts   K slots
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if os.environ.get("MOE_LAYER_GPU_DRY") == "1":
    os.environ["TRITON_INTERPRET"] = "1"

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # runs where moestro is not installed

from gpu_cases import BY_WORTH, LOADS, SHAPES, TOY, Peer, Shape, contestants, dense_products, draw_routing, draw_weights
from gpu_report import DEVICE, Report, Row, verdicts

from moestro.nn.path_choice import device_ms

DTYPE = torch.bfloat16
STAGES = ["compile", "check", "layer", "step", "routing", "uneven"]
ON_ALL_LOADS = "moestro triton"
"""The contestant that aims are about."""
Make = Callable[[torch.Tensor, torch.Tensor], Peer]


def milliseconds(calls: list[Callable[[], Any]]) -> float:
    """Median over calls, after the first."""
    return statistics.median([one_ms(call) for call in calls][1:] or [one_ms(calls[0])])


def one_ms(call: Callable[[], Any]) -> float:
    """Time of one call; without a GPU by the host's clock."""
    if DEVICE == "cuda":
        return device_ms(call)
    begun_s = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begun_s)


def made(name: str, make: Make, weights: Sequence[torch.Tensor], report: Report) -> Peer | None:
    """A contestant, or None where it is not installed."""
    try:
        return make(*weights)
    except ImportError as error:
        report.found["absent"][name] = str(error)[:200]
        return None


def passes(peer: Peer, shape: Shape, load: str, rounds: int, backward: bool) -> list[Callable[[], Any]]:
    """One call per round, each on a routing of its own."""
    x_TD = torch.randn(shape.tokens, shape.width, device=DEVICE, dtype=DTYPE).requires_grad_(backward)
    d_y_TD = torch.randn_like(x_TD)
    routings = [draw_routing(shape, load, seed, DEVICE) for seed in range(min(rounds, 3))]

    def run(expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> None:
        if not backward:
            with torch.no_grad():
                peer.layer(x_TD, expert_TK, weight_TK)
            return
        weight_TK = weight_TK.detach().requires_grad_()
        torch.autograd.grad(peer.layer(x_TD, expert_TK, weight_TK), [x_TD, weight_TK, *peer.parameters], d_y_TD)

    return [lambda r=routings[i % len(routings)]: run(*r) for i in range(rounds)]


def memory_mib(peer: Peer, shape: Shape) -> list[float]:
    """Kept between forward and backward, and the peak of both beyond what was there and the gradients of weights."""
    if DEVICE == "cpu":
        return [0.0, 0.0]
    x_TD = torch.randn(shape.tokens, shape.width, device=DEVICE, dtype=DTYPE, requires_grad=True)
    expert_TK, weight_TK = draw_routing(shape, "balanced", 9, DEVICE)
    weight_TK.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y_TD = peer.layer(x_TD, expert_TK, weight_TK)
    kept = torch.cuda.memory_allocated() - before - y_TD.nbytes
    torch.autograd.grad(y_TD, [x_TD, weight_TK, *peer.parameters], torch.randn_like(y_TD))
    gradients = sum(parameter.nbytes for parameter in peer.parameters)
    peak = torch.cuda.max_memory_allocated() - before - gradients
    return [kept / 2**20, peak / 2**20]


def check(report: Report) -> None:
    """Every contestant against float64, values and gradients, on fresh inputs; ours also with poisoned memory."""
    shape = TOY[0] if DEVICE == "cpu" else Shape(1024, 256, 384, 16, 2)
    rows: dict[str, Any] = {}
    for load in ("balanced", "zipf"):
        expert_TK, weight_TK = draw_routing(shape, load, 5, DEVICE)
        x_TD = torch.randn(shape.tokens, shape.width, device=DEVICE).to(DTYPE)
        d_y_TD = torch.randn_like(x_TD)
        weights = draw_weights(shape, DEVICE)
        exact = [weight.double().requires_grad_() for weight in weights]
        right = reference(x_TD.double(), expert_TK, weight_TK.double(), *exact, d_y_TD.double())
        for name, make in contestants(shape).items():

            def errors(name: str = name, make: Make = make) -> list[float] | None:
                peer = made(name, make, weights, report)
                if peer is None:
                    return None
                x, w = x_TD.clone().requires_grad_(), weight_TK.clone().requires_grad_()
                y = peer.layer(x, expert_TK, w)
                found = [y, *torch.autograd.grad(y, [x, w], d_y_TD)]
                return [float((a.detach().double() - b).norm() / b.norm()) for a, b in zip(found, right, strict=True)]

            torch._C._set_deterministic_algorithms(name.startswith("moestro"), warn_only=True)  # fresh memory is NaN
            rows[f"{name}, {load}"] = report.attempt(f"check {name}", errors)
            torch._C._set_deterministic_algorithms(False)
    report.say("relative error against float64: y, d_x, d_weight (bfloat16 rounds at about 0.004)")
    for name, found in rows.items():
        worst = "did not run" if found is None else "  ".join(f"{error:.4f}" for error in found)
        report.say(
            f"  {name:44s} {worst}"
            + ("" if not found or all(error < (0.2 if "fp8" in name else 0.02) for error in found) else "   WRONG")
        )
    report.keep("check", rows)


def reference(x, expert_TK, weight_TK, gate_up_EDF, down_EFD, d_y) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    """y, d_x and d_weight by a loop over experts."""
    x, weight_TK = x.requires_grad_(), weight_TK.requires_grad_()
    y = torch.zeros_like(x)
    for expert, (gate_up, down) in enumerate(zip(gate_up_EDF.unbind(0), down_EFD.unbind(0), strict=True)):
        gate, up = (x @ gate_up).chunk(2, -1)
        share_T1 = (weight_TK * (expert_TK == expert)).sum(-1, keepdim=True)
        y = y + (torch.nn.functional.silu(gate) * up * share_T1) @ down
    return [y.detach(), *torch.autograd.grad(y, [x, weight_TK], d_y)]


def tuned(shape: Shape, weights: Sequence[torch.Tensor], report: Report) -> None:
    """Choose block sizes on the real sizes, or use what an earlier process chose."""
    from moestro.nn.kernels.gpu import tune
    from moestro.nn.kernels.gpu.experts import sort_tiles

    if shape.name not in report.found["blocks"]:
        expert_TK, weight_TK = draw_routing(shape, "balanced", 4, DEVICE)
        x_TD = torch.randn(shape.tokens, shape.width, device=DEVICE, dtype=DTYPE)
        tiles = sort_tiles(expert_TK, shape.experts)
        with torch.no_grad():
            found = tune.tune(x_TD, weight_TK, tiles, weights[0], weights[1], lambda call: milliseconds([call] * 4))
        report.found["blocks"][shape.name] = {k: [round(ms, 3) for ms in times] for k, times in found.items()}
    winners = {kernel: times.index(min(times)) for kernel, times in report.found["blocks"][shape.name].items()}
    tune.use(winners, DTYPE, tune.shape_of(weights[1]))


def time_shape(shape: Shape, report: Report, rounds: int, uneven: bool) -> None:
    """All contestants on balanced loads, ours on all; or, afterwards, the others on uneven ones."""
    weights = draw_weights(shape, DEVICE)
    report.attempt(f"tune {shape.name}", lambda: tuned(shape, weights, report))
    if not uneven:
        report.say(f"\n{shape.name}   {shape.flops / 1e12:.2f} TFLOP forward")
        time_dense(shape, report, rounds)
    for name, make in contestants(shape).items():
        loads = LOADS if name == ON_ALL_LOADS else LOADS[1:] if uneven else LOADS[:1]
        left = [load for load in loads if report.row(shape.name, load, name) is None]
        if not left or name in report.found["absent"]:
            continue
        peer = report.attempt(f"{name} {shape.name}", lambda make=make, name=name: made(name, make, weights, report))
        if peer is not None:
            time_contestant(name, peer, shape, left, rounds, report)


def time_dense(shape: Shape, report: Report, rounds: int) -> None:
    """The same arithmetic as dense products."""
    if report.row(shape.name, "balanced", "dense products"):
        return
    row: Row = {"shape": shape.name, "load": "balanced", "way": "dense products", "memory_mib": None}
    for backward, key in enumerate(("forward_ms", "forward_backward_ms")):
        row[key] = report.attempt(
            f"dense {shape.name}",
            lambda: milliseconds([dense_products(shape, DEVICE, DTYPE, bool(backward))] * rounds),
        )
    finish(row, shape, report)


def time_contestant(name: str, peer: Peer, shape: Shape, loads: list[str], rounds: int, report: Report) -> None:
    """Memory, then every load; after a failure no more."""
    whole = f"{name} {shape.name}"
    for load in loads:
        row: Row = {"shape": shape.name, "load": load, "way": name, "memory_mib": None}
        if load == "balanced":
            row["memory_mib"] = report.attempt(f"{whole} memory", lambda: memory_mib(peer, shape), part_of=whole)
        for backward, key in enumerate(("forward_ms", "forward_backward_ms")):
            calls = lambda: passes(peer, shape, load, rounds, bool(backward))  # noqa: E731
            row[key] = report.attempt(f"{whole} {load}", lambda: milliseconds(calls()), part_of=whole)
        finish(row, shape, report)
        if row["forward_backward_ms"] is None:
            return


def finish(row: Row, shape: Shape, report: Report) -> None:
    """A row is whole: keep it, say it."""
    times = [row["forward_ms"], row["forward_backward_ms"]]
    text = "  ".join(
        "     -                  " if ms is None else f"{ms:9.3f} ms {n * shape.flops / ms / 1e9:5.0f} TFLOP/s"
        for ms, n in zip(times, (1, 3), strict=True)
    )
    kept = row["memory_mib"]
    text += f"   kept {kept[0]:.0f} peak {kept[1]:.0f} MiB" if kept else ""
    report.say(f"  {row['way']:30s} {row['load']:9s} {text}")
    if any(times):
        report.keep("rows", [*report.found["rows"], row])


def ceilings(report: Report) -> None:
    """What this card does: a large product, a large copy."""
    size = 256 if DEVICE == "cpu" else 8192
    left, right = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    source = torch.empty(size * size * (1 if DEVICE == "cpu" else 16), device=DEVICE, dtype=torch.float32)
    target = torch.empty_like(source)
    product, copy = milliseconds([lambda: left @ right] * 8), milliseconds([lambda: target.copy_(source)] * 8)
    found = {"tflop_per_s": 2 * size**3 / product / 1e9, "tb_per_s": 2 * source.nbytes / copy / 1e9}
    report.say(
        f"{report.found['device']}: product {found['tflop_per_s']:.0f} TFLOP/s, copy {found['tb_per_s']:.2f} TB/s"
    )
    report.keep("ceilings", found)


def compile_stage(report: Report) -> None:
    """Compile what the rest will launch."""
    import gpu_compile

    seconds, problems = gpu_compile.compile_all(["layer"])
    report.say(f"compiled in {seconds:.0f} s")
    for problem in problems:
        report.say(f"  {problem}")
    report.keep("compiled", {"seconds": round(seconds), "problems": problems})


def extra(stage: str, report: Report, quick: bool) -> None:
    """Routing alone, and a whole model's step."""
    import gpu_step

    if stage == "routing":
        report.keep(stage, gpu_step.time_routing(DEVICE, report.say, milliseconds))
    else:
        report.keep(stage, gpu_step.time_step(DEVICE, report.say, steps=4 if quick else 8))


def run_stage(stage: str, shapes: list[Shape], report: Report, options: argparse.Namespace) -> None:
    """One part of the whole."""
    if stage in ("compile", "check", "step", "routing"):
        call = {"compile": lambda: compile_stage(report), "check": lambda: check(report)}.get(
            stage, lambda: extra(stage, report, options.quick)
        )
        report.attempt(stage, call, limit_s=150)
        return
    for shape in shapes:
        if time.monotonic() < report.end_s:
            time_shape(shape, report, options.rounds, uneven=stage == "uneven")
        else:
            report.found["left_out"].append(f"{stage} {shape.name}")
    verdicts(shapes, report)


def main() -> None:
    """Everything in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.environ.get("OUT") or "runs/moe-layer-gpu")
    parser.add_argument("--quick", action="store_true", help="two shapes, few steps")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", default=",".join(STAGES))
    parser.add_argument("--resume", action="store_true", help="go on after a lost device")
    options = parser.parse_args()
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("no GPU here; MOE_LAYER_GPU_DRY=1 tries the script in Triton's interpreter on toy shapes")
    report, wanted = Report(Path(options.out), options.seconds, options.resume), options.only.split(",")
    shapes = TOY if DEVICE == "cpu" else [SHAPES[index] for index in BY_WORTH[: 2 if options.quick else None]]
    if "ceilings" not in report.found:
        report.attempt("ceilings", lambda: ceilings(report))
    done = {"compile": "compiled", "check": "check", "step": "step", "routing": "routing"}
    for stage in STAGES:
        skip = stage == "compile" and DEVICE == "cpu"
        if stage in wanted and not skip and done.get(stage) not in report.found:
            run_stage(stage, shapes, report, options)
    report.keep("seconds_left", round(report.end_s - time.monotonic()))
    print(json.dumps(report.found))


if __name__ == "__main__":
    main()
