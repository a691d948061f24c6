"""What a training software does, as far as time and memory depend on it.

    "NeMo container 26.08" -> find_stack -> Stack -> traits(stack, device) -> Traits (numbers, may be columns)

A stack's habits (which attention kernel, what is overlapped, how tokens are dispatched) are facts about it, kept in
profiles/stacks.toml; how fast it is beside those is a fitted effect in the profile. An unknown name gets the habits of
a present-day Megatron-like stack, or those of its year where the name tells it.
"""

import re
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Literal

from moestro.cluster.topology import DeviceSpec
from moestro.core.config import STRICT, build
from moestro.plan.columns import Number

TYPICAL_RELEASE = 2025.5
"""Year assumed for software whose name has no version."""
FUSED_SINCE = 2023.0
"""Before this year training software computed attention unfused (FlashAttention, 2205.14135, became usual in 2023)."""
MEGABYTE = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """One training software at one version."""

    __pydantic_config__ = STRICT
    name: str = "unknown"
    match: str = ""
    family: str = "unknown"
    effects: str = ""
    """Name under which its fitted effect is kept; empty takes its own."""
    since: float = 0.0
    before: float = 9999.0
    released: float = 0.0
    """Year; 0 takes the version in its name."""
    tuned: bool = False
    """Tuned by the device's maker for this very run (MLPerf): no penalty for young devices."""
    attention: Literal["unfused", "flash1", "flash2", "fused"] = "fused"
    """fused: vendor kernels of the FlashAttention-3 or cuDNN kind."""
    sequence_parallel: bool = True
    """Norms and residuals are cut over tensor-parallel ranks (2205.05198)."""
    overlap_tensor: bool = False
    overlap_gradients: bool = True
    overlap_weights: bool = True
    overlap_experts: Literal["never", "across_hosts", "always"] = "never"
    dispatcher: Literal["alltoall", "deduplicating"] = "alltoall"
    """deduplicating: a token crosses to a host once for all its experts there (DeepEP, HybridEP)."""
    graphs_on_arm: bool = False
    graphs_since: float = 9999.0
    """CUDA graphs by default on devices released since then."""
    eager: bool = False
    """Operators between matrix products are not fused by a compiler or by hand."""
    static_shapes: bool = False
    """Experts get a fixed number of rows (capacity factor): the host never waits for counts."""
    balanced: bool = False
    """Routing is forced to be even, as benchmarks do."""
    gradient_bytes: float = 2.0
    """Of a gradient when it is kept and reduced."""
    bucket_mb: float = 0.0
    """Gradient bytes per collective; 0 grows with the number of ranks as Megatron-Core does."""
    collectives_per_layer: float = 1.0
    """ZeRO-3: gathers of one layer's weights."""
    logit_bytes: float = 6.0
    """Peak bytes per logit around the loss."""
    narrow_kept: bool = True
    """In 8- and 4-bit training the inputs of products are kept in that format for the backward pass."""
    again_unsaid: str = ""
    """What it does again where nothing is said about recomputation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traits:
    """A stack's habits on one device as numbers; flags are 0 or 1."""

    unfused: Number = 0.0
    flash1: Number = 0.0
    flash2: Number = 0.0
    sequence_parallel: Number = 1.0
    overlap_tensor: Number = 0.0
    overlap_gradients: Number = 1.0
    overlap_experts_inside: Number = 0.0
    overlap_experts_across: Number = 0.0
    """Whether the exchange hides inside a host, and when it crosses hosts."""
    deduplicating: Number = 0.0
    graphs: Number = 0.0
    eager: Number = 0.0
    static_shapes: Number = 0.0
    balanced: Number = 0.0
    years: Number = 2.0
    """The software's year minus the device's, at least 0; large for tuned runs."""
    arm: Number = 0.0
    modern: Number = 1.0
    """1 on devices of the Hopper generation and later."""
    gradient_bytes: Number = 2.0
    bucket_bytes: Number = 0.0
    collectives_per_layer: Number = 1.0
    logit_bytes: Number = 6.0
    narrow_kept: Number = 1.0
    overlap_weights: Number = 1.0


def traits(stack: Stack, device: DeviceSpec) -> Traits:
    """The stack's habits on this device."""
    graphs = (stack.graphs_on_arm and device.host == "arm") or device.released >= stack.graphs_since
    return Traits(
        unfused=float(stack.attention == "unfused"),
        flash1=float(stack.attention == "flash1"),
        flash2=float(stack.attention == "flash2"),
        sequence_parallel=float(stack.sequence_parallel),
        overlap_tensor=float(stack.overlap_tensor),
        overlap_gradients=float(stack.overlap_gradients),
        overlap_experts_inside=float(stack.overlap_experts == "always"),
        overlap_experts_across=float(stack.overlap_experts != "never"),
        deduplicating=float(stack.dispatcher == "deduplicating"),
        graphs=float(graphs),
        eager=float(stack.eager),
        static_shapes=float(stack.static_shapes),
        balanced=float(stack.balanced or stack.static_shapes),
        years=20.0 if stack.tuned else max(stack.released - device.released, 0.0),
        arm=float(device.host == "arm"),
        modern=float(device.released >= 2022.5),
        gradient_bytes=stack.gradient_bytes,
        bucket_bytes=stack.bucket_mb * MEGABYTE,
        collectives_per_layer=stack.collectives_per_layer,
        logit_bytes=stack.logit_bytes,
        narrow_kept=float(stack.narrow_kept),
        overlap_weights=float(stack.overlap_weights and stack.overlap_gradients),
    )


@cache
def known_stacks() -> dict[str, Stack]:
    """Name -> stack, in the order in which patterns are tried."""
    table = tomllib.loads(files("moestro.plan").joinpath("profiles", "stacks.toml").read_text(encoding="utf-8"))
    return {name: build(Stack, {"name": name, "effects": name, **entry}) for name, entry in table.items()}


def find_stack(software: str) -> Stack:
    """The stack a name means: one of ours by its own name, else by pattern and version, else an unknown one."""
    if software in known_stacks():
        return _dated(known_stacks()[software], software)
    year = version_year(software)
    for stack in known_stacks().values():
        if re.search(stack.match, software) and stack.since <= (year or TYPICAL_RELEASE) < stack.before:
            return _dated(stack, software)
    old = 0 < year < FUSED_SINCE
    return Stack(
        released=year or TYPICAL_RELEASE,
        effects="unknown",
        attention="unfused" if old else "fused",
        overlap_gradients=not old,
    )


def _dated(stack: Stack, software: str) -> Stack:
    return stack if stack.released else replace(stack, released=version_year(software) or TYPICAL_RELEASE)


def version_year(software: str) -> float:
    """'NeMo 25.04' -> 2025.33, 'Megatron-LM 2021' -> 2021.5, 0 where the name tells nothing."""
    if found := re.search(r"\b(20\d\d)\b", software):
        return int(found[1]) + 0.5
    if found := re.search(r"\b(2\d)\.(0\d|1[0-2])\b", software):
        return 2000 + int(found[1]) + int(found[2]) / 12
    return 0.0
