"""Holders of an expert add up its gradient in parts, and each sends as much as any other."""

import pytest
import torch

from moestro.core.specs import MoESpec, RouterSpec
from moestro.dist.layout import Layout
from moestro.dist.mesh import Mesh
from moestro.dist.replicas import ReplicaSum
from moestro.dist.slots import LayerSlots, assign, table_of
from moestro.dist.testing import run_on_ranks
from moestro.nn.experts import Experts

HOLDERS = [[0, 1, 2], [2, 3], [1], [3]]
NUMBERS = 3 * 8 * 16
"""Of one expert."""


def sum_gradients() -> tuple[list[torch.Tensor], float]:
    """On every rank: the summed gradients of its slots' experts, and the bytes it sent."""
    mesh = Mesh(Layout(dp_shard=4, ep=4), torch.device("cpu"))
    held_ER, share_EP = torch.zeros(4, 4, dtype=torch.bool), torch.zeros(4, 3)
    for expert, ranks in enumerate(HOLDERS):
        held_ER[expert, ranks] = True
        share_EP[expert, : len(ranks)] = 1 / len(ranks)
    table = table_of(assign(held_ER, torch.full((4, 2), -1)), share_EP, mesh.device)
    experts = Experts(16, MoESpec(num_experts=2, expert_width=8, router=RouterSpec(rule="top2")))
    for number, parameter in enumerate(experts.parameters()):
        parameter.grad = torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(10 * mesh.rank + number)
        )
    replicas = ReplicaSum(mesh["ep"])
    replicas.follow([LayerSlots("", table, experts)])
    replicas()
    return [parameter.grad for parameter in experts.parameters() if parameter.grad is not None], replicas.sent_bytes


def test_every_holder_has_the_sum_and_all_send_alike() -> None:
    found = run_on_ranks(sum_gradients, ranks=4)
    # slots fill in order of experts: 0 | 0 2 | 0 1 | 1 3
    slot = {(0, 0): 0, (0, 1): 0, (0, 2): 0, (1, 2): 1, (1, 3): 0, (2, 1): 1, (3, 3): 1}
    for number in range(2):
        shape = found[0][0][number].shape
        own = [torch.randn(shape, generator=torch.Generator().manual_seed(10 * rank + number)) for rank in range(4)]
        for expert, ranks in enumerate(HOLDERS):
            wanted = own[ranks[0]][slot[expert, ranks[0]]]
            for rank in ranks[1:]:
                wanted = wanted + own[rank][slot[expert, rank]]  # in the order of ranks
            for rank in ranks:
                assert torch.equal(found[rank][0][number][slot[expert, rank]], wanted)
    three, two = 4 * NUMBERS * 2 * 2 / 3, 4 * NUMBERS * 2 * 1 / 2  # twice all parts but the own one
    assert [sent for _, sent in found] == pytest.approx([three, three, three + two, two])
