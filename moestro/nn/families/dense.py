"""Llama and Qwen3: dense decoders, and what upcycling starts from."""

from typing import Any

from moestro.core.errors import FamilyError
from moestro.core.specs import ModelSpec
from moestro.nn.families.family import Family, read_grouped, read_sizes, write_heads
from moestro.nn.families.settings import Settings, Table

LAYER_TYPES = ("full_attention", "sliding_attention")


def _read_llama(settings: Settings) -> ModelSpec:
    settings.only("mlp_bias", False)
    attention = read_grouped(
        settings, head_dim=settings.optional_integer("head_dim") or 0, bias=settings.flag("attention_bias")
    )
    return ModelSpec(**read_sizes(settings), dense_width=settings.integer("intermediate_size"), attention=attention)


def _write_llama(spec: ModelSpec) -> Table:
    if spec.width % spec.attention.num_heads:
        raise FamilyError(
            f"model.attention.num_heads is {spec.attention.num_heads}; transformers wants it to divide model.width = "
            f"{spec.width} in llama even where head_dim is given"
        )
    return write_heads(spec) | {
        "intermediate_size": spec.dense_width,
        "attention_bias": spec.attention.bias,
        "mlp_bias": False,
    }


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    sparse=False,
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 2048,
    },
    read_spec=_read_llama,
    write_spec=_write_llama,
)


def _qwen3_windows(settings: Settings, num_layers: int) -> dict[str, Any]:
    """The window and the layers that have it: those named in layer_types, or from max_window_layers on."""
    window = settings.optional_integer("sliding_window") if settings.flag("use_sliding_window") else None
    types, first = settings.get("layer_types"), settings.integer("max_window_layers", least=0)
    if types is None:
        layers = tuple(range(first, num_layers)) if window else ()
    else:
        if not isinstance(types, list) or len(types) != num_layers or set(types) - set(LAYER_TYPES):
            raise FamilyError(f"layer_types is {types!r}; it must name {' or '.join(LAYER_TYPES)} for every layer")
        layers = tuple(layer for layer, kind in enumerate(types) if kind == LAYER_TYPES[1])
        if layers and not window:
            raise FamilyError(f"layer_types has {LAYER_TYPES[1]} but sliding_window is {window!r}; give the window")
    return {"window": window, "window_layers": layers} if window and layers else {}


def _read_qwen3(settings: Settings) -> ModelSpec:
    windows = _qwen3_windows(settings, settings.integer("num_hidden_layers"))
    attention = read_grouped(
        settings,
        head_dim=settings.optional_integer("head_dim") or 0,
        qk_norm="head",
        bias=settings.flag("attention_bias"),
        **windows,
    )
    return ModelSpec(**read_sizes(settings), dense_width=settings.integer("intermediate_size"), attention=attention)


def _write_qwen3(spec: ModelSpec) -> Table:
    windowed = [spec.attention_at(layer).window > 0 for layer in range(spec.num_layers)]
    return write_heads(spec) | {
        "intermediate_size": spec.dense_width,
        "attention_bias": spec.attention.bias,
        "use_sliding_window": any(windowed),
        "sliding_window": spec.attention.window or None,
        "max_window_layers": windowed.index(True) if any(windowed) else spec.num_layers,
        "layer_types": [LAYER_TYPES[has_window] for has_window in windowed],
    }


QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    sparse=False,
    qk_norm="head",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "max_position_embeddings": 32768,
    },
    read_spec=_read_qwen3,
    write_spec=_write_qwen3,
)
