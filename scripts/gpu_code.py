"""What the compiler makes of the Triton kernels, without a GPU: one line per kernel, block size and chip.

    python scripts/gpu_code.py [--chip 90] [--all] [--shape 2048,768,128] [--json]

Registers and spilled bytes are ptxas's, shared memory is what the launch asks for (a Hopper multiprocessor has 227 KB),
`programs` is how many of them a multiprocessor has registers and shared memory for,
`wgmma` and `tma` count Hopper's product and tile-copy instructions in the PTX, `copies_of_16` asynchronous copies of
16 bytes. Exits with 1 where a kernel needs more shared memory than the chip has. `--all` compiles every block size that
`nn/kernels/gpu/tune.py` would time, else the default of each kernel.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moestro.nn.kernels.gpu import combine, fp8, products, routing, sort, weight_gradient
from moestro.nn.kernels.gpu.blocks import CANDIDATES, EXACT, Blocks

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Of one program; a multiprocessor has 1 KB more, and each program takes 1 KB beyond what it asks for."""
REGISTERS, THREADS = 65536, 2048
"""Of a multiprocessor; a warp gets registers by 256."""
INTEGERS = ("count", "total", "offset", "tile", "busiest", "source", "row", "second", "histogram")
REALS = ("share", "part", "logit", "bias", "threshold", "gap", "block", "seen", "number", "d_loss", "d_logit", "weight")
REALS += ("d_weight",)
SIGNATURES = {f"{name}_ptr": "*i32" for name in INTEGERS} | {f"{name}_ptr": "*fp32" for name in REALS}
SIGNATURES |= {"expert_ptr": "*i64", "used_ptr": "*i64", "aux": "fp32", "z": "fp32"}
EIGHT_BITS = {
    "x_ptr": "*fp8e4nv",
    "a_ptr": "*fp8e4nv",
    "d_y_ptr": "*fp8e4nv",
    "weight": "tensordesc<fp8e4nv[1,128,128]>",
}
EIGHT_BITS |= {
    "gate_up": "tensordesc<{}[128,64]>",
    "scale_ptr": "*fp32",
    "x_scale_ptr": "*fp32",
    "a_scale_ptr": "*fp32",
}
EIGHT_BITS |= {"w_scale_ptr": "*fp32", "d_y_scale_ptr": "*fp32"}
"""Types of arguments that do not depend on the tensors' type."""
Case = tuple[str, Any, dict[str, Any], Blocks | None]


def product_cases(shape: tuple[int, int, int], chip: int, every: bool, dtype: str) -> Iterator[Case]:
    """Kernel, constants and blocks of every product."""
    width, hidden, _ = shape
    tma, sizes = chip >= 90, {"WIDTH": width, "HIDDEN": hidden}
    for name, candidates in CANDIDATES.items():
        chosen = [EXACT] if dtype == "fp32" else candidates if every else candidates[:1]
        for blocks in chosen:
            common = {"ROWS": 128, "COLUMNS": blocks.columns, "INNER": blocks.inner, "GROUP": 8, "TMA": tma}
            common["UPCAST"] = False
            match name:
                case "gate_up":
                    yield name, products.gate_up_act, common | sizes | {"KEEP": True}, blocks
                case "act_backward":
                    yield name, products.act_backward, common | sizes, blocks
                case "down" | "d_x":
                    inside, outside = (hidden, width) if name == "down" else (2 * hidden, width)
                    more = {"INSIDE": inside, "OUTSIDE": outside, "TRANSPOSED": name == "d_x"}
                    yield name, products.rows_product, common | more, blocks
                case _:
                    left = name == "d_gate_up_weight"
                    inside, outside = (width, 2 * hidden) if left else (hidden, width)
                    more = {"INSIDE": inside, "OUTSIDE": outside, "GATHER_LEFT": left, "HIGH": blocks.high}
                    more |= {"WIDE": blocks.columns, "ROWS": blocks.inner, "GROUP": 8, "UPCAST": False}
                    yield name, weight_gradient.weight_gradient, more, blocks


def fp8_cases(shape: tuple[int, int, int]) -> Iterator[Case]:
    """Products in 8 bits; Hopper only."""
    width, hidden, _ = shape
    common = {"ROWS": 128, "GROUP": 8, "TMA": True, "UPCAST": False, "BLOCK": 128}
    sizes, blocks = {"WIDTH": width, "HIDDEN": hidden}, Blocks(128, 128, stages=4)
    yield "quantise_rows", fp8.quantise_rows, {"WIDTH": width, "ROWS": 32, "BLOCK": 128}, None
    weight = {"INSIDE": width, "OUTSIDE": hidden, "TURN": True, "BLOCK": 128}
    yield "quantise_weight", fp8.quantise_weight, weight, Blocks(0, 0)
    yield "gate_up fp8", fp8.gate_up_act_fp8, common | sizes | {"KEEP": True}, blocks
    yield "down fp8", fp8.rows_product_fp8, common | {"INSIDE": hidden, "OUTSIDE": width}, blocks
    yield "act_backward fp8", fp8.act_backward_fp8, common | sizes, blocks


