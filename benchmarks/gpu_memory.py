"""What each way of computing the sparse layer keeps for its backward pass, counted without a GPU.

    python benchmarks/gpu_memory.py

Layers run on meta tensors, which have shapes and no values; bytes are those of distinct storages that autograd saves,
the input included, weights not. What an allocator adds and what lives for a while inside a pass is not in it.

Prints a table, then one JSON line.

Dimension key:  T tokens   D width   K slots
"""

import functools
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_cases import SHAPES, Shape, ours, sort_and_grouped_mm, torchtitan_style
from peers import Peer

WAYS = {
    "moestro triton": ours("triton"),
    "moestro triton, recompute": ours("triton", recompute=True),
    "sort + grouped_mm + index_add": functools.partial(sort_and_grouped_mm, every_slot=True),
    "torchtitan-style": torchtitan_style,
}


def kept_bytes(peer: Peer, shape: Shape) -> int:
    """Bytes that autograd saves in a forward pass."""
    x_TD = torch.empty(shape.tokens, shape.width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    expert_TK = torch.empty(shape.tokens, shape.slots, dtype=torch.int64, device="meta")
    weight_TK = torch.empty(shape.tokens, shape.slots, device="meta", requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        peer.layer(x_TD, expert_TK, weight_TK)
    sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in saved}
    for parameter in peer.parameters:
        sizes.pop(parameter.untyped_storage()._cdata, None)
    return sum(sizes.values())


def kept_by_ways(shape: Shape) -> dict[str, int]:
    """Every way's bytes."""
    sizes = [(shape.experts, shape.width, 2 * shape.hidden), (shape.experts, shape.hidden, shape.width)]
    weights = [torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes]
    return {name: kept_bytes(make(*weights), shape) for name, make in WAYS.items()}


def main() -> None:
    """A row per shape."""
    rows = {shape.name: kept_by_ways(shape) for shape in SHAPES if not shape.mean_k}
    print(f"{'MiB kept':34s}" + "".join(f"{name:>32s}" for name in WAYS) + "   ours / torchtitan-style")
    for name, kept in rows.items():
        share = kept["moestro triton"] / kept["torchtitan-style"]
        print(f"{name:34s}" + "".join(f"{size / 2**20:32.0f}" for size in kept.values()) + f"{share:26.2f}")
    print(json.dumps({"bench": "gpu_memory", "torch": torch.__version__, "unit": "bytes", "rows": rows}))


if __name__ == "__main__":
    main()
