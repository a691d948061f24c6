"""`nn.families` computes what transformers computes: logits and every gradient, for every family and setting.

Tiny random models are made by transformers, their tensors taken over in memory under the names transformers uses there;
files are `tests/train/test_exchange.py`. Also here: what is refused, and in which words.
"""

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moestro.core.errors import ConfigError, FamilyError
from moestro.core.specs import AttentionSpec, ModelSpec, MoESpec, RopeSpec, RouterSpec
from moestro.nn.decoder import Decoder
from moestro.nn.families.family import Family
from moestro.nn.families.fit import canonical, check_fit, family_for, problems, training_settings
from moestro.nn.families.known import FAMILIES
from moestro.nn.families.names import Piece, differences, not_covered, pieces
from moestro.nn.families.upcycle import Upcycle, copied_to_experts, start_routers, upcycled

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}
QWEN3_MOE = EXPERTS | {"moe_intermediate_size": 16, "head_dim": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 5e5,
}
LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}

BASES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "olmoe": EXPERTS,
    "qwen3_moe": QWEN3_MOE,
    "deepseek_v3": LATENT,
    "llama": {},
    "qwen3": {"head_dim": 16},
}
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("mixtral", "plain", {}),
    (
        "mixtral",
        "tied, wide heads, three experts",
        {"tie_word_embeddings": True, "head_dim": 12, "num_experts_per_tok": 3},
    ),
    ("mixtral", "window, linear", {"sliding_window": 5, "rope_parameters": LINEAR}),
    ("olmoe", "plain", {}),
    ("olmoe", "normalised, clipped", {"norm_topk_prob": True, "clip_qkv": 0.7}),
    (
        "olmoe",
        "biased, tied, one expert",
        {"attention_bias": True, "tie_word_embeddings": True, "num_experts_per_tok": 1},
    ),
    ("qwen3_moe", "plain", {}),
    (
        "qwen3_moe",
        "normalised, dense layer, yarn",
        {"norm_topk_prob": True, "mlp_only_layers": [0], "rope_parameters": YARN},
    ),
    (
        "qwen3_moe",
        "every second layer, window",
        {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 4},
    ),
    ("qwen3_moe", "biased, tied", {"attention_bias": True, "tie_word_embeddings": True}),
    ("deepseek_v3", "plain", {}),
    ("deepseek_v3", "whole queries, halves", {"q_lora_rank": None, "rope_interleave": False, "n_shared_experts": 2}),
    ("deepseek_v3", "one group, raw weights", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    ("deepseek_v3", "yarn", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 20.0}}),
    (
        "deepseek_v3",
        "biased, tied, all sparse",
        {"attention_bias": True, "tie_word_embeddings": True, "first_k_dense_replace": 0},
    ),
    ("llama", "plain", {}),
    ("llama", "llama3, tied, biased", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "attention_bias": True}),
    ("llama", "linear, narrow heads", {"rope_parameters": LINEAR, "head_dim": 6}),
    ("qwen3", "plain", {}),
    ("qwen3", "late window", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    (
        "qwen3",
        "yarn, tied",
        {
            "rope_parameters": YARN | {"attention_factor": 1.3, "truncate": False, "beta_fast": 1.0, "beta_slow": 0.2},
            "tie_word_embeddings": True,
        },
    ),
]
"""Family, what is special, and the settings."""


