"""Shapes, loads and contestants of `moe_layer_gpu.py`.

    SHAPES, LOADS -> draw_routing -> expert_TK, weight_TK
    contestants(shape): name -> make(gate_up_EDF, down_EFD) -> Peer      an ImportError says why one is absent

Other projects' ways are written anew in plain torch where installing them is not possible on a lent machine, and named
`-style`: they show what the approach costs, not what that project's code does.

Dimension key:  T tokens   D width   E experts   K slots   F expert width   N routed rows
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from peers import Layer, Peer, sort_and_grouped_mm, transformers_experts
from torch import Tensor
from torch.nn import functional as F

from moestro.core.specs import MoESpec
from moestro.nn.experts import Experts
from moestro.nn.permute import count_of, sort_by_expert


@dataclass(frozen=True)
class Shape:
    """One layer."""

    tokens: int
    width: int
    hidden: int
    experts: int
    slots: int
    mean_k: float = 0.0
    """Mean experts per token; 0: all slots are used."""

    @property
    def name(self) -> str:
        """As tables show it."""
        k = f"mean {self.mean_k:g}" if self.mean_k else f"{self.slots}"
        return f"({self.tokens}, {self.width}, {self.hidden}, {self.experts}, {k})"

    @property
    def full(self) -> "Shape":
        """The same with all slots used."""
        return replace(self, mean_k=0.0)

    @property
    def rows(self) -> int:
        """Assignments, on average."""
        return round(self.tokens * (self.mean_k or self.slots))

    @property
    def flops(self) -> float:
        """Of a forward pass; forward and backward are three times as many."""
        return 2.0 * self.rows * 3 * self.width * self.hidden


SHAPES = [
    Shape(32768, 4096, 1024, 128, 8),
    Shape(32768, 2048, 768, 128, 8),
    Shape(32768, 2048, 512, 512, 10),
    Shape(16384, 4096, 14336, 8, 2),
    Shape(16384, 2048, 1024, 64, 8),
    Shape(8192, 1024, 2816, 16, 2, 1.35),
    Shape(8192, 1024, 2816, 16, 2),  # what the one above is held against
]
BY_WORTH = [1, 3, 0, 5, 6, 4, 2]
"""In which order they are timed: where aims differ comes first, should time run out."""
TOY = [Shape(48, 32, 48, 4, 2), Shape(40, 32, 32, 3, 2, 1.35)]
"""For a dry run in Triton's interpreter."""

OLMOE = [
    160762, 157837, 137198, 119878, 80972, 75857, 65312, 51014, 46848, 40638, 38263, 36330, 36159, 35205, 34729, 31909,
    29904, 28419, 27543, 26821, 24212, 23417, 22451, 16939, 16418, 16288, 15750, 14926, 13830, 13259, 13209, 12357,
    11842, 11665, 11369, 10803, 10412, 10394, 10382, 10089, 9778, 9471, 8104, 7717, 7160, 7033, 6578, 5959,
    5788, 5609, 5419, 5305, 5102, 5015, 4359, 4052, 3895, 3509, 3126, 2310, 1767, 1364, 807, 331,
]  # fmt: skip
MIXTRAL = [65025, 57534, 55830, 50369, 49527, 49526, 46007, 43974]
"""Assignments of about 205,000 tokens of source code to each expert of layer 7 of OLMoE-1B-7B (top-8) and Mixtral-8x7B
(top-2), busiest first; from allenai/OLMoE, scripts/routing_output, Apache-2.0."""
LOADS = ["balanced", "zipf", "recorded"]


def popularity(load: str, experts: int) -> Tensor:
    """Relative popularity of experts.

    recorded   the profile of a real model, Mixtral for few experts and OLMoE for many, stretched to their number
    """
    if load == "balanced":
        return torch.ones(experts, dtype=torch.float64)
    if load == "zipf":
        return 1 / torch.arange(1, experts + 1, dtype=torch.float64)
    counts = np.array(MIXTRAL if experts <= 8 else OLMOE, dtype=float)
    place = np.linspace(0, len(counts) - 1, experts)
    return torch.from_numpy(np.interp(place, np.arange(len(counts)), counts))


