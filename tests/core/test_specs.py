"""`core.specs`: impossible models are refused with the setting, its value and the bound."""

from dataclasses import replace
from typing import Any

import pytest

from moestro.core.config import build, to_table
from moestro.core.errors import ConfigError
from moestro.core.specs import AttentionSpec, ModelSpec, MoESpec, RouterSpec

MOE = {"num_experts": 4, "expert_width": 8}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"width": 30}, r"num_heads is 4; it must divide model.width = 30"),
        ({"attention": {"num_kv_heads": 3}}, r"num_kv_heads is 3; it must divide num_heads = 4"),
        ({"attention": {"kind": "mla"}}, r"kind mla has kv_rank 0"),
        ({"dense_layers": [5]}, r"dense_layers has \[5\]; layers are 0..1"),
        ({"dense_layers": [0]}, r"dense_width is 0; dense layers need it"),
        ({"moe": None}, r"dense_width is 0"),
        ({"attention": {"window_layers": [0]}}, r"window_layers is \[0\] but model.attention.window is 0"),
        ({"attention": {"window": 8, "window_layers": [2]}}, r"attention.window_layers has \[2\]; layers are 0..1"),
        ({"attention": {"clip": -1}}, r"q_rank and clip must be 0 or more"),
        (
            {"moe": MOE | {"router": {"rule": "relu", "mean_experts": 9}}},
            r"mean_experts is 9\.0; it must be at most num_experts = 4",
        ),
        (
            {"moe": MOE | {"router": {"rule": "topk", "k": 5}}},
            r"takes 5 experts per token but model.moe.num_experts is 4",
        ),
        ({"moe": MOE | {"router": {"mean_experts": 2.5}}}, r"mean_experts is 2.5; rule gap takes 1 to 2"),
        ({"moe": MOE | {"router": {"rule": "null"}}}, r"num_null is 0; rule null needs 1 or more"),
        ({"moe": MOE | {"router": {"num_groups": 3}}}, r"num_groups is 3; it must divide num_experts = 4"),
        ({"moe": MOE | {"router": {"rule": "topk", "k": 2, "num_groups": 4}}}, r"leaves 1 experts to choose 2 from"),
        ({"moe": MOE | {"router": {"groups_per_token": 2}}}, r"groups_per_token is 2; it must be in 1..1"),
        ({"moe": MOE | {"router": {"weights": "renormalise"}}}, r"may choose one expert: its weight would be 1"),
        ({"moe": MOE | {"router": {"rule": "top1", "weights": "renormalise"}}}, r"the router would get no gradient"),
    ],
)
def test_impossible_sizes_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(ModelSpec, {"num_layers": 2, "width": 32, "moe": MOE} | table)


def test_a_model_survives_its_table() -> None:
    spec = ModelSpec(
        num_layers=2,
        width=32,
        dense_layers=(0,),
        dense_width=64,
        attention=AttentionSpec(kind="mla", head_dim=8, kv_rank=16, rope_head_dim=4),
        moe=MoESpec(num_experts=4, expert_width=8, router=RouterSpec(rule="topk", k=3)),
    )
    assert build(ModelSpec, to_table(spec)) == spec
    assert spec.moe_layers == [1]
    assert replace(spec, moe=None, dense_layers=()).moe_layers == []
