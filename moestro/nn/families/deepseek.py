"""DeepSeek-V3: latent attention, shared experts, and a sigmoid router balanced by a bias on selection scores.

Its multi-token-prediction layers are weights beyond num_hidden_layers; we have none, see `names.differences`.
"""

from moestro.core.errors import FamilyError
from moestro.core.specs import AttentionSpec, ModelSpec, MoESpec, RouterSpec
from moestro.nn.families.family import Family, read_sizes
from moestro.nn.families.rope import read_rope
from moestro.nn.families.settings import Settings, Table


def _read_deepseek(settings: Settings) -> ModelSpec:
    for key, value in (("moe_layer_freq", 1), ("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        settings.only(key, value)
    sizes, experts = read_sizes(settings), settings.integer("n_routed_experts")
    expert_width = settings.integer("moe_intermediate_size")
    moe = MoESpec(
        num_experts=experts,
        expert_width=expert_width,
        shared_width=expert_width * settings.integer("n_shared_experts"),
        router=_sigmoid_router(settings, experts),
    )
    return ModelSpec(
        **sizes,
        attention=_latent(settings),
        moe=moe,
        dense_layers=tuple(range(min(settings.integer("first_k_dense_replace", least=0), sizes["num_layers"]))),
        dense_width=settings.integer("intermediate_size"),
    )


def _latent(settings: Settings) -> AttentionSpec:
    heads = settings.integer("num_attention_heads")
    plain, turned = settings.integer("qk_nope_head_dim"), settings.integer("qk_rope_head_dim")
    settings.only("num_key_value_heads", heads, None)
    settings.only("head_dim", turned, None)
    settings.only("qk_head_dim", plain + turned, None)
    return AttentionSpec(
        kind="mla",
        num_heads=heads,
        head_dim=plain,
        rope_head_dim=turned,
        value_head_dim=settings.integer("v_head_dim"),
        q_rank=settings.optional_integer("q_lora_rank") or 0,
        kv_rank=settings.integer("kv_lora_rank"),
        bias=settings.flag("attention_bias"),
        rope=read_rope(settings, interleaved=settings.flag("rope_interleave")),
    )


def _sigmoid_router(settings: Settings, num_experts: int) -> RouterSpec:
    """The k best of a sigmoid plus a learned bias, in the best groups."""
    groups, k = settings.integer("n_group"), settings.integer("num_experts_per_tok")
    if groups * 2 > num_experts:
        raise FamilyError(f"n_group is {groups} for {num_experts} experts; a group is scored by its two best: lower it")
    if settings.flag("norm_topk_prob") and k == 1:
        raise FamilyError("num_experts_per_tok is 1 with norm_topk_prob; moestro needs 2 or more, or no norm_topk_prob")
    return RouterSpec(
        rule="topk",
        k=k,
        score="sigmoid",
        weights="renormalise" if settings.flag("norm_topk_prob") else "keep",
        weight_scale=settings.number("routed_scaling_factor"),
        num_groups=groups,
        groups_per_token=settings.integer("topk_group"),
        aux_loss=settings.number("aux_loss_alpha"),
        aux_scope="sequence" if settings.flag("seq_aux") else "batch",
        selection_bias="loss_free",
    )


def _write_deepseek(spec: ModelSpec) -> Table:
    assert spec.moe is not None
    attention, router = spec.attention, spec.moe.router
    first_sparse = next(iter(spec.moe_layers), spec.num_layers)
    return {
        "num_key_value_heads": attention.num_heads,
        "qk_nope_head_dim": spec.head_dim,
        "qk_rope_head_dim": attention.rope_head_dim,
        "v_head_dim": attention.value_head_dim or spec.head_dim,
        "q_lora_rank": attention.q_rank or None,
        "kv_lora_rank": attention.kv_rank,
        "attention_bias": attention.bias,
        "rope_interleave": attention.rope.interleaved,
        "n_routed_experts": spec.moe.num_experts,
        "moe_intermediate_size": spec.moe.expert_width,
        "n_shared_experts": max(spec.moe.shared_width // spec.moe.expert_width, 1),
        "intermediate_size": spec.dense_width or spec.moe.expert_width,
        "first_k_dense_replace": first_sparse,
        "num_experts_per_tok": router.max_experts,
        "norm_topk_prob": router.weights == "renormalise",
        "routed_scaling_factor": router.weight_scale,
        "n_group": router.num_groups,
        "topk_group": router.groups_per_token,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "aux_loss_alpha": router.aux_loss,
        "seq_aux": router.aux_scope == "sequence",
        "num_nextn_predict_layers": 0,
    }


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    sparse=True,
    kind="mla",
    selection_bias=True,
    defaults={
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "head_dim": None,
        "qk_head_dim": None,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "attention_bias": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "aux_loss_alpha": 0.0,
        "seq_aux": False,
        "max_position_embeddings": 4096,
    },
    aliases={"n_routed_experts": "num_local_experts"},
    read_spec=_read_deepseek,
    write_spec=_write_deepseek,
)