def other_cases(shape: tuple[int, int, int]) -> Iterator[Case]:
    """Sorting and combining."""
    bins = triton.next_power_of_2(shape[2] + 2)
    yield "count_chunks", sort.count_chunks, {"CHUNK": sort.CHUNK, "BINS": bins}, None
    yield "sum_chunks", sort.sum_chunks, {"BINS": bins, "WIDE": 16, "HIGH": 128}, None
    yield "list_tiles", sort.list_tiles, {"ROWS": 128, "BINS": bins, "STEP": 128}, None
    yield "place_rows", sort.place_rows, {"CHUNK": sort.CHUNK, "BINS": bins}, None
    wide = triton.next_power_of_2(shape[2])
    router: dict[str, Any] = {
        "EXPERTS": shape[2],
        "WIDE": wide,
        "SLOTS": 8,
        "ROWS": max(1024 // wide, 1),
        "SOFTMAX": True,
    }
    router |= {"BIASED": False, "GAP": False, "MODE": routing.MODES["renormalise"], "WEIGHT_SCALE": 1.0}
    yield "route_tokens topk", routing.route_tokens, router, None
    gap = {"SLOTS": 2, "GAP": True, "MODE": routing.MODES["pair"], "BIASED": True}
    yield "route_tokens gap", routing.route_tokens, router | gap, None
    back = {key: router[key] for key in router if key not in ("BIASED", "GAP")}
    yield "route_backward", routing.route_backward, back, None
    yield "sum_blocks", routing.sum_blocks, {"EXPERTS": shape[2], "WIDE": wide, "HIGH": max(4096 // wide, 1)}, None
    yield "combine_slots", combine.combine_slots, {"WIDTH": shape[0], "SLOTS": 8, "COLUMNS": 2048}, Blocks(0, 0)
    yield "sum_parts", combine.sum_parts, {"BLOCK": 512}, None


def argument_type(name: str, constants: dict[str, Any], dtype: str) -> str:
    """The type of one kernel argument as the compiler writes it."""
    if "BLOCK" in constants and name in EIGHT_BITS:
        return EIGHT_BITS[name].format(dtype)
    if name in ("a", "weight", "gate_up"):
        if not constants["TMA"]:
            return f"*{dtype}"
        inner, columns = constants["INNER"], constants["COLUMNS"]
        transposed = constants.get("TRANSPOSED", "KEEP" not in constants)  # act_backward too
        rows = [
            constants["ROWS"],
            inner if name == "a" else columns // 2 if columns >= products.HALVED.value else columns,
        ]
        block = rows if name != "weight" else [1, *((columns, inner) if transposed else (inner, columns))]
        return f"tensordesc<{dtype}{block}>".replace(" ", "")
    return f"*{dtype}" if name.endswith("_ptr") else "i32"


def examine(case: Case, chip: int, dtype: str) -> dict[str, Any]:
    """Compile one kernel and count."""
    name, kernel, constants, blocks = case
    begun_s = time.perf_counter()
    quantising = {"x_ptr": f"*{dtype}", "out_ptr": "*fp8e4nv"} if name.startswith("quantise") else {}
    types = SIGNATURES | quantising | ({"count_ptr": "*fp32"} if kernel is routing.sum_blocks else {})
    plain = [n for n in kernel.arg_names if n not in constants]
    signature = {n: types.get(n) or argument_type(n, constants, dtype) for n in plain} | dict.fromkeys(
        constants, "constexpr"
    )
    signature = {n: signature[n] for n in kernel.arg_names}
    aligned = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in plain if signature[n].startswith("*")}
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages} if blocks else {}
    source = ASTSource(kernel, signature, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    registers, spilled = resources(built.asm["ptx"], chip)
    shown = f"{blocks.columns}x{blocks.inner} w{blocks.warps} s{blocks.stages}" if blocks and blocks.columns else ""
    return {
        "kernel": name, "chip": chip, "dtype": dtype, "blocks": shown, "registers": registers, "spilled": spilled,
        "shared": built.metadata.shared, "programs": programs(registers, built.metadata, chip),
        "wgmma": built.asm["ptx"].count("wgmma.mma_async"),
        "mma": len(re.findall(r"\bmma\.sync", built.asm["ptx"])),
        "tma": built.asm["ptx"].count("cp.async.bulk.tensor"), "copies_of_16": built.asm["ptx"].count(", 0x10"),
        "fits": built.metadata.shared <= SHARED_BYTES[chip],
        "s": round(time.perf_counter() - begun_s, 2),
    }  # fmt: skip


def programs(registers: int, metadata: Any, chip: int) -> int:
    """How many run on a multiprocessor at a time."""
    warp_registers = -(-32 * registers // 256) * 256
    by_registers = REGISTERS // (warp_registers * metadata.num_warps)
    by_shared = (SHARED_BYTES[chip] + 1024) // (metadata.shared + 1024)
    return min(by_registers, by_shared, THREADS // 32 // metadata.num_warps)


def resources(ptx: str, chip: int) -> tuple[int, int]:
    """Registers of a thread and bytes that do not fit into them, from ptxas's report."""
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [str(ptxas), "-v", f"-arch=sm_{chip}{'a' if chip == 90 else ''}", str(source), "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", report))
    return max(int(n) for n in re.findall(r"Used (\d+) registers", report)), spilled


def main() -> None:
    """Compile, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", type=int, action="append", choices=sorted(SHARED_BYTES))
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--shape", default="2048,768,128", help="width, expert width, experts")
    parser.add_argument("--kernel", default="", help="only those whose name has this in it")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    width, hidden, experts = (int(part) for part in options.shape.split(","))
    found = []
    for chip in options.chip or [90]:
        shape = (width, hidden, experts)
        cases = [*product_cases(shape, chip, options.all, options.dtype), *other_cases(shape)]
        for case in cases + (list(fp8_cases(shape)) if chip >= 90 else []):
            if options.kernel not in case[0]:
                continue
            found.append(examine(case, chip, options.dtype))
            if not options.json:
                print("  ".join(f"{key} {value}" for key, value in found[-1].items()), flush=True)
    if options.json:
        print(json.dumps(found))
    sys.exit(not all(row["fits"] for row in found))


if __name__ == "__main__":
    main()
