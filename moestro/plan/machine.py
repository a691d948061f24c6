"""A cluster in the numbers that formulas need, for one number format of the matrix products; may be columns.

Cluster (or a published row's hardware) + precision -> Machine
"""

from dataclasses import dataclass

import numpy as np

from moestro.cluster.topology import Cluster, DeviceSpec
from moestro.core.errors import PlanError
from moestro.plan.columns import Number

TYPICAL_SHARE = 0.74
"""Achievable over peak matrix rate of a device nobody has measured: the middle of A100 .87, H100 .80, GB200 .73,
MI300X .51."""
REFERENCE_FLOPS_PER_S = 989e12
"""H100, bf16: the device at which `depth_half` is stated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """A number format of training, as numbers."""

    narrow: Number = 0.0
    """1 for 8- and 4-bit products."""
    block: Number = 0.0
    """1 for MXFP8."""
    four: Number = 0.0
    """1 for 4-bit products."""
    single: Number = 0.0
    """1 where products are in fp32."""
    stored_bytes: Number = 2.0
    """Of an activation kept for the backward pass of a product."""
    gathered_bytes: Number = 2.0
    """Of a weight when ZeRO gathers it."""


PRECISIONS = ("bf16", "fp16", "fp8", "fp8-block", "mxfp8", "nvfp4", "fp32")
"""What may be asked for."""


def precision_of(text: str) -> Precision:
    """`bf16`, `fp16`, `fp8` (per tensor), `fp8-block`, `mxfp8`, `nvfp4`, `fp32` and longer names that contain one."""
    name = text.lower().replace("_", "-")
    if "fp4" in name:
        return Precision(narrow=1, four=1, stored_bytes=1.05)
    if "mxfp8" in name or "mx-fp8" in name or "fp8-mx" in name:
        return Precision(narrow=1, block=1, stored_bytes=1.05)
    if "fp8" in name or "e4m3" in name:
        return Precision(narrow=1, stored_bytes=1.05)
    if "bf16" in name or "fp16" in name or "half" in name or "mixed" in name:
        return Precision()
    if "32" in name:
        return Precision(single=1, stored_bytes=4, gathered_bytes=4)
    raise PlanError(f"precision is {text!r}; it must be one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """One level of the network."""

    devices: Number
    """Devices of one unit; infinite on the outermost."""
    bytes_per_s: Number
    """Of one device, each direction."""
    slowness: Number = 1.0
    """Latency beside what is usual at such a level."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Devices and network."""

    bf16_flops_per_s: Number
    """Achievable rate of 16-bit products (32-bit where training is in fp32)."""
    matmul_flops_per_s: Number
    """Achievable rate of products in the format asked for."""
    peak_flops_per_s: Number
    """Vendor's dense 16-bit rate, for MFU."""
    memory_bytes_per_s: Number
    memory_bytes: Number
    tile: Number
    """Side of a tile of a matrix product."""
    wave: Number
    """Results of one wave of tiles."""
    levels: tuple[Level, ...]


def machine_of(cluster: Cluster, precision: str) -> Machine:
    """A cluster's numbers for one format; raises PlanError where the device cannot do the format."""
    kind, device = precision_of(precision), cluster.device
    base = "fp32" if kind.single else "bf16"
    if base not in device.peak_tflops:
        other = sorted(device.peak_tflops)
        raise PlanError(f"{device.name} has no {base} rate; set device.peak_tflops.{base}, or use precision {other[0]}")
    wide = achievable(device, base)
    return Machine(
        bf16_flops_per_s=wide,
        matmul_flops_per_s=achievable(device, _format(kind, device, precision)) if kind.narrow else wide,
        peak_flops_per_s=device.peak_tflops[base] * 1e12,
        memory_bytes_per_s=device.memory_gb_per_s * 1e9,
        memory_bytes=device.memory_bytes,
        tile=device.tile,
        wave=device.tiles_at_once * 128 * 256,
        levels=tuple(
            Level(devices=size, bytes_per_s=level.bytes_per_s, slowness=level.slowness)
            for size, level in zip(cluster.unit_sizes(), cluster.network, strict=True)
        ),
    )


def _format(kind: Precision, device: DeviceSpec, asked: str) -> str:
    wanted = "fp4" if kind.four else "fp8"
    if wanted not in device.peak_tflops:
        can = "mxfp8 or bf16" if wanted == "fp4" and "fp8" in device.peak_tflops else "bf16"
        raise PlanError(f"precision is {asked} but {device.name} has no {wanted} products; use {can}")
    return wanted


def achievable(device: DeviceSpec, kind: str) -> float:
    """FLOP/s of the best large products: measured, or the peak times the share measured for 16 bits, or a usual one."""
    peak = device.peak_tflops[kind]
    if kind in device.achievable_tflops:
        return device.achievable_tflops[kind] * 1e12
    if "bf16" in device.achievable_tflops and "bf16" in device.peak_tflops:
        return peak * 1e12 * device.achievable_tflops["bf16"] / device.peak_tflops["bf16"]
    return peak * 1e12 * TYPICAL_SHARE


def rank_sizes(level: Level, stride: Number, ranks: Number) -> Number:
    """How many of a group's `ranks`, `stride` apart, lie in one unit of a level."""
    return np.clip(np.floor(level.devices / stride), 1, ranks)
