"""What the sparse layer keeps for its backward pass, counted on tensors without values (benchmarks/gpu_memory.py)."""

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from moestro.nn.kernels.gpu import interpreted
from moestro.nn.kernels.gpu.blocks import tile_rows


@pytest.fixture
def gpu_memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import gpu_memory

    yield gpu_memory
    for name in ("gpu_memory", "gpu_cases", "peers"):
        sys.modules.pop(name, None)


def test_the_kernels_keep_the_input_and_the_first_product_and_recomputing_keeps_the_input(gpu_memory: Any) -> None:
    shape = gpu_memory.Shape(tokens=100, width=64, hidden=32, experts=4, slots=3)
    kept = gpu_memory.kept_by_ways(shape)
    tiles = 300 // tile_rows(300, 4, interpreted()) + 4
    tokens, product, tables = 2 * 100 * 64, 2 * 300 * 2 * 32, 4 * (300 + 300 + 6 + 2 * tiles + 4)
    assert kept["moestro triton"] == tokens + product + tables + 4 * 300  # routing weights last
    assert kept["moestro triton, recompute"] == tokens + tables + 4 * 300


def test_on_all_benchmark_shapes_they_keep_at_most_seven_tenths_of_the_unfused_way(gpu_memory: Any) -> None:
    for shape in gpu_memory.SHAPES:
        kept = gpu_memory.kept_by_ways(shape.full)
        assert kept["moestro triton"] <= 0.7 * kept["torchtitan-style"], shape.name
