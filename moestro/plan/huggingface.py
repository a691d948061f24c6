"""A Hugging Face config.json as a model to plan: the keys that fix shapes, whatever the family.

    config.json -> read_config -> ModelShape

Only sizes are read, so that families the trainer cannot build can still be planned. Names of the same thing differ
between families; the first that is there counts. A key that is needed and missing is an error that names it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moestro.core.errors import PlanError
from moestro.plan.shape import ModelShape

Config = Mapping[str, Any]
EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "experts_per_token", "moe_top_k", "top_k", "moe_k")
EXPERT_WIDTH = ("moe_intermediate_size", "expert_intermediate_size", "expert_ffn_hidden_size")
UNGATED = ("gpt2", "gpt_neox", "opt", "bloom", "phi", "falcon", "mpt", "starcoder2", "nemotron")


def read_config(path: Path) -> ModelShape:
    """The model of a config.json; raises PlanError naming the file and the key that is missing or wrong."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PlanError(f"{path} does not exist; give a model file, a config.json or a folder that has one") from error
    except (OSError, ValueError) as error:
        raise PlanError(f"{path} is not a config.json: {error}") from error
    if not isinstance(config, dict):
        raise PlanError(f"{path} holds no object; a config.json is one")
    nested = config.get("text_config") or config.get("llm_config")
    if isinstance(nested, dict):  # a model of several modalities: plan its language part
        config = {**config, **nested}
    try:
        return shape_of_config(config, path.parent.name or "model")
    except (TypeError, ValueError) as error:
        raise PlanError(f"{path}: a size is not a number: {error}") from error


def shape_of_config(config: Config, name: str) -> ModelShape:
    """Dimensions from a parsed config."""
    width = _needed(config, "hidden_size", "n_embd", "d_model")
    layers = _needed(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    heads = _needed(config, "num_attention_heads", "n_head", "n_heads")
    experts = _first(config, EXPERTS)
    latent = bool(config.get("kv_lora_rank"))
    head_dim = config.get("head_dim") or width // heads
    nope, rope = config.get("qk_nope_head_dim") or head_dim, config.get("qk_rope_head_dim") or 0
    dense_width = _first(config, ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim")) or 4 * width
    expert_width = _first(config, EXPERT_WIDTH) or dense_width
    family = str(config.get("model_type", ""))
    windowed = _windowed_layers(config, layers)
    return ModelShape(
        name=str(config.get("_name_or_path") or name).split("/")[-1],
        num_layers=layers,
        num_dense=_dense_layers(config, layers) if experts else layers,
        width=width,
        heads=heads,
        kv_heads=_first(config, ("num_key_value_heads", "num_kv_heads", "n_head_kv")) or heads,
        qk_dim=nope + rope if latent else head_dim,
        v_dim=(config.get("v_head_dim") or head_dim) if latent else head_dim,
        q_rank=config.get("q_lora_rank") or 0 if latent else 0,
        kv_rank=config.get("kv_lora_rank") or 0,
        rope_dim=rope if latent else 0,
        dense_width=dense_width,
        gates=0.0 if family in UNGATED else 1.0,
        experts=experts,
        experts_per_token=_first(config, PER_TOKEN) if experts else 0,
        expert_width=expert_width if experts else 0,
        shared_width=_shared_width(config, expert_width) if experts else 0,
        vocab=_needed(config, "vocab_size"),
        tied=float(config.get("tie_word_embeddings", family in ("gpt2", "opt", "bloom"))),
        extra_heads=config.get("num_nextn_predict_layers") or 0,
        window=config.get("sliding_window") or 0 if windowed else 0,
        windowed_share=windowed / layers,
    )


def _needed(config: Config, *names: str) -> int:
    found = _first(config, names)
    if not found:
        raise PlanError(f"config.json has no {names[0]}; planning needs it" + _others(names))
    return found


def _others(names: tuple[str, ...]) -> str:
    return f" (or {', '.join(names[1:])})" if names[1:] else ""


def _first(config: Config, names: tuple[str, ...]) -> int:
    return next((int(config[name]) for name in names if config.get(name)), 0)


def _dense_layers(config: Config, layers: int) -> int:
    """Layers without experts: the first ones, all but every n-th, or those listed."""
    first = config.get("first_k_dense_replace") or 0
    step = config.get("decoder_sparse_step") or config.get("moe_layer_freq") or config.get("interleave_moe_layer_step")
    step = step if isinstance(step, int) else 1
    listed = config.get("mlp_only_layers") or []
    sparse = [layer for layer in range(layers) if layer >= first and (layer + 1) % step == 0 and layer not in listed]
    return layers - len(sparse)


def _shared_width(config: Config, expert_width: int) -> int:
    said = _first(config, ("shared_expert_intermediate_size", "shared_intermediate_size"))
    return said or expert_width * _first(config, ("n_shared_experts", "num_shared_experts"))


def _windowed_layers(config: Config, layers: int) -> int:
    """Layers that see at most `sliding_window` tokens."""
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return 0
    if kinds := config.get("layer_types"):
        return sum("sliding" in str(kind) for kind in kinds)
    if pattern := config.get("sliding_window_pattern"):
        return layers - layers // int(pattern)
    return layers
