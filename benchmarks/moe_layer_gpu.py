"""The sparse layer on a GPU, beside dense products and other ways: times, memory, and the step of a whole model.

    python benchmarks/moe_layer_gpu.py [--out FOLDER] [--quick] [--minutes 8] [--only compile,check,layer,routing,step]

One run does, in order: compile every kernel (all shapes at once, in processes of their own), compare every contestant
with float64, time every shape under every load, time routing, and train a 16-layer model for some steps. Contestants
get the same routings, in turn, new ones in every round; times are medians between events on the device. A contestant or
shape that fails is named and left out, and when `--minutes` are over, what is left is named too. Without a GPU a dry
run of toy shapes goes through Triton's interpreter: it shows that the script works and nothing else.

Prints tables, then one JSON line; writes both into FOLDER ($OUT where that is set, else runs/moe-layer-gpu).

Dimension key:  T tokens   D width   E experts   K slots
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

if os.environ.get("MOE_LAYER_GPU_DRY") == "1":
    os.environ["TRITON_INTERPRET"] = "1"

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # runs where moestro is not installed

from gpu_cases import (
    CONTESTANTS,
    LOADS,
    SHAPES,
    TOY,
    VARIABLE_K,
    Peer,
    Shape,
    dense_products,
    draw_routing,
    draw_weights,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16
Row = dict[str, Any]


class Report:
    """What was found, on the screen and on disk as it comes."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self.end_s = folder, time.monotonic() + 60 * minutes
        self.found: dict[str, Any] = {"bench": "moe_layer_gpu", "date": time.strftime("%Y-%m-%d"), **machine()}
        self.found |= {"problems": [], "left_out": []}
        folder.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        print(text, flush=True)
        with (self.folder / "table.txt").open("a") as file:
            file.write(text + "\n")

    def keep(self, key: str, value: Any) -> None:
        self.found[key] = value
        (self.folder / "result.json").write_text(json.dumps(self.found, indent=1))

    def attempt(self, what: str, call: Callable[[], Any]) -> Any:
        """The result, or None where it failed or time is up; says so."""
        if time.monotonic() > self.end_s:
            self.found["left_out"].append(what)
            return None
        try:
            return call()
        except Exception as error:
            self.found["problems"].append(f"{what}: {type(error).__name__}: {str(error).splitlines()[:1]}")
            (self.folder / "problems.txt").open("a").write(f"{what}\n{traceback.format_exc()}\n")
            self.say(f"  {what}: failed, {type(error).__name__}: {(str(error).splitlines() or [''])[0][:140]}")
            if DEVICE == "cuda" and isinstance(error, torch.AcceleratorError):
                raise SystemExit(f"the device is lost: {error}") from error
            return None
        finally:
            gc.collect()
            if DEVICE == "cuda":
                torch.cuda.empty_cache()


def machine() -> dict[str, str]:
    facts = {"torch": torch.__version__, "device": "cpu, Triton's interpreter: figures mean nothing"}
    if DEVICE == "cuda":
        facts["device"] = torch.cuda.get_device_name()
    for name in ("triton", "transformers"):
        try:
            facts[name] = __import__(name).__version__
        except ImportError:
            facts[name] = "absent"
    return facts


def milliseconds(calls: list[Callable[[], Any]]) -> float:
    """Median over calls of the time between events, after the first."""
    times = []
    for call in calls:
        if DEVICE == "cpu":
            begun_s = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begun_s))
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[1:] or times)


def make_contestants(shape: Shape, report: Report) -> dict[str, Peer]:
    """Those that can run here; weights of all lie on the device at once unless they share them."""
    weights = draw_weights(shape, DEVICE)
    made = {}
    for name, make in CONTESTANTS.items():
        if shape.mean_k and name not in VARIABLE_K:
            continue
        if shape.experts * shape.width * shape.hidden > 4e8 and name in ("SonicMoE", "transformers deepgemm"):
            continue
        try:
            made[name] = make(*weights)
        except Exception as error:  # other projects' code: whatever it raises, the run goes on
            report.found.setdefault("absent", {})[name] = f"{type(error).__name__}: {error}"[:200]
    return made


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


def memory_mib(peer: Peer, shape: Shape) -> tuple[float, float]:
    """Kept between forward and backward, and the peak of both beyond what was there and the gradients of weights."""
    if DEVICE == "cpu":
        return 0.0, 0.0
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
    return kept / 2**20, peak / 2**20


