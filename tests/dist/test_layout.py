"""`dist.layout`: which ranks work together, against cases one can write down."""

import pytest

from moestro.core.errors import ConfigError
from moestro.dist.layout import AXES, Layout, fit
from moestro.dist.spec import DistSpec


def test_neighbours_share_experts_and_strangers_share_gradients() -> None:
    layout = fit(DistSpec(ep=2), 4)
    assert layout == Layout(dp_shard=4, ep=2)
    assert layout.groups("ep") == [[0, 1], [2, 3]]
    assert layout.groups("edp") == [[0, 2], [1, 3]]
    assert layout.groups("dp") == [[0, 1, 2, 3]]


def test_experts_fold_over_shards_and_tensor_parts_while_attention_does_not() -> None:
    layout = fit(DistSpec(pp=2, tp=2, ep=4), 8)
    assert layout.dp_shard == 2
    assert layout.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.groups("ep") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert layout.groups("edp") == [[rank] for rank in range(8)]
    assert layout.groups("pp") == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_copies_stay_out_of_expert_groups() -> None:
    layout = Layout(dp_replicate=2, dp_shard=2, ep=2)
    assert layout.groups("ep") == [[0, 1], [2, 3]]
    assert layout.groups("edp") == [[0, 2], [1, 3]]
    assert layout.groups("edp_shard") == [[0], [1], [2], [3]]


@pytest.mark.parametrize("axis", AXES)
def test_every_rank_is_in_exactly_one_group_of_an_axis(axis: str) -> None:
    layout = Layout(pp=2, dp_replicate=2, dp_shard=3, tp=2, ep=3)
    assert sorted(rank for group in layout.groups(axis) for rank in group) == list(range(24))


def test_impossible_products_are_refused_with_the_nearest_possible() -> None:
    with pytest.raises(ConfigError, match=r"dist.ep is 3; it must divide dp_shard x tp = 4 x 1; nearest .* dist.ep=4"):
        fit(DistSpec(ep=3), 4)
    with pytest.raises(ConfigError, match=r"tp 3 = 3 ranks, but there are 4; nearest possible on 4 ranks: .*dist.tp=4"):
        fit(DistSpec(tp=3), 4)
    with pytest.raises(ConfigError, match="dp_shard 8 x tp 1 = 8 ranks, but there are 4"):
        fit(DistSpec(dp_shard=8), 4)
