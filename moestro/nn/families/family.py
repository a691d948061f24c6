"""What a Hugging Face family is to us: its names, its config.json to a ModelSpec, and a ModelSpec to its config.json.

    Settings -> family.read -> ModelSpec -> family.write -> config.json

`read` asks for every setting that changes what is computed. `write` puts down all of them, nothing left to defaults;
whether it could say everything is checked by reading it back (`fit.problems`). Defaults of missing keys are those of
transformers 5; tests hold them to it. The families themselves: `dense`, `softmax`, `deepseek`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moestro.core.errors import ConfigError, FamilyError
from moestro.core.specs import AttentionSpec, ModelSpec
from moestro.nn.families.rope import DEFAULTS as ROPE_DEFAULTS
from moestro.nn.families.rope import read_rope, write_rope
from moestro.nn.families.settings import Settings, Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How one family writes down a model."""

    name: str
    """`model_type` in config.json."""
    architecture: str
    sparse: bool
    kind: str = "gqa"
    """Attention it has."""
    qk_norm: str = "none"
    moe: str = "mlp"
    """Name of the sparse layer where experts are stored one by one."""
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Names of an expert's gate, up and down matrices there."""
    selection_bias: bool = False
    defaults: Table
    aliases: dict[str, str] = field(default_factory=dict)
    read_spec: Callable[[Settings], ModelSpec]
    write_spec: Callable[[ModelSpec], Table]

    def settings(self, table: Table, leave_out: tuple[str, ...] = ()) -> Settings:
        """A config.json with this family's defaults."""
        return Settings(table, COMMON_DEFAULTS | self.defaults, self.aliases, leave_out)

    def read(self, settings: Settings) -> ModelSpec:
        """The model; raises FamilyError for a setting that we cannot represent."""
        settings.only("hidden_act", "silu", "swish")
        named = settings.table.get("architectures")
        if named not in (None, [], [self.architecture]):
            raise FamilyError(f"architectures is {named!r}; moestro reads {self.name} as {self.architecture} only")
        try:
            spec = self.read_spec(settings)
        except ConfigError as error:
            raise FamilyError(f"config.json describes a model that cannot be: {error}") from error
        settings.finish()
        return spec

    def write(self, spec: ModelSpec) -> Table:
        """config.json without token ids, dtype and context length."""
        common = {
            "architectures": [self.architecture],
            "model_type": self.name,
            "hidden_act": "silu",
            "num_hidden_layers": spec.num_layers,
            "hidden_size": spec.width,
            "vocab_size": spec.vocab_size,
            "tie_word_embeddings": spec.tied_head,
            "rms_norm_eps": spec.norm_eps,
            "initializer_range": spec.init_std,
            "num_attention_heads": spec.attention.num_heads,
            "attention_dropout": 0.0,
        }
        return common | write_rope(spec.attention.rope) | self.write_spec(spec)


COMMON_DEFAULTS: Table = ROPE_DEFAULTS | {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "rope_theta": 10_000.0,
}


def read_sizes(settings: Settings) -> dict[str, Any]:
    """What all models have."""
    return {
        "num_layers": settings.integer("num_hidden_layers"),
        "width": settings.integer("hidden_size"),
        "vocab_size": settings.integer("vocab_size"),
        "tied_head": settings.flag("tie_word_embeddings"),
        "norm_eps": settings.number("rms_norm_eps"),
        "init_std": settings.number("initializer_range"),
    }


def read_grouped(settings: Settings, **fields: Any) -> AttentionSpec:
    """Grouped-query attention; a missing num_key_value_heads means one per query head."""
    return AttentionSpec(
        num_heads=settings.integer("num_attention_heads"),
        num_kv_heads=settings.optional_integer("num_key_value_heads") or 0,
        rope=read_rope(settings),
        **fields,
    )


def write_heads(spec: ModelSpec) -> Table:
    """Key heads and the width of a head."""
    return {"num_key_value_heads": spec.attention.kv_heads, "head_dim": spec.head_dim}


def write_window(spec: ModelSpec) -> Table:
    """The window that all layers have."""
    window = spec.attention.window if not spec.attention.window_layers else 0
    return {"use_sliding_window": bool(window), "sliding_window": window or None}