def compile_shape(index: int) -> None:
    """Launch every kernel with every block size on few tokens of one shape: compiles them into Triton's cache."""
    from moestro.nn.kernels.gpu import tune
    from moestro.nn.kernels.gpu.experts import sort_tiles, triton_experts

    shape = SHAPES[index]
    small = Shape(256, shape.width, shape.hidden, shape.experts, shape.slots)
    weights = list(draw_weights(small, DEVICE))
    x_TD = torch.randn(small.tokens, small.width, device=DEVICE, dtype=DTYPE)
    expert_TK, weight_TK = draw_routing(small, "balanced", 0, DEVICE)
    tiles = sort_tiles(expert_TK, small.experts, rows=128)
    with torch.no_grad():
        tune.tune(x_TD, weight_TK, tiles, *weights, lambda call: milliseconds([call]))
    leaves = [weight.requires_grad_() for weight in weights]
    y_TD = triton_experts(x_TD.requires_grad_(), weight_TK, tiles, *leaves)
    torch.autograd.grad(y_TD, [x_TD, *leaves], torch.randn_like(y_TD))
    with torch.no_grad():
        triton_experts(x_TD, weight_TK, tiles, *leaves)


def compile_all(shapes: list[int]) -> float:
    """All shapes at once, each in a process of its own; seconds."""
    begun_s = time.perf_counter()
    command = [sys.executable, __file__, "--compile-shape"]
    workers = [subprocess.Popen([*command, str(index)], stderr=subprocess.PIPE, text=True) for index in shapes]
    for index, worker in zip(shapes, workers, strict=True):
        _, errors = worker.communicate()
        if worker.returncode:
            print(f"compiling shape {index} failed:\n{errors[-2000:]}", file=sys.stderr)
    return time.perf_counter() - begun_s


def check(report: Report) -> None:
    """Every contestant against float64, values and gradients, on fresh inputs; ours also with poisoned memory."""
    shape = TOY[0] if DEVICE == "cpu" else Shape(1024, 256, 384, 16, 2)
    rows: dict[str, Any] = {}
    for load in ("balanced", "zipf"):
        expert_TK, weight_TK = draw_routing(shape, load, 5, DEVICE)
        x_TD = torch.randn(shape.tokens, shape.width, device=DEVICE).to(DTYPE)
        d_y_TD = torch.randn_like(x_TD)
        exact = [w.double().requires_grad_() for w in draw_weights(shape, DEVICE)]
        right = reference(x_TD.double(), expert_TK, weight_TK.double(), *exact, d_y_TD.double())
        for name, peer in make_contestants(shape, report).items():

            def errors(peer: Peer = peer) -> list[float]:
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


def tune_shape(shape: Shape) -> dict[str, list[float]]:
    """Choose block sizes on the real sizes."""
    from moestro.nn.kernels.gpu import tune
    from moestro.nn.kernels.gpu.experts import sort_tiles

    expert_TK, weight_TK = draw_routing(shape, "balanced", 4, DEVICE)
    x_TD = torch.randn(shape.tokens, shape.width, device=DEVICE, dtype=DTYPE)
    tiles = sort_tiles(expert_TK, shape.experts)
    with torch.no_grad():
        found = tune.tune(x_TD, weight_TK, tiles, *draw_weights(shape, DEVICE), lambda c: milliseconds([c] * 4))
    return {str(kernel): [round(ms, 3) for ms in times] for kernel, times in found.items()}


def time_shape(shape: Shape, report: Report, rounds: int) -> list[Row]:
    """All contestants under all loads."""
    rows: list[Row] = []
    report.say(f"\n{shape.name}   {shape.flops / 1e12:.2f} TFLOP forward")
    report.found.setdefault("blocks", {})[shape.name] = report.attempt(f"tune {shape.name}", lambda: tune_shape(shape))
    for backward in (False, True):
        work = shape.flops * (3 if backward else 1)
        dense = report.attempt("dense", lambda: milliseconds([dense_products(shape, DEVICE, DTYPE, backward)] * rounds))
        if dense:
            rows.append({"shape": shape.name, "load": "", "way": "dense products", "backward": backward, "ms": dense})
            report.say(
                f"  {'dense products':32s} {'f+b' if backward else 'fwd'} {dense:9.3f} ms "
                f"{work / dense / 1e9:7.0f} TFLOP/s"
            )
    peers = make_contestants(shape, report)
    for name, peer in peers.items():
        kept = report.attempt(f"{name} memory", lambda: memory_mib(peer, shape))
        for load in LOADS:
            row: Row = {"shape": shape.name, "load": load, "way": name, "memory_mib": kept}
            for backward in (False, True):
                key = "forward_backward_ms" if backward else "forward_ms"
                row[key] = report.attempt(
                    f"{name} {load}",
                    lambda: milliseconds(passes(peer, shape, load, rounds, backward)),
                )
            rows.append(row)
            report.say(line(shape, row))
            if row["forward_ms"] is None:
                break
    return rows


