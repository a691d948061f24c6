"""A dense model as a mixture of experts with the same output (Komatsuzaki 2022).

    dense ModelSpec -> upcycled -> MoE ModelSpec        dense pieces -> copied_to_experts -> the same tensors, E copies
    model -> start_routers                              routers at random

Every expert is a copy of the layer's feed-forward, so a token's output is the dense one as long as its weights sum to
1, whichever experts it goes to. With `topk` they always do (weights `renormalise`). With `gap` (weights `pair`) they do
while both experts are taken, and that is how a fresh router begins: its threshold is 1 until the budget falls.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from moestro.core.errors import FamilyError
from moestro.core.specs import ModelSpec, MoESpec, RouterSpec
from moestro.nn.decoder import Decoder
from moestro.nn.families.names import Piece, half
from moestro.nn.moe import MoE


@dataclass(frozen=True, kw_only=True, slots=True)
class Upcycle:
    """How to make experts out of a dense feed-forward."""

    num_experts: int
    k: int = 2
    """Experts per token; gap has at most 2."""
    rule: str = "topk"
    """topk or gap."""
    router_std: float = 0.02
    """Spread of the routers' first weights; 0 would send every token to the same experts."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in ("topk", "gap"):
            raise FamilyError(f"--rule is {self.rule!r}; it must be topk or gap")
        if not 2 <= self.k <= self.num_experts:
            raise FamilyError(
                f"--k is {self.k} with --experts {self.num_experts}; k must be in 2..experts: the weight of a single "
                "copy cannot stay 1 without cutting the router off from its gradient"
            )
        if self.rule == "gap" and self.k != 2:
            raise FamilyError(f"--k is {self.k}; rule gap takes one or two experts: give --k 2")


def upcycled(spec: ModelSpec, upcycle: Upcycle) -> ModelSpec:
    """The sparse model; raises FamilyError where the model has experts already."""
    if spec.moe is not None:
        raise FamilyError(f"the model has {spec.moe.num_experts} experts already; leave out --experts to import it")
    if upcycle.rule == "gap":
        router = RouterSpec(rule="gap", weights="pair")
    else:
        router = RouterSpec(rule="topk", k=upcycle.k, weights="renormalise")
    moe = MoESpec(num_experts=upcycle.num_experts, expert_width=spec.dense_width, router=router)
    return replace(spec, moe=moe, dense_width=0)


def copied_to_experts(dense: Iterable[Piece]) -> Iterator[Piece]:
    """Pieces of the dense model, each feed-forward matrix at all experts at once."""
    everyone = (slice(None),)
    for piece in dense:
        layer, found, matrix = piece.ours.partition(".feed_forward.")
        ours = f"{layer}.feed_forward"
        match matrix if found else "":
            case "gate.weight" | "up.weight":
                hidden, width = piece.shape
                yield half(piece.name, width, hidden, ours, everyone, ("gate.weight", "up.weight").index(matrix))
            case "down.weight":
                yield Piece(piece.name, piece.shape, f"{ours}.experts.down_EFD", everyone, turned=True)
            case _:
                yield piece


@torch.no_grad()
def start_routers(model: Decoder, upcycle: Upcycle) -> None:
    """Draw the routers; copies become unlike by learning from different tokens."""
    generator = torch.Generator().manual_seed(upcycle.seed)
    for module in model.modules():
        if isinstance(module, MoE):
            module.router.weight_ED.normal_(0, upcycle.router_std, generator=generator)
