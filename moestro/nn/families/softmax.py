"""Mixtral, OLMoE and Qwen3-MoE: the k best of a softmax over experts."""

from moestro.core.errors import FamilyError
from moestro.core.specs import ModelSpec, MoESpec, RouterSpec
from moestro.nn.families.family import Family, read_grouped, read_sizes, write_heads, write_window
from moestro.nn.families.settings import Settings, Table


def _softmax_router(settings: Settings, renormalise: bool) -> RouterSpec:
    """The k best of a softmax."""
    k = settings.integer("num_experts_per_tok")
    if renormalise and k == 1:
        raise FamilyError(
            "num_experts_per_tok is 1 with weights that sum to 1: the router gets no gradient; moestro needs 2 or more"
        )
    return RouterSpec(
        rule="topk",
        k=k,
        weights="renormalise" if renormalise else "keep",
        aux_loss=settings.number("router_aux_loss_coef"),
    )


def _router(spec: ModelSpec) -> RouterSpec:
    assert spec.moe is not None
    return spec.moe.router


def _read_mixtral(settings: Settings) -> ModelSpec:
    attention = read_grouped(
        settings,
        head_dim=settings.optional_integer("head_dim") or 0,
        window=settings.optional_integer("sliding_window") or 0,
    )
    moe = MoESpec(
        num_experts=settings.integer("num_local_experts"),
        expert_width=settings.integer("intermediate_size"),
        router=_softmax_router(settings, renormalise=True),
    )
    return ModelSpec(**read_sizes(settings), attention=attention, moe=moe)


def _write_mixtral(spec: ModelSpec) -> Table:
    assert spec.moe is not None
    if _router(spec).max_experts == 1:
        raise FamilyError("model.moe.router takes 1 expert per token: its weight would be 1 in mixtral, not its score")
    return write_heads(spec) | {
        "sliding_window": write_window(spec)["sliding_window"],
        "num_local_experts": spec.moe.num_experts,
        "intermediate_size": spec.moe.expert_width,
        "num_experts_per_tok": _router(spec).max_experts,
        "router_aux_loss_coef": _router(spec).aux_loss,
    }


MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    sparse=True,
    moe="block_sparse_moe",
    parts=("w1", "w3", "w2"),
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "router_aux_loss_coef": 0.001,
        "max_position_embeddings": 4096 * 32,
    },
    aliases={"num_local_experts": "num_experts"},
    read_spec=_read_mixtral,
    write_spec=_write_mixtral,
)


def _read_olmoe(settings: Settings) -> ModelSpec:
    clip = settings.get("clip_qkv")
    if clip is not None and not settings.number("clip_qkv"):
        raise FamilyError(f"clip_qkv is {clip!r}; it must be above 0, or null not to clip")
    settings.only("head_dim", settings.integer("hidden_size") // settings.integer("num_attention_heads"), None)
    attention = read_grouped(settings, qk_norm="row", bias=settings.flag("attention_bias"), clip=float(clip or 0))
    moe = MoESpec(
        num_experts=settings.integer("num_experts"),
        expert_width=settings.integer("intermediate_size"),
        router=_softmax_router(settings, settings.flag("norm_topk_prob")),
    )
    return ModelSpec(**read_sizes(settings), attention=attention, moe=moe)


def _write_olmoe(spec: ModelSpec) -> Table:
    assert spec.moe is not None
    return {
        "num_key_value_heads": spec.attention.kv_heads,
        "attention_bias": spec.attention.bias,
        "clip_qkv": spec.attention.clip or None,
        "num_experts": spec.moe.num_experts,
        "intermediate_size": spec.moe.expert_width,
        "num_experts_per_tok": _router(spec).max_experts,
        "norm_topk_prob": _router(spec).weights == "renormalise",
        "router_aux_loss_coef": _router(spec).aux_loss,
    }


OLMOE = Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    sparse=True,
    qk_norm="row",
    defaults={
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "clip_qkv": None,
        "num_experts_per_tok": 8,
        "num_experts": 64,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
        "max_position_embeddings": 4096,
    },
    aliases={"num_experts": "num_local_experts"},
    read_spec=_read_olmoe,
    write_spec=_write_olmoe,
)


def _read_qwen3_moe(settings: Settings) -> ModelSpec:
    settings.get("max_window_layers")  # transformers gives all layers the window
    attention = read_grouped(
        settings,
        head_dim=settings.optional_integer("head_dim") or 0,
        qk_norm="head",
        bias=settings.flag("attention_bias"),
        window=(settings.optional_integer("sliding_window") or 0) if settings.flag("use_sliding_window") else 0,
    )
    sizes, step, named = read_sizes(settings), settings.integer("decoder_sparse_step"), settings.get("mlp_only_layers")
    if not isinstance(named, list | None):
        raise FamilyError(f"mlp_only_layers is {named!r}; it must be a list of layers")
    moe = MoESpec(
        num_experts=settings.integer("num_experts"),
        expert_width=settings.integer("moe_intermediate_size"),
        router=_softmax_router(settings, settings.flag("norm_topk_prob")),
    )
    dense = tuple(i for i in range(sizes["num_layers"]) if i in (named or ()) or (i + 1) % step)
    width = settings.integer("intermediate_size")
    return ModelSpec(**sizes, attention=attention, moe=moe, dense_layers=dense, dense_width=width)


def _write_qwen3_moe(spec: ModelSpec) -> Table:
    assert spec.moe is not None
    return (
        write_heads(spec)
        | write_window(spec)
        | {
            "attention_bias": spec.attention.bias,
            "num_experts": spec.moe.num_experts,
            "moe_intermediate_size": spec.moe.expert_width,
            "intermediate_size": spec.dense_width or spec.moe.expert_width,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(spec.dense_layers),
            "num_experts_per_tok": _router(spec).max_experts,
            "norm_topk_prob": _router(spec).weights == "renormalise",
            "router_aux_loss_coef": _router(spec).aux_loss,
        }
    )


QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    sparse=True,
    qk_norm="head",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": None,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
        "max_position_embeddings": 32768,
    },
    aliases={"num_experts": "num_local_experts"},
    read_spec=_read_qwen3_moe,
    write_spec=_write_qwen3_moe,
)
