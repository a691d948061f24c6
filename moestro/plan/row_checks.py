"""Whether a row of measurements can be read at all: which fields it must have, and that numbers are numbers.

    entry -> check_row -> nothing, or one PlanError that names the row, the field, its value and what is allowed

What is optional may be missing or null; formulas behind it then see the habits of the software (published.py).
"""

import math
from collections.abc import Mapping
from typing import Any

from moestro.core.errors import PlanError

NEEDED = {
    "": ("micro_batch", "global_batch"),
    "model": ("layers", "hidden", "heads", "vocab", "seq_len"),
    "hardware": ("count",),
}
OPTIONAL = {
    "model": (
        *("kv_heads", "head_dim", "ffn", "experts", "top_k", "moe_ffn", "shared_expert_ffn"),
        *("dense_layers", "mtp"),
    ),
    "model.mla": ("qk_nope", "qk_rope", "v_dim", "q_lora", "kv_lora"),
    "hardware": (
        *("hbm_gb", "hbm_gbps", "peak_bf16", "peak_fp8", "peak_fp4"),
        *("gpus_per_node", "nvlink_domain", "intra_gbps", "inter_gbps"),
    ),
    "parallelism": ("tp", "pp", "vpp", "cp", "ep", "etp", "zero", "fsdp_shard"),
}
TABLES = ("model", "model.mla", "hardware", "parallelism", "features", "derived", "measured")
NEEDED_MLA = ("qk_nope", "qk_rope", "v_dim")


def check_row(entry: Any, number: int) -> None:
    """Raise PlanError for the first thing that is wrong; `number` names a row that has no id, from 1."""
    if not isinstance(entry, Mapping):
        raise PlanError(f"row {number} is {entry!r}; a row is an object")
    if not isinstance(entry.get("id"), str) or not entry["id"]:
        raise PlanError(f"row {number} has id {entry.get('id')!r}; give every row a name of its own")
    row = f"row {entry['id']}"
    for name in TABLES:
        found = _at(entry, name)
        if found is not None and not isinstance(found, Mapping):
            raise PlanError(f"{row}: {name} is {found!r}; it must be an object")
    for table, names in NEEDED.items():
        for name in names:
            _check_number(_at(entry, table).get(name) if _at(entry, table) else None, f"{row}: {_path(table, name)}")
    for table, names in OPTIONAL.items():
        for name in names:
            value = (_at(entry, table) or {}).get(name)
            if value is not None:
                _check_number(value, f"{row}: {_path(table, name)}", least=0)
    _check_widths(entry["model"], row)
    for name in NEEDED_MLA if _at(entry, "model.mla") else ():
        _check_number(entry["model"]["mla"].get(name), f"{row}: model.mla.{name}")
    if not isinstance(entry.get("config_gaps") or (), list | tuple):
        raise PlanError(f"{row}: config_gaps is {entry['config_gaps']!r}; it must be a list of fields")
    _check_links(entry, row)


def _check_widths(model: Mapping[str, Any], row: str) -> None:
    """A model has feed-forward layers, of experts or dense."""
    if not (model.get("ffn") or model.get("moe_ffn")):
        raise PlanError(f"{row}: model.ffn is missing; planning needs the hidden width of feed-forward layers")
    if model.get("experts") and not model.get("top_k"):
        raise PlanError(f"{row}: model.top_k is missing; a model with experts needs it")


def _check_links(entry: Mapping[str, Any], row: str) -> None:
    """Link speeds that the row's devices need."""
    hardware = entry["hardware"]
    domain = hardware.get("nvlink_domain") or hardware.get("gpus_per_node") or 8
    for name, needed in (("intra_gbps", hardware["count"] > 1), ("inter_gbps", hardware["count"] > domain)):
        if needed and not hardware.get(name):
            raise PlanError(
                f"{row}: hardware.{name} is {hardware.get(name)!r}; {hardware['count']:g} devices need it: GB/s of one "
                "device in each direction, 50 for a 400 Gb/s card"
            )


def _at(entry: Mapping[str, Any], name: str) -> Any:
    """A table by its dotted name, None where it is not there."""
    found: Any = entry
    for part in name.split(".") if name else ():
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _path(table: str, name: str) -> str:
    return f"{table}.{name}" if table else name


def _check_number(value: Any, where: str, least: float | None = None) -> None:
    """Finite, and above 0 or at least `least`."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if value is None:
        raise PlanError(f"{where} is missing; planning needs it")
    if not known or (value <= 0 if least is None else value < least):
        raise PlanError(f"{where} is {value!r}; it must be a number {'above 0' if least is None else 'of 0 or more'}")
