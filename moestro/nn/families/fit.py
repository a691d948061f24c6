"""Which family can hold a model, and what stands in the way: write the model down, read it back, compare.

    ModelSpec -> family.write -> family.read -> ModelSpec'      every difference that matters is a problem

So a setting that a family has no place for can not be lost by being forgotten here: it comes back different.
`canonical` takes out what does not change the mathematics, for example the budget of a rule that has none.
"""

from dataclasses import asdict, replace
from typing import Any

from moestro.core.errors import FamilyError
from moestro.core.specs import AttentionSpec, ModelSpec, MoESpec, RopeSpec, RouterSpec
from moestro.nn.families.family import Family
from moestro.nn.families.known import FAMILIES

TRAINING = ("aux_loss", "aux_scope", "z_loss", "bias_rate", "input_noise")
"""Router settings that matter while training only."""

FIXED_RULES = ("top1", "top2", "topk")
RULE = ": train on with model.moe.router.rule=topk, or keep the model in moestro's form"
REMEDIES = {
    "model.moe.router.weights": ": train on with other weights",
    "model.moe.sharing": ": train with model.moe.sharing=none",
}


def problems(spec: ModelSpec, family: Family) -> list[str]:
    """What the family cannot express of this model, one sentence each; empty where it fits."""
    attention, sparse = spec.attention.kind, bool(spec.moe_layers)
    if attention != family.kind:
        return [f"model.attention.kind is {attention!r}, it has only {family.kind!r}"]
    if sparse != family.sparse:
        return [f"the model {'has' if sparse else 'has no'} experts (model.moe), the family {_has(family.sparse)}"]
    if spec.moe and sparse and spec.moe.router.rule not in FIXED_RULES:
        return [
            f"model.moe.router.rule is {spec.moe.router.rule!r}, it takes a fixed number of experts per token{RULE}"
        ]
    try:
        back = written_and_read(spec, family)
    except FamilyError as error:
        return [str(error)]
    ours, theirs = _flat(canonical(spec, family)), _flat(canonical(back, family))
    wrong = {key: (value, theirs.get(key)) for key, value in ours.items() if theirs.get(key) != value}
    return [
        f"{key} is {value!r}, it can hold {other!r}{REMEDIES.get(key, '')}" for key, (value, other) in wrong.items()
    ]


def written_and_read(spec: ModelSpec, family: Family) -> ModelSpec:
    """The model after a journey through the family's config.json."""
    return family.read(family.settings(family.write(spec) | {"max_position_embeddings": 2**31}))


def _has(sparse: bool) -> str:
    return "needs them" if sparse else "has none"


def training_settings(spec: ModelSpec, family: Family) -> list[str]:
    """Settings for training only that the family's config has no place for."""
    if spec.moe is None:
        return []
    back = written_and_read(spec, family)
    assert back.moe is not None
    ours, theirs = spec.moe.router, back.moe.router
    lost = [
        name for name in TRAINING if getattr(ours, name) not in (getattr(theirs, name), getattr(RouterSpec(), name))
    ]
    return [f"model.moe.router.{name} = {getattr(ours, name)!r}" for name in lost]


def family_for(spec: ModelSpec) -> Family:
    """The family a model belongs to by its shape; whether it fits is for `problems` to say."""
    if spec.attention.kind == "mla":
        return FAMILIES["deepseek_v3"]
    alike = [f for f in FAMILIES.values() if f.kind == "gqa" and f.sparse == bool(spec.moe_layers)]
    return next((f for f in alike if f.qk_norm == spec.attention.qk_norm), alike[0])


def check_fit(spec: ModelSpec, family: Family) -> None:
    """Raise FamilyError with everything that stands in the way."""
    found = problems(spec, family)
    if found:
        raise FamilyError(f"{family.name} cannot hold this model: {'; '.join(found)}")


def canonical(spec: ModelSpec, family: Family) -> ModelSpec:
    """The same mathematics with every setting that has no effect at its default."""
    sparse = bool(spec.moe_layers)
    return replace(
        spec,
        attention=_attention(spec),
        moe=_moe(spec.moe, family) if spec.moe and sparse else None,
        dense_layers=tuple(sorted(set(spec.dense_layers))) if sparse else (),
        dense_width=spec.dense_width if len(spec.moe_layers) < spec.num_layers else 0,
        init_std=0.02,
    )


def _attention(spec: ModelSpec) -> AttentionSpec:
    attention = spec.attention
    latent = attention.kind == "mla"
    windowed = tuple(sorted(set(attention.window_layers)))
    return replace(
        attention,
        num_kv_heads=0 if latent else attention.kv_heads,
        head_dim=spec.head_dim,
        value_head_dim=(attention.value_head_dim or spec.head_dim) if latent else 0,
        q_rank=attention.q_rank if latent else 0,
        kv_rank=attention.kv_rank if latent else 0,
        rope_head_dim=attention.rope_head_dim if latent else 0,
        memory_length=0,
        window_layers=() if len(windowed) == spec.num_layers else windowed,
        rope=_rope(attention.rope),
    )


def _rope(rope: RopeSpec) -> RopeSpec:
    plain = RopeSpec(theta=rope.theta, interleaved=rope.interleaved)
    match rope.scaling:
        case "none":
            return plain
        case "linear":
            return replace(plain, scaling="linear", factor=rope.factor)
        case "llama3":
            return replace(
                plain,
                scaling="llama3",
                factor=rope.factor,
                original_length=rope.original_length,
                low_frequency=rope.low_frequency,
                high_frequency=rope.high_frequency,
            )
        case "yarn":
            return replace(rope, low_frequency=plain.low_frequency, high_frequency=plain.high_frequency)


def _moe(moe: MoESpec, family: Family) -> MoESpec:
    rank = moe.sharing_rank if moe.sharing == "low_rank" else 8
    return replace(moe, sharing_rank=rank, router=_router(moe.router, family))


def _router(router: RouterSpec, family: Family) -> RouterSpec:
    """Rules that always take k experts are one rule; biases are one bias, zero where the family must have one."""
    limited = 1 < router.num_groups != router.groups_per_token
    biased = router.selection_bias != "none" or family.selection_bias
    return RouterSpec(
        rule="topk",
        k=router.max_experts,
        score=router.score,
        weights=router.weights,
        weight_scale=router.weight_scale,
        num_groups=router.num_groups if limited else 1,
        groups_per_token=router.groups_per_token if limited else 1,
        group_score=router.group_score if limited else "top2_sum",
        selection_bias="loss_free" if biased else "none",
    )


def _flat(spec: ModelSpec) -> dict[str, Any]:
    """{'model.attention.rope.theta': ...}."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}", item)
        else:
            flat[prefix] = value

    walk("model", asdict(spec))
    return flat
