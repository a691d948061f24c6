"""A model's dimensions as planning needs them, and how many parameters lie where.

    ModelSpec (+ [planning])  |  config.json  |  a published row   ->   ModelShape   ->   parameters by bucket

Planning needs a few facts that the trainer does not have: feed-forward layers without a gate (GPT-3), extra heads that
predict further tokens (DeepSeek-V3). They stand in the `[planning]` table of a model file.

Dimension key of parameter counts: what tensor parallelism cuts (attention, dense feed-forward, shared expert,
embedding), what it does not (norms, router), and routed experts.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moestro.core.config import STRICT, build, read_toml, with_overrides
from moestro.core.errors import PlanError
from moestro.core.specs import ModelSpec, MoESpec
from moestro.plan.columns import Number


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanningExtras:
    """What a model has that the trainer does not build."""

    __pydantic_config__ = STRICT
    name: str = ""
    gated: bool = True
    """Feed-forward layers have a gate (SwiGLU): three matrices instead of two."""
    extra_heads: int = 0
    """Multi-token prediction: modules of one layer, a 2 width x width projection and the output head each."""
    mean_experts: float = 0.0
    """Mean routed experts per token, where the router's rule does not fix it."""
    released: float = 0.0
    """Year; for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFile:
    """A file of specs/models."""

    __pydantic_config__ = STRICT
    model: ModelSpec
    planning: PlanningExtras = PlanningExtras()


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A decoder in numbers; every number may be a column."""

    name: str
    num_layers: Number
    num_dense: Number
    """Layers with a dense feed-forward; the rest have experts."""
    width: Number
    heads: Number
    kv_heads: Number
    qk_dim: Number
    """Width of a query or key head, positions included."""
    v_dim: Number
    q_rank: Number = 0.0
    """Latent attention: rank of queries; 0 leaves them uncompressed."""
    kv_rank: Number = 0.0
    """Latent attention where above 0: rank of what keys and values share."""
    rope_dim: Number = 0.0
    """Latent attention: the part of a head that carries positions, one for all heads in the keys."""
    dense_width: Number = 0.0
    gates: Number = 1.0
    """1 with a gate, 0 without: a feed-forward layer has 2 + gates matrices."""
    experts: Number = 0.0
    experts_per_token: Number = 0.0
    """Mean routed experts of a token."""
    expert_width: Number = 0.0
    shared_width: Number = 0.0
    vocab: Number = 0.0
    tied: Number = 0.0
    """1 where embedding and head are one matrix."""
    extra_heads: Number = 0.0
    window: Number = 0.0
    windowed_share: Number = 0.0
    """Share of the layers that see at most `window` tokens."""

    @property
    def sparse(self) -> Number:
        """1 where there are experts."""
        return np.where(np.asarray(self.experts) > 0, 1.0, 0.0)

    @property
    def latent(self) -> Number:
        """1 where attention is latent (MLA)."""
        return np.where(np.asarray(self.kv_rank) > 0, 1.0, 0.0)

    @property
    def num_sparse(self) -> Number:
        """Layers with experts."""
        return self.num_layers - self.num_dense

    @property
    def attention_params(self) -> Number:
        """Weights of one layer's projections (2412.19437 for the latent form)."""
        q = np.where(
            np.asarray(self.q_rank) > 0,
            self.width * self.q_rank + self.q_rank * self.heads * self.qk_dim,
            self.width * self.heads * self.qk_dim,
        )
        plain_kv = self.width * self.kv_heads * (self.qk_dim + self.v_dim)
        nope = self.qk_dim - self.rope_dim
        latent_kv = self.width * (self.kv_rank + self.rope_dim) + self.kv_rank * self.heads * (nope + self.v_dim)
        return q + np.where(self.latent > 0, latent_kv, plain_kv) + self.heads * self.v_dim * self.width

    @property
    def dense_ff_params(self) -> Number:
        """Weights of one dense feed-forward layer."""
        return (2 + self.gates) * self.width * self.dense_width

    @property
    def shared_params(self) -> Number:
        """Weights of one layer's shared expert."""
        return (2 + self.gates) * self.width * self.shared_width

    @property
    def router_params(self) -> Number:
        """Weights of one layer's router."""
        return self.width * self.experts

    @property
    def expert_params(self) -> Number:
        """Weights of one routed expert."""
        return (2 + self.gates) * self.width * self.expert_width

    @property
    def embedding_params(self) -> Number:
        """Weights of the embedding, or of the head."""
        return self.vocab * self.width

    @property
    def extra_head_params(self) -> Number:
        """Weights of one multi-token-prediction module without its shared head: a layer like the last, a projection."""
        ff = np.where(self.sparse > 0, self._sparse_ff_params, self.dense_ff_params)
        return self.attention_params + ff + 2 * self.width * self.width

    @property
    def _sparse_ff_params(self) -> Number:
        return self.shared_params + self.router_params + self.experts * self.expert_params

    @property
    def total_params(self) -> Number:
        """All weights but norms."""
        layers = self.num_layers * self.attention_params
        layers = layers + self.num_dense * self.dense_ff_params + self.num_sparse * self._sparse_ff_params
        return layers + (2 - self.tied) * self.embedding_params + self.extra_heads * self.extra_head_params

    @property
    def active_params(self) -> Number:
        """Weights a token meets, without the embedding's look-up: the P of 6 P FLOPs a token."""
        sparse = self.shared_params + self.router_params + self.experts_per_token * self.expert_params
        layers = self.num_layers * self.attention_params + self.num_dense * self.dense_ff_params
        layers = layers + self.num_sparse * sparse + self.embedding_params
        idle = (self.experts - self.experts_per_token) * self.expert_params
        return layers + self.extra_heads * (self.extra_head_params - idle + self.embedding_params)


