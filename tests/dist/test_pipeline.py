"""`dist.pipeline`: stages of equal cost, not of equal numbers of layers."""

from moestro.core.specs import ModelSpec, MoESpec
from moestro.dist.pipeline import cut_by_cost, layer_costs


def test_equal_layers_are_shared_out_evenly() -> None:
    assert cut_by_cost([1, 1, 1, 1], 2) == [range(2), range(2, 4)]


def test_a_dear_last_layer_stands_alone() -> None:
    assert cut_by_cost([1, 1, 1, 3], 2) == [range(3), range(3, 4)]


def test_the_output_head_counts() -> None:
    spec = ModelSpec(num_layers=4, width=8, vocab_size=4096, moe=MoESpec(num_experts=4, expert_width=8))
    assert cut_by_cost(layer_costs(spec, length=16), 2) == [range(3), range(3, 4)]
