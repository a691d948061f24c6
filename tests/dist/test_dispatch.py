"""Dispatch between ranks equals one rank: outputs and gradients, whatever the imbalance."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.core.specs import MoESpec, RouterSpec
from moestro.dist.dispatch import AllToAll, Hierarchical
from moestro.dist.layout import Layout
from moestro.dist.mesh import PULSE, Mesh
from moestro.dist.testing import RankFailed, run_on_ranks
from moestro.nn.experts import Experts, Path
from moestro.nn.moe import Local
from moestro.nn.routing_rules import Choice

D, E = 8, 4
TOKENS = (5, 0, 9, 2)
"""Of each rank; two ranks are a node."""
NODE_WITHOUT_TOKENS, RANK_WITH_ALL = (0, 0, 9, 7), (0, 16, 0, 0)


def routing(kind: str, tokens: int) -> Tensor:
    """expert_TK for all ranks' tokens; E marks an unused slot."""
    draw = torch.Generator().manual_seed(1)
    first_T = torch.randint(E, (tokens,), generator=draw)
    second_T = ((first_T + 1) % E).where(torch.rand(tokens, generator=draw) < 0.5, E)
    both_TK = torch.stack([first_T, second_T], 1)
    cases = {
        "one or two experts": both_TK,
        "all tokens to one expert": torch.tensor([[3, E]]).expand(tokens, -1),
        "a rank without rows": both_TK.where(both_TK != 2, 0),
        "a node without rows": both_TK.where(both_TK < 2, E),
        "no expert at all": torch.full_like(both_TK, E),
    }
    return cases[kind]


def setting(kind: str) -> tuple[Tensor, Choice, Experts]:
    torch.manual_seed(0)
    tokens = sum(TOKENS)
    experts = Experts(D, MoESpec(num_experts=E, expert_width=12))
    experts.initialise(0.5, 0.5)
    expert_TK = routing(kind, tokens)
    weight_TK = torch.rand(tokens, 2).where(expert_TK < E, 0.0)
    return torch.randn(tokens, D), Choice(expert_TK, weight_TK), experts


def outcome(x_TD: Tensor, choice: Choice, experts: Experts, dispatcher: object, path: Path) -> list[Tensor]:
    """Output and gradients of a quadratic loss."""
    x_TD, weight_TK = x_TD.clone().requires_grad_(), choice.weight_TK.clone().requires_grad_()
    y_TD = dispatcher(x_TD, Choice(choice.expert_TK, weight_TK), experts, path)  # type: ignore[operator]
    y_TD.square().sum().backward()
    grads = [x_TD.grad, weight_TK.grad, experts.gate_up_EDF.grad, experts.down_EFD.grad]
    return [y_TD.detach(), *(grad if grad is not None else torch.zeros(0) for grad in grads)]


