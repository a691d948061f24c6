"""Published measurements as cases: rows of a JSON file in, columns of the planner out.

    {"entries": [{id, model, hardware, software, parallelism, micro_batch, ...}, ...]} -> read_rows -> Row -> case_of

The format is that of collected training reports: what a row does not say (remat policy, version) takes the habits of
its software. Fields that are missing or null have the defaults of `Layout` and `Stack`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moestro.cluster.devices import find_device
from moestro.cluster.topology import Cluster, DeviceSpec, LevelSpec
from moestro.core.errors import PlanError
from moestro.plan.case import Case
from moestro.plan.columns import stacked
from moestro.plan.layout import SCHEDULES, Layout
from moestro.plan.machine import machine_of, precision_of
from moestro.plan.row_checks import check_row
from moestro.plan.shape import ModelShape
from moestro.plan.stacks import Stack, find_stack, traits

Entry = Mapping[str, Any]
UNKNOWN_NEEDS = ("hbm_gb", "hbm_gbps", "peak_bf16")
"""What a row must say of a device that is not known."""
UNUSED_GB_PER_S = 50.0
"""Of links that no device of the row needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One published measurement, or one question in its format."""

    id: str
    group: str
    kind: str
    """dense or moe."""
    case: Case
    software: str
    """Name under which the profile keeps the software's effect."""
    step_s: float
    """Measured; 0 where it is not known."""
    memory_gib: float
    """Measured peak; 0 where it is not known."""
    recompute_known: bool = True
    """False where the source does not say what is done again."""


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, a list or {"entries": [...]}; raises PlanError naming the row and key that is wrong."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"{path} cannot be read as JSON rows: {error}") from error
    entries = read.get("entries") if isinstance(read, dict) else read
    if not isinstance(entries, list):
        raise PlanError(f"{path} has no list of rows; give a list, or an object with 'entries'")
    rows = [row_of(entry, number) for number, entry in enumerate(entries, 1)]
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise PlanError(f"{path} has two rows {row.id}; give every row a name of its own")
        seen.add(row.id)
    return rows


def row_of(entry: Entry, number: int = 1) -> Row:
    """One row; raises PlanError naming the row and the field that is missing or wrong."""
    check_row(entry, number)
    try:
        case, stack = _case_of(entry)
    except PlanError as error:
        raise PlanError(f"row {entry['id']}: {error}") from error
    measured = entry.get("measured") or {}
    return Row(
        id=str(entry.get("id", "")),
        group=str(entry.get("group", "")),
        kind="moe" if entry["model"].get("experts") else "dense",
        case=case,
        software=stack.effects or stack.name,
        step_s=float((entry.get("derived") or {}).get("step_time_s") or measured.get("step_time_s") or 0.0),
        memory_gib=float(measured.get("mem_peak_alloc_gib") or measured.get("mem_peak_gib") or 0.0),
        recompute_known="recompute" not in (entry.get("config_gaps") or ()),
    )


def together(rows: Sequence[Row]) -> Case:
    """The rows' cases as one with columns."""
    return stacked([row.case for row in rows])


def _case_of(entry: Entry) -> tuple[Case, Stack]:
    precision = str(entry.get("precision") or "bf16")
    cluster = cluster_of(entry["hardware"])
    stack = _stack_of(entry)
    case = Case(
        shape=shape_of_row(entry["model"]),
        layout=layout_of(entry, stack.again_unsaid),
        machine=machine_of(cluster, precision),
        precision=precision_of(precision),
        traits=traits(stack, cluster.device),
        length=float(entry["model"]["seq_len"]),
    )
    return case, stack


def shape_of_row(model: Entry) -> ModelShape:
    """A row's model."""
    mla = model.get("mla") or {}
    heads, layers = model["heads"], model["layers"]
    experts = model.get("experts") or 0
    head_dim = model.get("head_dim") or model["hidden"] / heads
    first_dense = model.get("dense_layers") or _dense_layers(str(model.get("moe_layer_pattern") or ""), layers)
    window, share = _window(model.get("window"))
    return ModelShape(
        name=str(model.get("name", "model")),
        num_layers=layers,
        num_dense=first_dense if experts else layers,
        width=model["hidden"],
        heads=heads,
        kv_heads=model.get("kv_heads") or heads,
        qk_dim=mla["qk_nope"] + mla["qk_rope"] if mla else head_dim,
        v_dim=mla["v_dim"] if mla else head_dim,
        q_rank=mla.get("q_lora") or 0,
        kv_rank=mla.get("kv_lora") or 0,
        rope_dim=mla.get("qk_rope") or 0,
        dense_width=model.get("ffn") or 0,
        gates=float(model.get("gated") is not False),
        experts=experts,
        experts_per_token=(model.get("top_k") or 0) if experts else 0,
        expert_width=(model.get("moe_ffn") or model.get("ffn") or 0) if experts else 0,
        shared_width=model.get("shared_expert_ffn") or 0,
        vocab=model["vocab"],
        tied=float(bool(model.get("tied"))),
        extra_heads=model.get("mtp") or 0,
        window=window,
        windowed_share=share,
    )


def _dense_layers(pattern: str, layers: int) -> int:
    """Layers without experts, from 'first 3 dense, rest MoE', 'every 2nd layer MoE', 'alternate layers MoE'."""
    if found := re.search(r"first (\d+) dense", pattern):
        return int(found[1])
    if found := re.search(r"every (\d+)", pattern):
        return layers - layers // int(found[1])
    return layers - layers // 2 if re.search("alternat|every other|interleav", pattern) else 0