def random_model(name: str, fields: dict[str, Any]) -> Any:
    """A transformers model whose every tensor is random and large enough to matter."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **SIZES | BASES[name] | fields)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        for tensor_name, tensor in model.state_dict().items():
            tensor.normal_(1.0 if "norm" in tensor_name else 0.0, 0.15)
    return model


def settings_of(model: Any) -> dict[str, Any]:
    """What transformers would write as config.json."""
    return dict(json.loads(model.config.to_json_string(use_diff=False)))


def taken_over(model: Any, family: Family) -> tuple[Decoder, list[Piece]]:
    """Our model with the tensors of theirs."""
    spec = family.read(family.settings(settings_of(model)))
    ours, plan, state = Decoder(spec), list(pieces(spec, family, stacked=True)), model.state_dict()
    if spec.tied_head:
        state.pop("lm_head.weight", None)
    assert not differences(plan, {name: tuple(tensor.shape) for name, tensor in state.items()})
    own = ours.state_dict()
    assert not not_covered(plan, own, [name for name, _ in ours.named_parameters()])
    with torch.no_grad():
        for piece in plan:
            piece.part(own[piece.ours]).copy_(state[piece.name])
    return ours.eval(), plan


@pytest.mark.parametrize(
    ("name", "what", "fields"), VARIANTS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_logits_and_gradients_are_those_of_transformers(name: str, what: str, fields: dict[str, Any]) -> None:
    theirs = random_model(name, fields)
    ours, plan = taken_over(theirs, FAMILIES[name])
    token_BS = torch.randint(0, 48, (2, 14))
    wanted, got = theirs(token_BS).logits, ours(token_BS).logit_BSV
    assert float(wanted.detach().std()) > 0.5, what  # small logits would agree whatever they are
    for logit_BSV in (wanted, got):
        F.cross_entropy(logit_BSV[:, :-1].flatten(0, 1), token_BS[:, 1:].flatten(), reduction="sum").backward()
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    wanted_of, got_of = dict(theirs.named_parameters()), dict(ours.named_parameters())
    learned = [piece for piece in plan if piece.ours in got_of]  # all but selection biases
    assert {piece.name for piece in learned} == wanted_of.keys()
    for piece in learned:
        gradient = piece.part(got_of[piece.ours].grad)
        torch.testing.assert_close(gradient, wanted_of[piece.name].grad, rtol=1e-5, atol=1e-5, msg=piece.name)


@pytest.mark.parametrize(
    ("name", "what", "fields"), VARIANTS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_can_be_read_can_be_written(name: str, what: str, fields: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config, family = transformers.AutoConfig.for_model(name, **SIZES | BASES[name] | fields), FAMILIES[name]
    spec = family.read(family.settings(json.loads(config.to_json_string(use_diff=False))))
    assert problems(spec, family) == [], what
    assert family_for(spec) is family


@pytest.mark.parametrize("name", FAMILIES)
def test_a_missing_setting_means_what_it_means_to_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    written = json.loads(transformers.AutoConfig.for_model(name).to_json_string(use_diff=False))
    family = FAMILIES[name]
    said, silent = family.read(family.settings(written)), family.read(family.settings({}))
    assert canonical(said, family) == canonical(silent, family)


HUB: dict[str, dict[str, Any]] = {
    "mixtral": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0",
    },
    "olmoe": {"clip_qkv": None, "eos_token_id": 50279, "rope_scaling": None, "rope_theta": 10000.0, "use_cache": True},
    "qwen3_moe": {
        "head_dim": 128,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "deepseek_v3": {
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 1,
        "pretraining_tp": 1,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "topk_method": "noaux_tc",
    },
    "llama": {
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "pretraining_tp": 1,
    },
    "qwen3": {
        "head_dim": 128,
        "max_window_layers": 20,
        "rope_scaling": None,
        "sliding_window": 4096,
        "use_sliding_window": True,
    },
}
"""What config.json files of published models have beside sizes, as transformers 4 wrote it."""


@pytest.mark.parametrize("name", HUB)
def test_config_files_of_transformers_4_are_read(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config, family = transformers.AutoConfig.for_model(name, **HUB[name]), FAMILIES[name]
    newer = json.loads(config.to_json_string(use_diff=False))
    old = family.read(family.settings(HUB[name] | {"architectures": [family.architecture], "model_type": name}))
    assert canonical(old, family) == canonical(family.read(family.settings(newer)), family)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, r"hidden_act is 'gelu'; moestro has only 'silu'"),
        ("llama", {"mlp_bias": True}, r"mlp_bias is True; moestro has only False"),
        ("llama", {"hidden_size": "big"}, r"hidden_size is 'big'; it must be a whole number of 1 or more"),
        ("llama", {"num_attention_heads": 5, "hidden_size": 32}, r"cannot be: model.attention.num_heads is 5"),
        ("llama", {"sliding_window": 8}, r"sliding_window is 8; moestro does not know .* --leave-out sliding_window"),
        ("llama", {"attention_dropout": 0.1}, r"attention_dropout is 0.1; moestro trains without dropout"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, r"quantization_config is 'fp8'; .* to bf16 first"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, r"reads llama as LlamaForCausalLM only"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_scaling.rope_type is 'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, r"rope_parameters.rope_type is 'longrope'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, r"rope_scaling.factor is None; it must be a number"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 3}}, r"beta_fast is 3: .* not use it"),
        ("llama", {"rope_parameters": {"full_attention": {}}}, r"moestro has one table for all layers"),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0.5; moestro has only 1"),
        ("qwen3", {"layer_types": ["full_attention"]}, r"layer_types is \['full_attention'\]; it must name"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 32}, r"sliding_attention but sliding_window is None"),
        ("mixtral", {"num_experts_per_tok": 1}, r"num_experts_per_tok is 1 with weights that sum to 1"),
        ("mixtral", {"router_jitter_noise": 0.1}, r"router_jitter_noise is 0.1; moestro trains without noise"),
        ("mixtral", {"num_local_experts": 8, "num_experts": 4}, r"num_local_experts is 8 but num_experts is 4"),
        ("olmoe", {"clip_qkv": 0.0}, r"clip_qkv is 0.0; it must be above 0, or null"),
        ("olmoe", {"norm_topk_prob": 1}, r"norm_topk_prob is 1; it must be true or false"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, r"decoder_sparse_step is 0; it must be a whole number of 1"),
        ("qwen3_moe", {"mlp_only_layers": 3}, r"mlp_only_layers is 3; it must be a list"),
        ("deepseek_v3", {"scoring_func": "softmax"}, r"scoring_func is 'softmax'; moestro has only 'sigmoid'"),
        ("deepseek_v3", {"topk_method": "greedy"}, r"topk_method is 'greedy'"),
        ("deepseek_v3", {"num_key_value_heads": 8}, r"num_key_value_heads is 8; moestro has only 128"),
        ("deepseek_v3", {"n_group": 256}, r"n_group is 256 for 256 experts"),
        ("deepseek_v3", {"num_experts_per_tok": 1}, r"num_experts_per_tok is 1 with norm_topk_prob"),
        ("deepseek_v3", {"n_shared_experts": 0}, r"n_shared_experts is 0; it must be a whole number of 1"),
    ],
)
def test_a_setting_that_we_cannot_represent_is_named_with_its_value(
    name: str, fields: dict[str, Any], message: str
) -> None:
    family = FAMILIES[name]
    with pytest.raises(FamilyError, match=message):
        family.read(family.settings(fields))


def test_settings_for_training_can_be_left_out_by_name_and_others_cannot() -> None:
    family, table = FAMILIES["llama"], {"attention_dropout": 0.1, "unsloth": "yes", "hidden_act": "gelu"}
    settings = family.settings({**table, "hidden_act": "silu"}, ("attention_dropout", "unsloth"))
    family.read(settings)
    assert settings.left_out == ["attention_dropout = 0.1", "unsloth = 'yes'"]
    with pytest.raises(FamilyError, match="hidden_act is 'gelu'"):
        family.read(family.settings(table, ("*",)))


SPARSE = MoESpec(num_experts=6, expert_width=16, router=RouterSpec(rule="topk", k=2, weights="renormalise"))
GROUPED = MoESpec(
    num_experts=8,
    expert_width=16,
    shared_width=16,
    router=RouterSpec(
        rule="topk",
        k=2,
        score="sigmoid",
        num_groups=4,
        groups_per_token=2,
        selection_bias="loss_free",
        weight_scale=2.0,
    ),
)
MLA = AttentionSpec(kind="mla", head_dim=12, rope_head_dim=8, kv_rank=16, q_rank=12, rope=RopeSpec(interleaved=True))
MODELS: dict[str, ModelSpec] = {
    "mixtral": ModelSpec(num_layers=2, width=32, vocab_size=48, moe=SPARSE, attention=AttentionSpec(window=6)),
    "olmoe": ModelSpec(
        num_layers=2, width=32, vocab_size=48, moe=SPARSE, attention=AttentionSpec(qk_norm="row", clip=0.9)
    ),
    "qwen3_moe": ModelSpec(
        num_layers=2,
        width=32,
        vocab_size=48,
        moe=SPARSE,
        dense_layers=(1,),
        dense_width=20,
        attention=AttentionSpec(qk_norm="head", rope=RopeSpec(scaling="linear", factor=2.0)),
    ),
    "deepseek_v3": ModelSpec(
        num_layers=2, width=32, vocab_size=48, moe=GROUPED, dense_layers=(0,), dense_width=20, attention=MLA
    ),
    "llama": ModelSpec(
        num_layers=2,
        width=32,
        vocab_size=48,
        dense_width=20,
        attention=AttentionSpec(num_kv_heads=2, rope=RopeSpec(scaling="yarn", factor=2.0, original_length=8)),
    ),
    "qwen3": ModelSpec(
        num_layers=2,
        width=32,
        vocab_size=48,
        dense_width=20,
        tied_head=False,
        attention=AttentionSpec(qk_norm="head", window=4, window_layers=(1,)),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_finds_its_family_and_comes_back_the_same(name: str) -> None:
    spec, family = MODELS[name], FAMILIES[name]
    assert family_for(spec) is family
    assert problems(spec, family) == []
    table = json.loads(json.dumps(family.write(spec) | {"max_position_embeddings": 64}))
    assert canonical(family.read(family.settings(table)), family) == canonical(spec, family)
    assert pieces_of(spec, family) == pieces_of(family.read(family.settings(table)), family)


def pieces_of(spec: ModelSpec, family: Family) -> list[Piece]:
    return list(pieces(spec, family))


def changed_once(value: Any) -> Iterator[Any]:
    """The dataclass with one field different, for every field that can be, nested ones included."""
    for field in fields(value):
        old = getattr(value, field.name)
        options: Iterator[Any] = iter(ALTERNATIVES.get(field.name, []))
        if is_dataclass(old):
            options = changed_once(old)
        elif isinstance(old, int | float):
            options = iter([not old if isinstance(old, bool) else old * 2 + 1])
        for new in options:
            try:
                yield replace(value, **{field.name: new})
            except ConfigError:
                continue


ALTERNATIVES: dict[str, list[Any]] = {
    "kind": ["gqa", "mla", "transformer_xl"],
    "qk_norm": ["none", "head", "row"],
    "scaling": ["none", "linear", "llama3", "yarn"],
    "rule": ["top1", "top2", "topk", "gap", "topp", "gshard", "relu", "expert_choice", "quantile"],
    "score": ["softmax", "sigmoid"],
    "weights": ["keep", "pair", "ramp", "renormalise"],
    "group_score": ["max", "top2_sum"],
    "selection_bias": ["none", "loss_free", "quantile"],
    "sharing": ["none", "low_rank"],
    "dense_layers": [(), (0,), (1,)],
    "window_layers": [(), (0,), (0, 1)],
    "attention_factor": [1.5],
    "moe": [None],
}


@pytest.mark.parametrize("name", MODELS)
def test_what_a_family_does_not_write_down_changes_nothing(name: str) -> None:
    """Every field of a model is changed once: it is refused, or it is written, or the model computes the same.

    Selection biases are zero here; that a bias which the router does not use goes out as zeros is in test_exchange.
    """
    base, family = MODELS[name], FAMILIES[name]
    model = Decoder(base).eval().initialise()
    token_BS, counted = torch.randint(0, 48, (1, 12)), {"refused": 0, "written": 0, "same": 0}
    with torch.no_grad():
        wanted = model(token_BS).logit_BSV
        for other in changed_once(base):
            if problems(other, family):
                counted["refused"] += 1
            elif family.write(other) != family.write(base):
                counted["written"] += 1
            else:
                twin = Decoder(other).eval()
                twin.load_state_dict(model.state_dict())
                assert torch.equal(twin(token_BS).logit_BSV, wanted), other
                counted["same"] += 1
    assert min(counted.values()) > 3, counted


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mixtral", {"rule": "gap", "weights": "keep"}, r"router.rule is 'gap', it takes a fixed number .*rule=topk"),
        ("mixtral", {"rule": "topp", "weights": "keep"}, r"router.rule is 'topp'"),
        ("mixtral", {"weights": "keep"}, r"router.weights is 'keep', it can hold 'renormalise': train on with other"),
        ("mixtral", {"rule": "top1", "weights": "keep"}, r"takes 1 expert per token: its weight would be 1"),
        ("olmoe", {"score": "sigmoid"}, r"router.score is 'sigmoid', it can hold 'softmax'"),
        ("qwen3_moe", {"weight_scale": 2.0}, r"router.weight_scale is 2.0, it can hold 1.0"),
        ("olmoe", {"num_groups": 3, "groups_per_token": 2}, r"num_groups is 3, it can hold 1; .*groups_per_token"),
    ],
)
def test_a_router_that_a_family_cannot_express_is_named(name: str, change: dict[str, Any], message: str) -> None:
    spec = MODELS[name]
    assert spec.moe is not None
    other = replace(spec, moe=replace(spec.moe, router=replace(spec.moe.router, **change)))
    with pytest.raises(FamilyError, match=f"{name} cannot hold this model: .*{message}"):
        check_fit(other, FAMILIES[name])


def test_other_things_a_family_cannot_express_are_named() -> None:
    spec, moe = MODELS["mixtral"], replace(SPARSE, sharing="low_rank")
    with pytest.raises(
        FamilyError, match=r"sharing is 'low_rank', it can hold 'none': train with model.moe.sharing=none"
    ):
        check_fit(replace(spec, moe=moe), FAMILIES["mixtral"])
    with pytest.raises(FamilyError, match=r"attention.kind is 'transformer_xl', it has only 'gqa'"):
        check_fit(replace(spec, attention=AttentionSpec(kind="transformer_xl", memory_length=4)), FAMILIES["mixtral"])
    with pytest.raises(FamilyError, match=r"the model has experts \(model.moe\), the family has none"):
        check_fit(spec, FAMILIES["llama"])
    uneven = replace(MODELS["llama"], attention=AttentionSpec(num_heads=5, head_dim=8))
    with pytest.raises(FamilyError, match=r"num_heads is 5; transformers wants it to divide model.width = 32"):
        check_fit(uneven, FAMILIES["llama"])
    windowed = replace(spec, attention=AttentionSpec(window=6, window_layers=(1,)))
    with pytest.raises(FamilyError, match=r"attention.window_layers is \(1,\), it can hold \(\)"):
        check_fit(windowed, FAMILIES["mixtral"])


def test_training_settings_without_a_place_are_listed() -> None:
    for name, lost in {
        "mixtral": ["aux_scope = 'sequence'", "z_loss = 0.001"],
        "deepseek_v3": ["z_loss = 0.001"],
    }.items():
        spec = MODELS[name]
        assert spec.moe is not None
        router = replace(spec.moe.router, z_loss=0.001, aux_loss=0.02, aux_scope="sequence")
        found = training_settings(replace(spec, moe=replace(spec.moe, router=router)), FAMILIES[name])
        assert found == [f"model.moe.router.{text}" for text in lost]


def test_differences_are_listed_in_both_directions() -> None:
    expected = [Piece("a", (2,), "x"), Piece("b", (3,), "y")]
    assert differences(expected, {"a": (2,), "b": (3,)}) == []
    assert differences(expected, {"b": (4,), "c": (1,)}) == ["a is missing", "c is unknown", "b is [4], not [3]"]
    state = {"x": torch.zeros(2), "y": torch.zeros(6), "z": torch.zeros(1)}
    assert not_covered([Piece("a", (2,), "x"), Piece("b", (3,), "y", (slice(3),))], state, state) == ["y", "z"]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize(("experts", "k", "rule"), [(4, 2, "topk"), (6, 3, "topk"), (4, 2, "gap")])
def test_an_upcycled_model_begins_as_the_dense_one(name: str, experts: int, k: int, rule: str) -> None:
    dense = random_model(name, {})
    family, how = FAMILIES[name], Upcycle(num_experts=experts, k=k, rule=rule)
    spec = family.read(family.settings(settings_of(dense)))
    sparse = Decoder(upcycled(spec, how)).eval()
    own, state = sparse.state_dict(), dense.state_dict()
    with torch.no_grad():
        for piece in copied_to_experts(pieces(spec, family)):
            piece.part(own[piece.ours]).copy_(state[piece.name])
    start_routers(sparse, how)
    token_BS = torch.randint(0, 48, (2, 14))
    output = sparse(token_BS)
    torch.testing.assert_close(output.logit_BSV, dense(token_BS).logits, rtol=0, atol=1e-5)
    assert [record.mean_experts for record in output.records] == [k, k]
    assert all((record.count_E > 0).sum() > k for record in output.records)  # tokens do not all go the same way
    output.logit_BSV.square().mean().backward()
    assert sparse.routers[0].weight_ED.grad is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 4, "k": 1}, r"--k is 1 with --experts 4; k must be in 2..experts"),
        ({"num_experts": 4, "k": 5}, r"--k is 5 with --experts 4"),
        ({"num_experts": 4, "k": 3, "rule": "gap"}, r"--k is 3; rule gap takes one or two"),
        ({"num_experts": 4, "rule": "topp"}, r"--rule is 'topp'; it must be topk or gap"),
    ],
)
def test_impossible_upcycling_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FamilyError, match=message):
        Upcycle(**fields)


def test_a_model_with_experts_is_not_upcycled() -> None:
    with pytest.raises(FamilyError, match="has 6 experts already; leave out --experts"):
        upcycled(MODELS["mixtral"], Upcycle(num_experts=4))