def part_of(experts: Experts, index: int, parts: int) -> Experts:
    part = Experts(D, MoESpec(num_experts=E // parts, expert_width=12, router=RouterSpec(rule="top1")))
    own = slice(index * E // parts, (index + 1) * E // parts)
    part.gate_up_EDF.data, part.down_EFD.data = experts.gate_up_EDF.data[own], experts.down_EFD.data[own]
    return part


def check_equals_one_rank(
    kind: str, path: Path, ranks: int, node: int = 0, chunks: int = 1, tokens: tuple[int, ...] = TOKENS
) -> None:
    mesh = Mesh(Layout(dp_shard=ranks, ep=ranks, node=node), torch.device("cpu"))
    x_TD, choice, experts = setting(kind)
    wanted = outcome(x_TD, choice, experts, Local(), path)
    sizes = [*tokens[: ranks - 1], sum(tokens[ranks - 1 :])]
    start = sum(sizes[: mesh.rank])
    own = slice(start, start + sizes[mesh.rank])
    part = part_of(experts, mesh.rank, ranks)
    dispatcher = AllToAll(mesh["ep"], chunks=chunks)
    if node:
        dispatcher = Hierarchical(mesh["ep_node"], mesh["ep_rail"], node, chunks)
    got = outcome(
        x_TD[own], Choice(choice.expert_TK[own], choice.weight_TK[own]), part, dispatcher, path
    )
    near = 1e-6 if chunks == 1 else 5e-6  # products of fewer rows round otherwise
    for mine, whole in zip(got[:3], wanted[:3], strict=True):
        torch.testing.assert_close(mine, whole[own], rtol=near, atol=near)
    held = slice(mesh.rank * E // ranks, (mesh.rank + 1) * E // ranks)
    for mine, whole in zip(got[3:], wanted[3:], strict=True):
        torch.testing.assert_close(mine, whole[held], rtol=1e-5, atol=near)


KINDS = [
    "one or two experts",
    "all tokens to one expert",
    "a rank without rows",
    "a node without rows",
    "no expert at all",
]


@pytest.mark.parametrize("path", ["loop", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_to_all_equals_one_rank(kind: str, path: Path) -> None:
    run_on_ranks(check_equals_one_rank, kind, path, 4, ranks=4)


@pytest.mark.parametrize("kind", KINDS)
def test_two_levels_equal_one_rank(kind: str) -> None:
    run_on_ranks(check_equals_one_rank, kind, "fused", 4, 2, ranks=4)


@pytest.mark.parametrize("kind", ["one or two experts", "no expert at all"])
@pytest.mark.parametrize("node", [0, 1, 2])
def test_chunks_change_nothing(kind: str, node: int) -> None:
    run_on_ranks(check_equals_one_rank, kind, "fused", 4, node, 3, ranks=4)  # more chunks than some ranks have tokens


class Noting(Experts):
    """Experts that note how many exchanges had begun when they were called."""

    def forward(self, *given: Any) -> Tensor:
        seen.append(PULSE.entered)
        return super().forward(*given)


seen: list[int] = []


def exchanges_begun_before_each_chunk(chunks: int) -> list[int]:
    mesh = Mesh(Layout(dp_shard=2, ep=2), torch.device("cpu"))
    x_TD, choice, experts = setting("one or two experts")
    part = Noting(D, MoESpec(num_experts=E // 2, expert_width=12))
    part.load_state_dict(part_of(experts, mesh.rank, 2).state_dict())
    AllToAll(mesh["ep"], chunks=chunks)(x_TD, choice, part, "loop")
    return [*seen, PULSE.entered]


def test_the_next_chunk_is_under_way_while_one_is_computed() -> None:
    counts, there, back = 1, 2, 1  # rows and weights go there, outputs come back
    assert run_on_ranks(exchanges_begun_before_each_chunk, 1, ranks=2)[0] == [counts + there, counts + there + back]
    begun = run_on_ranks(exchanges_begun_before_each_chunk, 2, ranks=2)[0]
    assert begun == [counts + 2 * there, counts + 2 * there + back, counts + 2 * there + 2 * back]


@pytest.mark.parametrize("kind", ["one or two experts", "all tokens to one expert", "a node without rows"])
@pytest.mark.parametrize("tokens", [NODE_WITHOUT_TOKENS, RANK_WITH_ALL], ids=["idle node", "one busy rank"])
@pytest.mark.parametrize("node", [0, 2], ids=["flat", "hierarchical"])
def test_ranks_without_tokens_wait_for_nobody(kind: str, tokens: tuple[int, ...], node: int) -> None:
    run_on_ranks(check_equals_one_rank, kind, "fused", 4, node, 1, tokens, ranks=4)


def count_between_nodes(expert_TK: Tensor) -> tuple[int, int]:
    """Bytes that the flat and the two-level exchange send between two nodes of two ranks."""
    mesh = Mesh(Layout(dp_shard=4, ep=4, node=2), torch.device("cpu"))
    _, _, experts = setting("one or two experts")
    part, x_TD = part_of(experts, mesh.rank, 4), torch.randn(len(expert_TK), D)
    flat, levels = AllToAll(mesh["ep"], 2), Hierarchical(mesh["ep_node"], mesh["ep_rail"], 2)
    for dispatcher in (flat, levels):
        dispatcher(x_TD, Choice(expert_TK, torch.ones(expert_TK.shape)), part, "loop")
    return flat.traffic.between_bytes, levels.traffic.between_bytes


def test_a_token_crosses_to_a_node_once_for_all_its_experts_there() -> None:
    both_on_node_one = torch.tensor([[2, 3]] * 5)
    counted = run_on_ranks(count_between_nodes, both_on_node_one, ranks=4)
    row, extra = 4 * D, 2 * (4 + 8)  # float32; weight and expert of both slots
    assert counted[0] == (5 * 2 * (row + 4), 5 * (row + extra))  # node 0 sends its tokens
    assert counted[2] == (2 * 5 * row, 5 * row)  # node 1 sends outputs back: for two ranks' tokens


def test_two_experts_on_each_of_two_ranks() -> None:
    run_on_ranks(check_equals_one_rank, "one or two experts", "grouped", 2, ranks=2)


def raise_on_rank_one() -> None:
    assert torch.distributed.get_rank() != 1, "rank one is unhappy"


def test_a_failing_rank_is_named() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1: .*rank one is unhappy"):
        run_on_ranks(raise_on_rank_one, ranks=2)
