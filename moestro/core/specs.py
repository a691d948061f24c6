"""What a model is, as numbers: shared by planning, training and shipping, without torch.

    ModelSpec
      attention: AttentionSpec     gqa | mla | transformer_xl
        rope:    RopeSpec
      moe:       MoESpec           None for a dense model
        router:  RouterSpec        which rule chooses experts, under which budget, balanced how

Each checks itself; a recipe's `[model]` table is exactly one ModelSpec.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from moestro.core.config import STRICT
from moestro.core.errors import ConfigError

Rule = Literal["top1", "top2", "topk", "gap", "topp", "gshard", "null", "relu", "expert_choice", "quantile"]
BUDGETED = ("gap", "topp", "relu", "expert_choice", "quantile")
"""Rules whose mean experts per token is steered to RouterSpec.mean_experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """Rotary positions (Su 2021); scalings as in Hugging Face's `rope_parameters`."""

    __pydantic_config__ = STRICT
    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_length: int = 0
    """Context the unscaled frequencies were trained for; llama3 and yarn."""
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    """llama3: wavelengths between original_length / high and / low are blended."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """yarn: rotations over original_length where interpolation begins and ends."""
    attention_factor: float | None = None
    """yarn: factor on cos and sin; None takes the paper's 0.1 ln(factor) + 1 or its mscale form."""
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    """yarn in DeepSeek's form."""
    truncate: bool = True
    """yarn: round the blend's bounds to whole dimensions."""
    interleaved: bool = False
    """Pairs are neighbours (DeepSeek) instead of halves (Llama)."""

    def __post_init__(self) -> None:
        if self.theta <= 0:
            raise ConfigError(f"model.attention.rope.theta is {self.theta}; it must be above 0, usually 10000")
        if self.scaling in ("llama3", "yarn") and self.original_length < 1:
            raise ConfigError(
                f"model.attention.rope.original_length is {self.original_length}; {self.scaling} needs it above 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """How tokens see earlier tokens."""

    __pydantic_config__ = STRICT
    kind: Literal["gqa", "mla", "transformer_xl"] = "gqa"
    num_heads: int = 4
    num_kv_heads: int = 0
    """Heads of keys and values; 0 means as many as num_heads."""
    head_dim: int = 0
    """Width of a head; 0 means model width / num_heads."""
    qk_norm: Literal["none", "head", "row"] = "none"
    """RMSNorm on queries and keys, per head (Qwen3) or over all heads together (OLMoE)."""
    bias: bool = False
    window: int = 0
    """A token sees at most this many tokens including itself; 0 means all before it."""
    window_layers: tuple[int, ...] = ()
    """Layers (from 0) that have the window; empty means all, where there is one."""
    clip: float = 0.0
    """Queries, keys and values are limited to -clip..clip after their norm (OLMo); 0 does not limit."""
    rope: RopeSpec = field(default_factory=RopeSpec)
    q_rank: int = 0
    """mla: rank of compressed queries; 0 leaves queries uncompressed."""
    kv_rank: int = 0
    """mla: rank of the latent that keys and values share."""
    rope_head_dim: int = 0
    """mla: the part of a head that carries positions; head_dim is the part that does not."""
    value_head_dim: int = 0
    """mla: width of a value head; 0 means head_dim."""
    memory_length: int = 0
    """transformer_xl: hidden states kept from earlier segments."""

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise ConfigError(f"model.attention.num_heads is {self.num_heads}; it must be 1 or more")
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.attention.num_kv_heads is {self.num_kv_heads}; it must divide num_heads = {self.num_heads}"
            )
        if self.kind == "mla" and min(self.kv_rank, self.rope_head_dim, self.head_dim) < 1:
            raise ConfigError(
                f"model.attention.kind mla has kv_rank {self.kv_rank}, rope_head_dim {self.rope_head_dim}, "
                f"head_dim {self.head_dim}; all three must be 1 or more"
            )
        if min(self.window, self.memory_length, self.q_rank, self.clip) < 0:
            raise ConfigError("model.attention.window, memory_length, q_rank and clip must be 0 or more")
        if self.kind != "gqa" and (self.window or self.clip or self.qk_norm != "none"):
            raise ConfigError(
                f"model.attention.window, clip and qk_norm are for kind gqa, not {self.kind}; leave them out"
            )
        if self.window_layers and not self.window:
            raise ConfigError(
                f"model.attention.window_layers is {list(self.window_layers)} but model.attention.window is 0; "
                "set the window, or leave the layers out"
            )

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSpec:
    """How tokens choose experts. Rules are explained in `nn/routing_rules.py`."""

    __pydantic_config__ = STRICT
    rule: Rule = "gap"
    k: int = 2
    """Experts per token: exactly for topk, at most for topp, of real and null experts together for null."""
    mean_experts: float = 1.35
    """gap, topp, relu, expert_choice, quantile: the budget, mean experts per token."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    weights: Literal["auto", "keep", "pair", "straight", "ramp", "renormalise"] = "auto"
    """auto: pair for gap and gshard, renormalise where several are always chosen, else keep. keep: the raw score.
    pair: over the sum of the two best, taken or not. ramp: as pair, and the second expert fades in from 0 at the
    threshold. renormalise: chosen sum to 1. straight: the same in value, the sum a constant to the gradient, so that a
    lone expert weighs 1 and its router still learns."""
    ramp_width: float = 0.5
    """ramp: share of the threshold over which the second expert's weight rises to its full value."""
    weight_scale: float = 1.0
    """Factor on all routing weights."""
    threshold: float = 0.0
    """topp: a fixed probability mass; 0 steers it to mean_experts instead."""
    num_null: int = 0
    """null: experts that do nothing."""
    num_groups: int = 1
    groups_per_token: int = 1
    """Group-limited routing: only experts of this many of the num_groups best groups may be chosen."""
    group_score: Literal["max", "top2_sum"] = "top2_sum"
    start_experts: float = 2.0
    anneal_share: float = 0.45
    """The budget starts at start_experts and moves to mean_experts over this share of the run's steps."""
    threshold_decay: float = 0.9
    """Decay per step of the running quantile behind the threshold."""
    integral_gain: float = 0.05
    """Share of the budget's error that the threshold integrates per step."""
    aux_loss: float = 0.01
    """Weight of the load-balancing loss (Switch, Fedus 2021)."""
    aux_scope: Literal["batch", "sequence", "global"] = "batch"
    """Loads counted over a micro-batch, one sequence, or all micro-batches of a step."""
    z_loss: float = 0.0
    """Weight of the squared log-partition of the scores (ST-MoE, Zoph 2022)."""
    selection_bias: Literal["none", "loss_free", "quantile"] = "none"
    """Balance by a bias on selection scores only: nudged by the error's sign (Wang 2024), or solved by quantiles."""
    bias_rate: float = 0.001
    """loss_free: step of the bias. quantile: 1 - decay of its running mean is this times 100, at most 1."""
    input_noise: float = 0.0
    """Training: multiplicative uniform noise on the router's input (Switch)."""

    def __post_init__(self) -> None:
        if self.weights == "auto":
            object.__setattr__(self, "weights", self._best_weights())
        if self.k < 1:
            raise ConfigError(f"model.moe.router.k is {self.k}; it must be 1 or more")
        if self.rule == "gap" and not 1 <= self.mean_experts <= 2:
            raise ConfigError(f"model.moe.router.mean_experts is {self.mean_experts}; rule gap takes 1 to 2")
        if self.mean_experts < 1 or self.start_experts < 1:
            raise ConfigError("model.moe.router.mean_experts and model.moe.router.start_experts must be 1 or more")
        self._check_weights()
        if not 0 < self.ramp_width <= 1:
            raise ConfigError(f"model.moe.router.ramp_width is {self.ramp_width}; it must be above 0 and at most 1")
        if not 0 <= self.threshold < 1:
            raise ConfigError(f"model.moe.router.threshold is {self.threshold}; it must be in 0..1, 0 to steer it")
        if self.rule == "null" and self.num_null < 1:
            raise ConfigError("model.moe.router.num_null is 0; rule null needs 1 or more experts that do nothing")
        if not 1 <= self.groups_per_token <= self.num_groups:
            raise ConfigError(
                f"model.moe.router.groups_per_token is {self.groups_per_token}; it must be in 1..{self.num_groups}"
            )
        for name in ("aux_loss", "z_loss", "bias_rate", "input_noise", "integral_gain"):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.moe.router.{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("threshold_decay", "anneal_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"model.moe.router.{name} is {getattr(self, name)}; it must be in 0..1")

    def _check_weights(self) -> None:
        if self.weights == "renormalise" and self.always_single:
            raise ConfigError(
                f"model.moe.router.weights is renormalise with rule {self.rule}, which may choose one expert: its "
                "weight would be 1 and the router would get no gradient; use keep"
            )
        if self.weights == "ramp" and self.rule != "gap":
            raise ConfigError(f"model.moe.router.weights is ramp; it is for rule gap, not {self.rule}; use keep")
        if self.weights == "pair" and self.rule not in ("gap", "gshard"):
            raise ConfigError(f"model.moe.router.weights is pair; it is for gap and gshard, not {self.rule}")
        if self.weights == "renormalise" and self.rule in ("relu", "expert_choice", "quantile"):
            raise ConfigError(f"model.moe.router.weights is renormalise; rule {self.rule} needs keep")

    def _best_weights(self) -> str:
        """As compared in docs/routing.md."""
        if self.rule in ("gap", "gshard"):
            return "pair"
        return "renormalise" if self.rule == "top2" or (self.rule == "topk" and self.k > 1) else "keep"

    @property
    def always_single(self) -> bool:
        """True where a token may end up with one expert."""
        return self.rule in ("top1", "gap", "topp", "gshard", "null") or (self.rule == "topk" and self.k == 1)

    @property
    def expected_experts(self) -> float:
        """Mean experts per token by the budget; for null, where real and null experts are equally popular."""
        return self.mean_experts if self.rule in BUDGETED else float(self.max_experts)

    @property
    def max_experts(self) -> int:
        """Most experts one token can have, for rules with such a bound."""
        return {"top1": 1, "top2": 2, "gap": 2, "gshard": 2}.get(self.rule, self.k)


@dataclass(frozen=True, kw_only=True, slots=True)
class MoESpec:
    """A feed-forward layer of experts."""

    __pydantic_config__ = STRICT
    num_experts: int
    expert_width: int
    """Hidden width of one expert; fine-grained experts are narrow and many."""
    shared_width: int = 0
    """Hidden width of the expert every token takes; 0 for none."""
    sharing: Literal["none", "low_rank"] = "none"
    """low_rank: experts share one base weight and differ by a product of two thin matrices."""
    sharing_rank: int = 8
    router: RouterSpec = field(default_factory=RouterSpec)

    def __post_init__(self) -> None:
        router = self.router
        if self.num_experts < 1 or self.expert_width < 1:
            raise ConfigError(
                f"model.moe.num_experts is {self.num_experts}, expert_width {self.expert_width}; both must be 1 or more"
            )
        choices = self.num_experts + (router.num_null if router.rule == "null" else 0)
        if router.max_experts > choices:
            raise ConfigError(
                f"router rule {router.rule} takes {router.max_experts} experts per token but model.moe.num_experts is "
                f"{self.num_experts}; raise model.moe.num_experts or lower model.moe.router.k"
            )
        if router.rule in BUDGETED and router.mean_experts > self.num_experts:
            raise ConfigError(
                f"model.moe.router.mean_experts is {router.mean_experts}; it must be at most num_experts = "
                f"{self.num_experts}"
            )
        if self.num_experts % router.num_groups:
            raise ConfigError(
                f"model.moe.router.num_groups is {router.num_groups}; it must divide num_experts = {self.num_experts}"
            )
        allowed = self.num_experts // router.num_groups * router.groups_per_token
        if router.max_experts > allowed:
            raise ConfigError(
                f"model.moe.router.groups_per_token leaves {allowed} experts to choose {router.max_experts} from"
            )
        if self.sharing == "low_rank" and self.sharing_rank < 1:
            raise ConfigError(f"model.moe.sharing_rank is {self.sharing_rank}; it must be 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A decoder-only language model, dense or sparse."""

    __pydantic_config__ = STRICT
    num_layers: int
    width: int
    vocab_size: int = 0
    """Entries of the embedding; 0 takes the tokenizer's."""
    dense_width: int = 0
    """Hidden width of dense feed-forward layers; needed where a layer is not MoE."""
    dense_layers: tuple[int, ...] = ()
    """Layers (from 0) whose feed-forward is dense although the model has experts."""
    attention: AttentionSpec = field(default_factory=AttentionSpec)
    moe: MoESpec | None = None
    tied_head: bool = True
    """The output head is the embedding transposed."""
    norm_eps: float = 1e-6
    init_std: float = 0.02
    """Standard deviation of initial weights; those that write to the residual stream get it over sqrt(2 num_layers)."""

    def __post_init__(self) -> None:
        attention = self.attention
        if self.num_layers < 1 or self.width < 1:
            raise ConfigError(
                f"model.num_layers is {self.num_layers} and model.width {self.width}; both must be 1 or more"
            )
        if not attention.head_dim and self.width % attention.num_heads:
            raise ConfigError(
                f"model.attention.num_heads is {attention.num_heads}; it must divide model.width = {self.width}, "
                "or set model.attention.head_dim"
            )
        if attention.kind != "transformer_xl" and self.rotary_dim % 2:
            raise ConfigError(f"a head has {self.rotary_dim} rotary dimensions; rotary positions need an even number")
        for name, layers in (("dense_layers", self.dense_layers), ("attention.window_layers", attention.window_layers)):
            wrong = [layer for layer in layers if not 0 <= layer < self.num_layers]
            if wrong:
                raise ConfigError(f"model.{name} has {wrong}; layers are 0..{self.num_layers - 1}")
        if self.dense_width < 1 and len(self.moe_layers) < self.num_layers:
            raise ConfigError(f"model.dense_width is {self.dense_width}; dense layers need it to be 1 or more")

    @property
    def head_dim(self) -> int:
        """Width of one attention head (in mla: without the part that carries positions)."""
        return self.attention.head_dim or self.width // self.attention.num_heads

    @property
    def rotary_dim(self) -> int:
        """Width of the part of a head that is rotated."""
        return self.attention.rope_head_dim if self.attention.kind == "mla" else self.head_dim

    def attention_at(self, layer: int) -> AttentionSpec:
        """The attention of one layer: with the window only where it has one."""
        windowed = layer in (self.attention.window_layers or range(self.num_layers))
        return replace(self.attention, window=self.attention.window if windowed else 0, window_layers=())

    @property
    def moe_layers(self) -> list[int]:
        """Layers (from 0) whose feed-forward is sparse."""
        return [layer for layer in range(self.num_layers) if self.moe and layer not in self.dense_layers]