def read_model(path: Path, overrides: tuple[str, ...] = ()) -> ModelShape:
    """A model file, a recipe with a `[model]` table, or a Hugging Face config.json (or its folder).

    overrides  `model.KEY=VALUE` and `planning.KEY=VALUE` settings; TOML only
    raises     ConfigError for a wrong value, PlanError for what cannot be planned
    """
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json":
        from moestro.plan.huggingface import read_config

        return read_config(path)
    table = with_overrides(read_toml(path), overrides)
    if "model" not in table:
        raise PlanError(f"{path} has no [model] table; give a file of specs/models, a recipe or a config.json")
    known = {name: value for name, value in table.items() if name in ("model", "planning")}
    found = build(ModelFile, known, where=str(path))
    return shape_of(found.model, found.planning, name=found.planning.name or path.stem)


def shape_of(spec: ModelSpec, extras: PlanningExtras | None = None, name: str = "model") -> ModelShape:
    """A model spec in planning's terms."""
    extras, attention, moe = extras or PlanningExtras(), spec.attention, spec.moe
    if attention.kind == "transformer_xl":
        raise PlanError("model.attention.kind is transformer_xl; planning knows gqa and mla")
    if not spec.vocab_size:
        raise PlanError(
            "model.vocab_size is 0, to be taken from the tokenizer; planning needs it: --set model.vocab_size=4096"
        )
    latent = attention.kind == "mla"
    rope = attention.rope_head_dim if latent else 0
    windowed = len(attention.window_layers) or spec.num_layers
    return ModelShape(
        name=name,
        num_layers=spec.num_layers,
        num_dense=spec.num_layers - len(spec.moe_layers),
        width=spec.width,
        heads=attention.num_heads,
        kv_heads=attention.kv_heads,
        qk_dim=spec.head_dim + rope,
        v_dim=(attention.value_head_dim or spec.head_dim) if latent else spec.head_dim,
        q_rank=attention.q_rank if latent else 0,
        kv_rank=attention.kv_rank if latent else 0,
        rope_dim=rope,
        dense_width=spec.dense_width,
        gates=float(extras.gated),
        experts=moe.num_experts if moe else 0,
        experts_per_token=mean_experts(moe, extras) if moe else 0,
        expert_width=moe.expert_width if moe else 0,
        shared_width=moe.shared_width if moe else 0,
        vocab=spec.vocab_size,
        tied=float(spec.tied_head),
        extra_heads=extras.extra_heads,
        window=attention.window,
        windowed_share=windowed / spec.num_layers if attention.window else 0,
    )


def mean_experts(moe: MoESpec, extras: PlanningExtras) -> float:
    """Routed experts of a token on average, as the router's rule sets it."""
    router = moe.router
    if extras.mean_experts:
        return extras.mean_experts
    match router.rule:
        case "gap" | "topp":
            return router.mean_experts
        case "null":
            return router.k * moe.num_experts / (moe.num_experts + router.num_null)
        case "top1" | "top2" | "gshard":
            return float(router.max_experts)
    return float(router.k)
