"""Every Triton kernel compiles for Hopper and Ampere without a GPU, fits, and uses what the chip has."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
ROOT = Path(__file__).parents[2]
PRODUCTS = ("gate_up", "down", "act_backward", "d_x", "d_gate_up_weight", "d_down_weight")


def compiled(*options: str) -> list[dict[str, Any]]:
    """What scripts/gpu_code.py finds, in a process where kernels are not interpreted."""
    command = [sys.executable, str(ROOT / "scripts/gpu_code.py"), "--json", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return list(json.loads(done.stdout))


@pytest.mark.slow
def test_hopper_gets_warp_group_products_and_tile_copies() -> None:
    found = {row["kernel"]: row for row in compiled("--chip", "90")}
    for name in PRODUCTS:
        assert found[name]["wgmma"] > 0, name
        assert found[name]["spilled"] <= 64, name
        assert found[name]["tma"] + found[name]["copies_of_16"] > 0, name
    assert all(found[name]["tma"] for name in PRODUCTS if "weight" not in name)
    assert found["route_tokens topk"]["fits"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_ampere_does_without_them(dtype: str) -> None:
    found = {row["kernel"]: row for row in compiled("--chip", "80", "--dtype", dtype)}
    assert all(found[name]["tma"] == found[name]["wgmma"] == 0 for name in PRODUCTS)
    assert all(row["fits"] for row in found.values())


@pytest.mark.slow
def test_every_block_size_fits_a_hopper_multiprocessor_and_some_leave_room_for_a_second_program() -> None:
    found = compiled("--chip", "90", "--all")
    assert all(row["fits"] and row["spilled"] <= 84 for row in found)
    for name in PRODUCTS:
        assert max(row["programs"] for row in found if row["kernel"] == name) >= 2, name
