"""One sparse feed-forward layer: route, dispatch, compute, combine.

    x_BSD -> Router -> Choice -> sort by expert -> gather -> Experts -> gather-sum -> y_BSD

Dropless: every assignment is computed, whatever the imbalance. Combining gathers each token's rows through the inverse
permutation and adds them in slot order, so there are no atomics and the sum is the same from run to run.

Dimension key:  B sequences   S positions   T = B*S tokens   D width   K slots   N routed rows   E experts
"""

from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moestro.core.specs import MoESpec
from moestro.nn.experts import TILED, AnyExperts, Experts, LowRankExperts, Path, takes_grouped
from moestro.nn.kernels import cpu
from moestro.nn.path_choice import measured_path
from moestro.nn.permute import sort_by_expert
from moestro.nn.router import Router, RoutingRecord
from moestro.nn.routing_rules import Choice


class Dispatcher(Protocol):
    """Moves token rows to where their experts are, and back."""

    def __call__(self, x_TD: Tensor, choice: Choice, experts: AnyExperts, path: Path) -> Tensor:
        """The layer's output for these tokens; `path` is how experts compute."""
        ...


class Local:
    """All experts are here."""

    def __call__(self, x_TD: Tensor, choice: Choice, experts: AnyExperts, path: Path) -> Tensor:
        """See `Dispatcher`."""
        tiled, quick = path in TILED, path == "grouped" and x_TD.device.type != "cpu"
        order = sort_by_expert(choice.expert_TK, experts.num_experts, tiled, unused_too=quick)
        y_TD: Tensor = experts(x_TD, choice.weight_TK, order, path)
        return y_TD


class FeedForward(nn.Module):
    """A dense SwiGLU layer (Shazeer 2020); also the shared expert that every token takes."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_XD: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x))."""
        y_XD: Tensor = self.down(F.silu(self.gate(x_XD)) * self.up(x_XD))
        return y_XD


class MoE(nn.Module):
    """Router, experts, and what carries tokens between them."""

    def __init__(self, width: int, spec: MoESpec, path: Path | Literal["auto"] = "auto") -> None:
        super().__init__()
        self.spec, self.path = spec, path
        self.fp8 = False
        """Let products in 8 bits be chosen where they are faster."""
        self.router = Router(width, spec.num_experts, spec.router)
        self.experts: AnyExperts = Experts(width, spec) if spec.sharing == "none" else LowRankExperts(width, spec)
        self.shared = FeedForward(width, spec.shared_width) if spec.shared_width else None
        self.dispatcher: Dispatcher = Local()

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, RoutingRecord]:
        """The layer's output in x's type, and what its router did."""
        x_TD = x_BSD.flatten(0, -2)
        choice, record = self.router(x_TD, sequences=len(x_BSD))
        y_TD = self.dispatcher(x_TD, choice, self.experts, self.fastest_path(x_TD, choice.expert_TK.shape[1]))
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view_as(x_BSD), record

    def fastest_path(self, x_TD: Tensor, slots: int = 2) -> Path:
        """How the experts compute: as asked; on a CPU fused where our products are best; on a GPU as was measured."""
        if self.path != "auto":
            return self.path
        own = isinstance(self.experts, Experts)
        if own and cpu.has_products(x_TD) and self.experts.down_EFD.dtype == torch.float32:
            return "fused"
        if isinstance(self.experts, Experts) and x_TD.device.type == "cuda":
            return measured_path(x_TD, slots, self.experts, self.fp8)
        rank = () if own else (self.spec.sharing_rank,)
        return "grouped" if takes_grouped(x_TD, self.experts.width, self.experts.hidden, *rank) else "loop"
