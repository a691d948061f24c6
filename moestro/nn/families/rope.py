"""Rotary positions as a config.json has them, and as a RopeSpec.

    rope_theta + rope_scaling (transformers 4)   or   rope_parameters (transformers 5)   <->   RopeSpec

We write the older style, which every version reads.
"""

from typing import Any

from moestro.core.errors import FamilyError
from moestro.core.specs import RopeSpec
from moestro.nn.families.settings import Settings, Table, number

DEFAULTS: Table = dict.fromkeys(
    ("rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings")
)

KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
"""What each kind of scaling that we have reads."""


def read_rope(settings: Settings, interleaved: bool = False) -> RopeSpec:
    """Both styles; where a file has both, rope_scaling wins, as in transformers."""
    scaling, parameters = settings.get("rope_scaling"), settings.get("rope_parameters")
    where = "rope_scaling" if scaling else "rope_parameters"
    table = scaling or parameters or {}
    if not isinstance(table, dict) or any(isinstance(value, dict) for value in table.values()):
        raise FamilyError(f"{where} is {table!r}; moestro has one table for all layers")
    theta = number("rope_theta", table.get("rope_theta") or settings.get("rope_theta"))
    settings.get("rope_theta")
    kind = table.get("rope_type", table.get("type", "default"))
    if kind not in KEYS:
        raise FamilyError(f"{where}.rope_type is {kind!r}; moestro has {', '.join(KEYS)}")
    partial = table.get("partial_rotary_factor", settings.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise FamilyError(f"partial_rotary_factor is {partial!r}; moestro has only 1: it rotates whole heads")
    _check_keys(table, kind, where)
    return RopeSpec(theta=theta, interleaved=interleaved, **_scaling(settings, table, kind, where))


def _check_keys(table: Table, kind: str, where: str) -> None:
    known = ("rope_theta", "rope_type", "type", "partial_rotary_factor", *KEYS[kind])
    unknown = [f"{where}.{key} is {value!r}" for key, value in table.items() if key not in known and value is not None]
    if unknown:
        raise FamilyError(f"{'; '.join(unknown)}: rope_type {kind} does not use it; take it out of config.json")


def _scaling(settings: Settings, table: Table, kind: str, where: str) -> dict[str, Any]:
    """The fields of a RopeSpec that belong to the kind."""

    def value(key: str, default: float | None = None) -> float:
        found = number(f"{where}.{key}", table.get(key) or default)
        if not found:
            raise FamilyError(f"{where}.{key} is {table[key]!r}; it must be above 0")
        return found

    match kind:
        case "linear":
            return {"scaling": "linear", "factor": value("factor")}
        case "llama3":
            return {
                "scaling": "llama3",
                "factor": value("factor"),
                "original_length": _original_length(settings, table, where),
                "low_frequency": value("low_freq_factor"),
                "high_frequency": value("high_freq_factor"),
            }
        case "yarn":
            length = _original_length(settings, table, where)
            return {
                "scaling": "yarn",
                "factor": value("factor", settings.integer("max_position_embeddings") / length),
                "original_length": length,
                "beta_fast": value("beta_fast", 32.0),
                "beta_slow": value("beta_slow", 1.0),
                "attention_factor": value("attention_factor") if table.get("attention_factor") is not None else None,
                "mscale": value("mscale") if table.get("mscale") else 0.0,
                "mscale_all_dim": value("mscale_all_dim") if table.get("mscale_all_dim") else 0.0,
                "truncate": bool(table.get("truncate", True)),
            }
    return {}


def _original_length(settings: Settings, table: Table, where: str) -> int:
    """The context that unscaled positions were trained for."""
    key = "original_max_position_embeddings"
    length = settings.get(key) or table.get(key) or settings.integer("max_position_embeddings")
    if not isinstance(length, int) or length < 1:
        raise FamilyError(f"{where}.{key} is {length!r}; it must be a whole number of 1 or more")
    return length


def write_rope(rope: RopeSpec) -> Table:
    """rope_theta and rope_scaling."""
    scaling: Table | None = None
    match rope.scaling:
        case "linear":
            scaling = {"factor": rope.factor}
        case "llama3":
            scaling = {
                "factor": rope.factor,
                "original_max_position_embeddings": rope.original_length,
                "low_freq_factor": rope.low_frequency,
                "high_freq_factor": rope.high_frequency,
            }
        case "yarn":
            scaling = {
                "factor": rope.factor,
                "original_max_position_embeddings": rope.original_length,
                "beta_fast": rope.beta_fast,
                "beta_slow": rope.beta_slow,
                "truncate": rope.truncate,
            }
            for key in ("attention_factor", "mscale", "mscale_all_dim"):
                if getattr(rope, key):
                    scaling[key] = getattr(rope, key)
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if scaling is None else {"rope_type": rope.scaling} | scaling,
    }