def draw_routing(shape: Shape, load: str, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """expert_TK, each token's experts distinct, and weight_TK; below full K some last slots are unused."""
    draw = torch.Generator(device).manual_seed(seed)
    weight_E = popularity(load, shape.experts).to(device, torch.float32)
    order_E = torch.randperm(shape.experts, generator=draw, device=device)
    expert_TK = order_E[torch.multinomial(weight_E.expand(shape.tokens, -1), shape.slots, generator=draw)]
    weight_TK = torch.rand(shape.tokens, shape.slots, generator=draw, device=device)
    if shape.mean_k:
        unused_T = torch.rand(shape.tokens, generator=draw, device=device) > shape.mean_k - 1
        expert_TK[:, 1].masked_fill_(unused_T, shape.experts)
        weight_TK[:, 1].masked_fill_(unused_T, 0)
    return expert_TK, weight_TK


def draw_weights(shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """gate_up_EDF and down_EFD."""
    draw = torch.Generator(device).manual_seed(0)
    sizes = [(shape.experts, shape.width, 2 * shape.hidden), (shape.experts, shape.hidden, shape.width)]
    first, second = (torch.empty(size, device=device, dtype=dtype).normal_(0, 0.02, generator=draw) for size in sizes)
    return first, second


def ours(path: Any, recompute: bool = False) -> Callable[[Tensor, Tensor], Peer]:
    """Our layer after routing, by one of its paths; the weights are used where they lie."""

    def make(gate_up_EDF: Tensor, down_EFD: Tensor) -> Peer:
        num_experts, hidden, width = down_EFD.shape
        if path == "fp8" and (width % 128 or hidden % 128):
            raise ImportError(f"{width} and {hidden} are not multiples of 128")
        with torch.device("meta"):
            experts = Experts(width, MoESpec(num_experts=num_experts, expert_width=hidden))
        experts.gate_up_EDF = torch.nn.Parameter(gate_up_EDF)
        experts.down_EFD = torch.nn.Parameter(down_EFD)
        experts.recompute = recompute

        def layer(x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
            order = sort_by_expert(expert_TK, num_experts, tiled=path != "grouped", unused_too=True)
            y_TD: Tensor = experts(x_TD, weight_TK, order, path)
            return y_TD

        return Peer(layer, list(experts.parameters()))

    return make


def torchtitan_style(gate_up_EDF: Tensor, down_EFD: Tensor) -> Peer:
    """Sort, gather, three grouped products (gate and up apart), weights on the outputs, scatter_add; no fusion."""
    gate, up = (half.contiguous().requires_grad_() for half in gate_up_EDF.chunk(2, 2))
    down = down_EFD.detach().clone().requires_grad_()

    def layer(x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        slots, width = expert_TK.shape[1], x_TD.shape[1]
        flat_A = expert_TK.flatten()
        count_E = torch.histc(flat_A.float(), bins=len(down), min=0, max=len(down))
        source_A = flat_A.argsort(stable=True)
        place_AD = (source_A // slots)[:, None].expand(-1, width)
        rows_AD = x_TD.gather(0, place_AD)
        offs = count_E.cumsum(0).to(torch.int32)
        act = F.silu(F.grouped_mm(rows_AD, gate, offs=offs)) * F.grouped_mm(rows_AD, up, offs=offs)
        out_AD = F.grouped_mm(act, down, offs=offs)
        out_AD = (out_AD.float() * weight_TK.flatten()[source_A, None]).to(x_TD.dtype)
        return torch.zeros_like(x_TD).scatter_add(0, place_AD, out_AD)

    return Peer(layer, [gate, up, down])


def scattermoe(gate_up_EDF: Tensor, down_EFD: Tensor) -> Peer:
    """ScatterMoE's SwiGLU layer (its mlp.GLUMLP, with torch's sort instead of the same sort compiled)."""
    from scattermoe import parallel_linear

    num_experts = len(down_EFD)
    first, second = (weight.mT.contiguous().requires_grad_() for weight in (gate_up_EDF, down_EFD))  # [E, out, in]

    def layer(x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        expert_A, source_A = expert_TK.flatten().sort()
        order = expert_A, source_A, count_of(expert_A, num_experts).cumsum(0)
        both = parallel_linear(x_TD, first.mT, expert_TK.shape[1], *order, grouped_out=True)
        gate, up = both.chunk(2, -1)
        share = weight_TK.to(x_TD.dtype)
        y_TD: Tensor = parallel_linear(F.silu(gate) * up, second.mT, 1, *order, grouped_in=True, gates=share)
        return y_TD

    return Peer(layer, [first, second])


def transformers_kernel(name: str) -> Callable[[Tensor, Tensor], Peer]:
    """transformers' experts by a kernel that it downloads; says at once where that cannot be."""

    def make(gate_up_EDF: Tensor, down_EFD: Tensor) -> Peer:
        getattr(import_module(f"transformers.integrations.{name}"), f"is_{name}_loadable")(raise_error=True)
        return transformers_experts(name)(gate_up_EDF, down_EFD)

    return make


def dense_products(shape: Shape, device: str, dtype: torch.dtype, backward: bool) -> Callable[[], None]:
    """The same FLOPs as two (forward) or six dense products."""
    rows, width, hidden = shape.rows, shape.width, shape.hidden
    sizes = {"x": (rows, width), "up": (rows, 2 * hidden), "act": (rows, hidden)}
    have = {name: torch.randn(size, dtype=dtype, device=device) for name, size in sizes.items()}
    make = {name: torch.empty_like(tensor) for name, tensor in have.items()}
    w_up = torch.randn(width, 2 * hidden, dtype=dtype, device=device)
    w_down = torch.randn(hidden, width, dtype=dtype, device=device)

    def run() -> None:
        torch.mm(have["x"], w_up, out=make["up"])
        torch.mm(have["act"], w_down, out=make["x"])
        if backward:
            torch.mm(have["x"], w_down.t(), out=make["act"])
            torch.mm(have["act"].t(), have["x"])
            torch.mm(have["x"].t(), have["up"])
            torch.mm(have["up"], w_up.t(), out=make["x"])

    return run


def contestants(shape: Shape) -> dict[str, Callable[[Tensor, Tensor], Peer]]:
    """Ours first; where a token may have fewer experts than slots, those that take that."""
    found = {
        "moestro triton": ours("triton"),
        "sort + grouped_mm + index_add": functools.partial(sort_and_grouped_mm, every_slot=not shape.mean_k),
        "torchtitan-style": torchtitan_style,
        "transformers grouped_mm": transformers_experts("grouped_mm"),
        "moestro grouped": ours("grouped"),
        "ScatterMoE": scattermoe,
        "moestro fp8": ours("fp8"),
        "transformers sonicmoe": transformers_kernel("sonicmoe"),
        "transformers deepgemm": transformers_kernel("deepgemm"),
    }
    return {name: make for name, make in found.items() if not shape.mean_k or name in VARIABLE_K}


VARIABLE_K = ("moestro triton", "moestro fp8", "moestro grouped", "sort + grouped_mm + index_add")
"""Those that take a token with fewer experts than slots."""

__all__ = ["BY_WORTH", "LOADS", "SHAPES", "TOY", "Layer", "Peer", "Shape", "contestants"]