def line(shape: Shape, row: Row) -> str:
    """One contestant under one load."""
    times = [row["forward_ms"], row["forward_backward_ms"]]
    text = "  ".join(
        "     -          " if ms is None else f"{ms:9.3f} ms {n * shape.flops / ms / 1e9:5.0f}"
        for ms, n in zip(times, (1, 3), strict=True)
    )
    kept = row["memory_mib"]
    return f"  {row['way']:30s} {row['load']:9s} {text} TFLOP/s" + (
        f"   kept {kept[0]:.0f} peak {kept[1]:.0f} MiB" if kept else ""
    )


def verdicts(rows: list[Row], report: Report) -> None:
    """The issue's aims, as ratios."""

    def ms(shape: str, way: str, load: str = "balanced", key: str = "forward_backward_ms") -> float | None:
        return next((r.get(key) for r in rows if (r["shape"], r["way"], r["load"]) == (shape, way, load)), None)

    def ratio(over: float | None, under: float | None) -> float | None:
        return None if not over or not under else round(over / under, 3)

    found: dict[str, dict[str, float | None]] = {}
    report.say("\naims, forward+backward unless said: ratios")
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = ms(shape, "moestro triton")
        dense = next(
            (r["ms"] for r in rows if r["shape"] == shape and r["way"] == "dense products" and r["backward"]), None
        )
        others = [
            t
            for r in rows
            if r["shape"] == shape
            and r["way"].startswith("transformers")
            and r["load"] == "balanced"
            and (t := r.get("forward_backward_ms"))
        ]
        memory = {r["way"]: r["memory_mib"][0] for r in rows if r["shape"] == shape and r.get("memory_mib")}
        found[shape] = {
            "forward, grouped_mm / ours (>= 1.5)": ratio(
                ms(shape, "sort + grouped_mm + index_add", key="forward_ms"),
                ms(shape, "moestro triton", key="forward_ms"),
            ),
            "transformers / ours (>= 1.3)": ratio(min(others, default=None), own),
            "torchtitan-style / ours (>= 1.15)": ratio(ms(shape, "torchtitan-style"), own),
            "dense / ours (>= 0.7, fine-grained 0.5)": ratio(dense, own),
            "zipf / balanced (<= 1.1)": ratio(ms(shape, "moestro triton", "zipf"), own),
            "kept memory, ours / torchtitan-style (<= 0.7)": ratio(
                memory.get("moestro triton"), memory.get("torchtitan-style")
            ),
        }
        report.say(f"  {shape}: " + ", ".join(f"{name} {value}" for name, value in found[shape].items() if value))
    variable = next((s for s in SHAPES + TOY if s.mean_k), None)
    if variable:
        full = Shape(variable.tokens, variable.width, variable.hidden, variable.experts, variable.slots).name
        found["mean K"] = {"1.35 / 2 (<= 0.75)": ratio(ms(variable.name, "moestro triton"), ms(full, "moestro triton"))}
        report.say(f"  mean K 1.35 / K 2 (<= 0.75): {found['mean K']['1.35 / 2 (<= 0.75)']}")
    report.keep("aims", found)


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


def main() -> None:
    """Everything in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.environ.get("OUT") or "runs/moe-layer-gpu")
    parser.add_argument("--quick", action="store_true", help="two shapes, few rounds")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", default="compile,check,layer,routing,step")
    parser.add_argument("--compile-shape", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile_shape is not None:
        compile_shape(options.compile_shape)
        return
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("no GPU here; MOE_LAYER_GPU_DRY=1 tries the script in Triton's interpreter on toy shapes")
    report, stages = Report(Path(options.out), options.minutes), options.only.split(",")
    picked = [1, 4] if options.quick else range(len(SHAPES))
    shapes = TOY if DEVICE == "cpu" else [SHAPES[index] for index in picked]
    if "compile" in stages and DEVICE == "cuda":
        seconds = report.attempt("compile", lambda: compile_all(list(picked)))
        report.say(f"compiled in {seconds} s")
    report.attempt("ceilings", lambda: ceilings(report))
    if "check" in stages:
        report.attempt("check", lambda: check(report))
    rows: list[Row] = []
    if "layer" in stages:
        for shape in shapes:
            rows += report.attempt(shape.name, lambda: time_shape(shape, report, options.rounds)) or []
            report.keep("rows", rows)
        verdicts(rows, report)
    for stage in ("routing", "step"):
        if stage in stages:
            report.keep(stage, report.attempt(stage, lambda: extra(stage, report, options.quick)))
    report.keep("seconds_left", round(report.end_s - time.monotonic()))
    print(json.dumps(report.found))


def extra(stage: str, report: Report, quick: bool) -> Any:
    """Routing alone, and a whole model's step."""
    import gpu_step

    if stage == "routing":
        return gpu_step.time_routing(DEVICE, report.say, milliseconds)
    return gpu_step.time_step(DEVICE, report.say, steps=4 if quick else 8)


if __name__ == "__main__":
    main()