def _window(value: Any) -> tuple[float, float]:
    """(tokens, share of layers) from 4096 or '128 on alternate layers'."""
    if not value:
        return 0.0, 0.0
    number = re.search(r"\d+", str(value))
    return float(number[0]) if number else 0.0, 0.5 if "alternate" in str(value) else 1.0


def cluster_of(hardware: Entry) -> Cluster:
    """A row's hardware: what is known of the named device with the row's memory, else the row's own figures."""
    known = find_device(str(hardware.get("class", "")), str(hardware.get("gpu", "")))
    name = str(hardware.get("class") or hardware.get("gpu") or "")
    if not known and not all(hardware.get(key) for key in UNKNOWN_NEEDS):
        raise PlanError(
            f"hardware.class is {name!r}, which is not known; give hardware.{', hardware.'.join(UNKNOWN_NEEDS)}"
        )
    device = known or DeviceSpec(
        name=name or "device",
        memory_gib=hardware["hbm_gb"],
        memory_gb_per_s=hardware["hbm_gbps"],
        peak_tflops={
            "bf16": hardware["peak_bf16"],
            **{kind: hardware[f"peak_{kind}"] for kind in ("fp8", "fp4") if hardware.get(f"peak_{kind}")},
        },
    )
    if known:
        gib, rate = hardware.get("hbm_gb") or known.memory_gib, hardware.get("hbm_gbps") or known.memory_gb_per_s
        device = replace(known, memory_gib=float(gib), memory_gb_per_s=float(rate))
    domain = int(hardware.get("nvlink_domain") or hardware.get("gpus_per_node") or 8)
    return Cluster(
        name=device.name,
        device=device,
        network=(
            LevelSpec(name="host", fan_out=domain, gb_per_s=hardware.get("intra_gbps") or UNUSED_GB_PER_S),
            LevelSpec(name="spine", gb_per_s=hardware.get("inter_gbps") or UNUSED_GB_PER_S),
        ),
    )


def layout_of(entry: Entry, unsaid: str = "") -> Layout:
    """A row's layout.

    unsaid  what is done again where the row does not say
    """
    cut, recompute = entry.get("parallelism") or {}, str(entry.get("recompute") or unsaid or "none").lower()
    virtual = _virtual(entry)
    tp, pp, ep, devices = cut.get("tp") or 1, cut.get("pp") or 1, cut.get("ep") or 1, entry["hardware"]["count"]
    usual_etp = tp if devices % (pp * ep * tp) == 0 else 1  # Megatron's default, where it is possible
    named = {
        "again_attention": "core_attn",
        "again_cheap": "selective-op",
        "again_up": "mla_up",
        "again_dense": r"\bmlp\b",
        "again_experts": r"\bmoe\b",
        "again_activation": "moe_act|minimal",
    }
    return Layout(
        devices=devices,
        tp=tp,
        pp=pp,
        virtual=virtual,
        cp=cut.get("cp") or 1,
        ep=ep,
        etp=cut.get("etp") or usual_etp,
        zero=1 if cut.get("zero") is None else cut["zero"],
        shard_group=cut.get("fsdp_shard") or 0,
        micro_batch=entry["micro_batch"],
        sequences=entry["global_batch"],
        schedule=SCHEDULES.index("interleaved" if virtual > 1 else "1f1b"),
        full=float(bool(re.match("full|all", recompute))),
        **{field: float(bool(re.search(pattern, recompute))) for field, pattern in named.items()},
    )


def _virtual(entry: Entry) -> int:
    """Chunks per rank; where the row says that it does not know, as many as leave about four layers a chunk."""
    cut = entry.get("parallelism") or {}
    if cut.get("vpp") or "vpp" not in (entry.get("config_gaps") or ()):
        return cut.get("vpp") or 1
    return max(1, round(entry["model"]["layers"] / (4 * (cut.get("pp") or 1))))


def _stack_of(entry: Entry) -> Stack:
    """The row's software, with what its `features` say otherwise."""
    stack = find_stack(str(entry.get("software") or ""))
    said = entry.get("features") or {}
    changes: dict[str, Any] = {}
    if "sequence-parallel" in str(entry.get("recompute")):
        changes["sequence_parallel"] = True
    for field, keys in (
        ("overlap_gradients", ("overlap_grad_reduce",)),
        ("overlap_tensor", ("tp_comm_overlap", "async_tp")),
    ):
        for key in keys:
            if key in said:
                changes[field] = bool(said[key])
    if str(said.get("overlap", "")).startswith("none"):
        changes |= {"overlap_gradients": False, "overlap_tensor": False, "overlap_experts": "never"}
    if dispatcher := str(said.get("dispatcher") or said.get("flex_backend") or ""):
        smart = re.search("flex|deepep|hybrid", dispatcher.lower())
        changes["dispatcher"] = "deduplicating" if smart else "alltoall"
    if "a2a_overlap" in said:
        changes["overlap_experts"] = "always" if said["a2a_overlap"] else "never"
    if "torch_compile" in said:
        changes["eager"] = not said["torch_compile"]
    if said.get("pad_to_capacity") or "padded" in str(said.get("router")):
        changes["static_shapes"] = True
    if "balanced" in str(said.get("router")):
        changes["balanced"] = True
    if said.get("cuda_graphs") or said.get("cuda_graph_modules") or said.get("cuda_graph_impl"):
        changes["graphs_since"] = 0.0
    elif said.get("cuda_graphs") is False:
        changes |= {"graphs_since": 9999.0, "graphs_on_arm": False}
    return replace(stack, **changes)
