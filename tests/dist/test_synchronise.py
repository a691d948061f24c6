"""`dist.synchronise`: copies that learn apart meet where they should, by sums one can do in the head."""

import pytest
import torch
from torch import nn

from moestro.dist.layout import Layout
from moestro.dist.mesh import Mesh
from moestro.dist.shard import whole
from moestro.dist.spec import DistSpec
from moestro.dist.synchronise import BoundedStaleness, make_synchroniser
from moestro.dist.testing import run_on_ranks

COPIES = 2


def walk(spec: DistSpec, steps: int, meet: bool) -> list[float]:
    """The weight after every step, where copy c moves it by c + 1 each time."""
    mesh = Mesh(Layout(dp_replicate=COPIES), torch.device("cpu"))
    weight = nn.Parameter(torch.zeros(1))
    synchroniser = make_synchroniser({"w": weight}, {"w": whole(weight)}, mesh["dp_replicate"], spec)
    assert synchroniser is not None
    seen = []
    for step in range(1, steps + 1):
        synchroniser.before_step()
        weight.data += mesh["dp_replicate"].index + 1
        synchroniser.after_step(step)
        seen.append(float(weight.detach()))
    if meet:
        synchroniser.meet()
        seen.append(float(weight.detach()))
    return seen


def test_local_copies_meet_at_their_mean() -> None:
    spec = DistSpec(dp_replicate=COPIES, sync="local", sync_every=2)
    assert run_on_ranks(walk, spec, 4, False, ranks=COPIES) == [[1, 3, 4, 6], [2, 3, 5, 6]]


def unsent(steps: int) -> tuple[list[list[float]], list[float]]:
    """Weights of both copies after every step, and where they meet; copy c moves weight c by 2 and the other by 1."""
    mesh = Mesh(Layout(dp_replicate=COPIES), torch.device("cpu"))
    weight, axis = nn.Parameter(torch.zeros(2)), mesh["dp_replicate"]
    spec = DistSpec(dp_replicate=COPIES, sync="local", sync_every=1, compression="topk", density=0.5)
    synchroniser = make_synchroniser({"w": weight}, {"w": whole(weight)}, axis, spec)
    assert synchroniser is not None
    seen = []
    for step in range(1, steps + 1):
        weight.data[axis.index] += 2
        weight.data[1 - axis.index] += 1
        synchroniser.after_step(step)
        seen.append(weight.tolist())
    synchroniser.meet()
    return seen, weight.tolist()


def test_what_a_copy_has_not_sent_stays_in_its_own_weights() -> None:
    first, second = run_on_ranks(unsent, 2, ranks=COPIES)
    assert first[0][0] == [1, 2]  # sent its 2 of weight 0, kept its 1 of weight 1, got half of the other's 2 there
    assert second[0][0] == [2, 1]
    assert first[1] == second[1] == [3, 3]  # nothing is lost: 2 steps of 1.5 on average


def test_an_outer_step_follows_nesterov() -> None:
    spec = DistSpec(dp_replicate=COPIES, sync="diloco", sync_every=1, outer_lr=0.5, outer_momentum=0.5)
    first = 0.5 * (1.5 + 0.5 * 1.5)  # rate (gradient + momentum velocity); copies move by 1.5 on average
    second = first + 0.5 * (1.5 + 0.5 * (0.5 * 1.5 + 1.5))
    for seen in run_on_ranks(walk, spec, 2, False, ranks=COPIES):
        assert seen == pytest.approx([first, second])


@pytest.mark.parametrize("staleness", [0, 2])
def test_late_updates_arrive_in_bounded_time_and_none_is_lost(staleness: int) -> None:
    spec = DistSpec(dp_replicate=COPIES, sync="stale", staleness=staleness)
    for copy, seen in enumerate(run_on_ranks(walk, spec, 5, True, ranks=COPIES)):
        own, other = (copy + 1) / COPIES, (2 - copy) / COPIES
        assert seen[:5] == [own * step + other * max(step - staleness, 0) for step in range(1, 6)]
        assert seen[5] == 1.5 * 5


def test_no_more_than_the_bound_is_under_way() -> None:
    assert max(run_on_ranks(most_under_way, ranks=COPIES)) == 3


def most_under_way() -> int:
    mesh = Mesh(Layout(dp_replicate=COPIES), torch.device("cpu"))
    spec = DistSpec(dp_replicate=COPIES, sync="stale", staleness=3)
    copies = BoundedStaleness({"w": nn.Parameter(torch.zeros(1))}, mesh["dp_replicate"], spec)
    most = 0
    for step in range(1, 9):
        copies.before_step()
        copies.after_step(step)
        most = max(most, len(copies.under_way))
    return most
