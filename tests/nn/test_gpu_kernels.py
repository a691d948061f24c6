"""The Triton kernels equal the obviously right loop, on a GPU where there is one, else in Triton's interpreter."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

GPU = torch.cuda.is_available()
triton = pytest.importorskip("triton")

from moestro.core.specs import MoESpec
from moestro.nn.experts import Experts
from moestro.nn.kernels.gpu import launch, tune
from moestro.nn.kernels.gpu.blocks import SMALL, Blocks, tile_rows
from moestro.nn.kernels.gpu.experts import sort_tiles, triton_experts
from moestro.nn.kernels.gpu.sort import sort_places
from moestro.nn.moe import MoE
from moestro.nn.permute import sort_by_expert

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
DEVICE = "cuda" if GPU else "cpu"
D, WIDE = 24, 40  # neither is a multiple of a block


def drawn(num_experts: int, dtype: torch.dtype = torch.float32, width: int = D, hidden: int = WIDE) -> Experts:
    torch.manual_seed(3)
    made = Experts(width, MoESpec(num_experts=num_experts, expert_width=hidden))
    made.initialise(0.3, 0.3)
    return made.to(DEVICE, dtype)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every fresh tensor holds NaN, or the largest integer, until something is written."""
    torch._C._set_deterministic_algorithms(True, warn_only=True)  # the public name imports seconds of compiler
    yield
    torch._C._set_deterministic_algorithms(False)


def value_and_gradients(
    experts: Experts, x: Tensor, weight: Tensor, expert: Tensor, d_y: Tensor, path: Any
) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    order = sort_by_expert(expert, experts.num_experts, tiled=path == "triton")
    y = experts(x, weight, order, path)
    return [y, *torch.autograd.grad(y, [x, weight, experts.gate_up_EDF, experts.down_EFD], d_y)]


def draw_case(tokens: int, expert_TK: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    x, d_y = (torch.randn(tokens, D).to(DEVICE, dtype) for _ in range(2))
    return x, torch.rand(expert_TK.shape).to(DEVICE), expert_TK.to(DEVICE), d_y


def relative(found: Tensor, right: Tensor) -> float:
    found, right = found.detach().double(), right.detach().double()
    return float((found - right).norm() / right.norm().clamp(min=1e-9))


LOADS = {
    "one or two experts": (3, torch.tensor([[0, 1], [1, 3], [2, 0], [1, 2], [0, 3]] * 4)),
    "an idle expert and a lone row": (4, torch.tensor([[0]] * 18 + [[3], [4]])),
    "nobody": (2, torch.full((5, 2), 2)),
    "one slot, one busy expert": (2, torch.zeros(17, 1, dtype=torch.int64)),
    "all of eight": (8, torch.arange(8).expand(3, 8)),
}
LOAD_NAMES = [pytest.param(load, marks=pytest.mark.slow) if load == "all of eight" else load for load in LOADS]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("load", LOAD_NAMES)
def test_values_and_gradients_equal_the_loop_in_float64(load: str) -> None:
    num_experts, expert_TK = LOADS[load]
    case = draw_case(len(expert_TK), expert_TK)
    found = value_and_gradients(drawn(num_experts), *case, "triton")
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in case]
    right = value_and_gradients(drawn(num_experts, torch.float64), *exact, "loop")
    for mine, wanted in zip(found, right, strict=True):
        assert relative(mine, wanted) < 2e-6, load


@pytest.mark.usefixtures("poisoned")
def test_bfloat16_rounds_and_no_more() -> None:
    num_experts, expert_TK = LOADS["one or two experts"]
    case = draw_case(len(expert_TK), expert_TK, torch.bfloat16)
    found = value_and_gradients(drawn(num_experts), *case, "triton")
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in case]
    right = value_and_gradients(drawn(num_experts, torch.float64), *exact, "loop")
    assert [t.dtype for t in found] == [torch.bfloat16] * 2 + [torch.float32] * 3  # weights' gradients stay float32
    assert max(relative(mine, wanted) for mine, wanted in zip(found, right, strict=True)) < 0.015


@pytest.mark.slow
def test_without_the_copy_engine_the_same_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    num_experts, expert_TK = LOADS["one or two experts"]
    case = draw_case(len(expert_TK), expert_TK)
    found = value_and_gradients(drawn(num_experts), *case, "triton")
    monkeypatch.setattr(launch, "has_copy_engine", lambda *_: False)
    for mine, wanted in zip(value_and_gradients(drawn(num_experts), *case, "triton"), found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_large_blocks_split_their_way_back_in_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 columns take the other branch of act_backward."""
    num_experts, expert_TK = LOADS["one or two experts"]
    case = draw_case(len(expert_TK), expert_TK)
    found = value_and_gradients(drawn(num_experts), *case, "triton")
    monkeypatch.setattr(launch, "pick", lambda *_: Blocks(128, 32, warps=8, stages=2, high=32))
    for mine, wanted in zip(value_and_gradients(drawn(num_experts), *case, "triton"), found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("poisoned")
def test_rows_beyond_the_used_ones_are_never_written() -> None:
    num_experts, expert_TK = LOADS["an idle expert and a lone row"]
    x, weight, expert, _ = draw_case(20, torch.cat([expert_TK, torch.full_like(expert_TK, 4)], 1))
    experts, tiles = drawn(num_experts), sort_tiles(expert, num_experts)
    act, gate_up = launch.gate_up_act(x, weight, tiles, experts.gate_up_EDF.detach(), True, SMALL)
    out = launch.rows_product(act, tiles, experts.down_EFD.detach(), False, SMALL)
    d_gate_up, again, _ = launch.act_backward(x, weight, tiles, experts.down_EFD.detach(), gate_up, SMALL)
    for name, rows in {"act": act, "gate_up": gate_up, "out": out, "d_gate_up": d_gate_up, "again": again}.items():
        assert rows[:19].isfinite().all(), name
        assert rows[19:].isnan().all(), name


def test_not_a_number_stays_with_its_expert() -> None:
    experts = drawn(3)
    with torch.no_grad():
        experts.gate_up_EDF[1] = torch.nan
    expert_TK = torch.tensor([[0]] * 9 + [[1]] * 2 + [[2]] * 7)
    x, weight, expert, d_y = draw_case(18, expert_TK)
    y, d_x, _, d_gate_up, _ = value_and_gradients(experts, x, weight, expert, d_y, "triton")
    assert y.isnan().any(-1).tolist() == d_x.isnan().any(-1).tolist() == [False] * 9 + [True] * 2 + [False] * 7
    assert d_gate_up.isnan().flatten(1).any(-1).tolist() == [False, True, False]


@pytest.mark.slow
def test_the_product_need_not_be_kept() -> None:
    num_experts, expert_TK = LOADS["one or two experts"]
    experts, case = drawn(num_experts), draw_case(20, expert_TK)
    results, saved = [], []
    for experts.recompute in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            results.append(value_and_gradients(experts, *case, "triton"))
        saved.append(-1)
    product = 20 * 2 * 2 * experts.hidden
    assert product in saved[: saved.index(-1)]
    assert product not in saved[saved.index(-1) :]
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)


@pytest.mark.slow
def test_frozen_weights_get_no_gradient() -> None:
    experts, (x, weight, expert, d_y) = drawn(3).requires_grad_(False), draw_case(20, LOADS["one or two experts"][1])
    x.requires_grad_()
    tiles = sort_tiles(expert, 3)
    triton_experts(x, weight, tiles, experts.gate_up_EDF, experts.down_EFD).backward(d_y)
    assert x.grad is not None
    assert experts.gate_up_EDF.grad is None


@pytest.mark.parametrize(
    ("tokens", "slots", "num_experts"),
    [(70, 3, 17), (0, 2, 3), (1, 1, 1), pytest.param(300, 2, 512, marks=pytest.mark.slow)],
)
def test_sorting_equals_a_stable_argsort(tokens: int, slots: int, num_experts: int) -> None:
    sort_tiles(torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), 1)  # the interpreter is repaired
    expert_TK = torch.randint(num_experts + 1, (tokens, slots)).to(DEVICE)
    source, row, offset, tile, busiest = sort_places(expert_TK, num_experts, 16)
    flat = expert_TK.flatten()
    count = torch.bincount(flat, minlength=num_experts + 1)[:num_experts].tolist()
    assert torch.equal(source.long(), flat.argsort(stable=True))
    used = flat[source.long()] < num_experts
    assert torch.equal(source[row[source.long()[used]].long()], source[used])
    assert row[flat == num_experts].eq(-1).all()
    assert offset[:-1].diff().tolist() == count
    tiles = [(e, int(offset[e]) + 16 * part) for e in range(num_experts) for part in range(-(-count[e] // 16))]
    assert int(offset[-1]) == len(tiles)
    assert tile[:, : len(tiles)].T.tolist() == [list(pair) for pair in tiles]
    assert busiest.tolist() == sorted(range(num_experts), key=lambda e: (-count[e], e))


def test_weights_may_lie_turned_and_the_tensors_gpu_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels read weights row by row, and Triton launches on the current GPU whatever the tensors'."""
    entered: list[Tensor] = []
    device_of = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: entered.append(tensor) or device_of(tensor))
    experts, (x, weight, expert, _) = drawn(3), draw_case(5, LOADS["one or two experts"][1][:5])
    plain = [experts.gate_up_EDF.detach(), experts.down_EFD.detach()]
    turned = [w.mT.contiguous().mT for w in plain]
    tiles = sort_tiles(expert, 3)
    found = [triton_experts(x, weight, tiles, *weights) for weights in (plain, turned)]
    assert torch.equal(*found)
    assert [id(tensor) for tensor in entered] == [id(expert), id(x), id(x)]


def test_block_sizes_that_do_not_fit_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own errors are no RuntimeErrors."""

    def clock(call: Callable[[], Any]) -> float:
        return 1.0 if call.__defaults__[1] is tune.CANDIDATES["down"][1] else too_large()  # type: ignore[attr-defined]

    def too_large() -> float:
        raise triton.OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(tune, "trials", lambda *_: {"down": lambda _: None})
    monkeypatch.setattr(tune, "CHOSEN", {})
    x, down = torch.zeros(1, D), torch.zeros(3, WIDE, D)
    tiles = sort_tiles(torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), 3)
    found = tune.tune(x, x, tiles, x, down, clock)
    assert found == {"down": [math.inf, 1.0, *[math.inf] * (len(tune.CANDIDATES["down"]) - 2)]}
    assert list(tune.CHOSEN.values()) == [tune.CANDIDATES["down"][1]]


def test_few_rows_an_expert_get_small_tiles() -> None:
    assert tile_rows(32768 * 8, 128) == 128
    assert tile_rows(64 * 2, 64) == 64


def test_a_layer_computes_by_it_from_end_to_end() -> None:
    torch.manual_seed(0)
    layer = MoE(16, MoESpec(num_experts=3, expert_width=16), "triton").to(DEVICE)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.3)
    x_BSD = torch.randn(1, 9, 16, device=DEVICE)
    y_BSD, _ = layer(x_BSD)
    layer.path = "loop"
    torch.testing.assert_close(y_BSD, layer(x_BSD)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_operators_are_what_autograd_and_compile_expect() -> None:
    experts, (x, weight, expert, _) = drawn(3), draw_case(5, torch.arange(10).view(5, 2) % 3)
    torch.library.opcheck(torch.ops.moestro.sort_places, (expert, 3, 16))
    tiles = sort_tiles(expert, 3)
    tables = [tiles.source_A, tiles.row_A, tiles.offset_X, tiles.tile_2M, tiles.busiest_E]
    casts = [experts.gate_up_EDF.detach(), experts.down_EFD.detach()]
    masters = list(experts.parameters())
    torch.library.opcheck(
        torch.ops.moestro.experts, (x.requires_grad_(), weight, tables, 16, *casts, masters, True, False)
    )


@pytest.mark.slow
def test_compiled_as_one_graph_it_gives_the_same() -> None:
    experts, (x, weight, expert, d_y) = drawn(3), draw_case(5, LOADS["one or two experts"][1][:5])

    def layer(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
        return triton_experts(x, weight, sort_tiles(expert, 3), experts.gate_up_EDF, experts.down_EFD)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    grads = [torch.autograd.grad(run(x, weight, expert), [x, *experts.parameters()], d_y) for run in (layer, compiled)]
    assert all(torch.equal(left, right) for left, right in zip(*grads, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("mean_k", [1.35, 2.0])
def test_on_a_gpu_results_are_the_same_from_run_to_run_and_from_a_graph(mean_k: float) -> None:
    torch.manual_seed(1)
    experts = drawn(8, torch.bfloat16, 256, 512)
    x, d_y = (torch.randn(4096, 256, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    expert, weight = torch.randint(8, (4096, 2), device=DEVICE), torch.rand(4096, 2, device=DEVICE)
    expert[torch.rand(4096, device=DEVICE) > mean_k - 1, 1] = 8
    first, again = (value_and_gradients(experts, x, weight, expert, d_y, "triton") for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        captured = value_and_gradients(experts, x, weight, expert, d_y, "triton")
    x.copy_(x.flip(0))
    graph.replay()
    right = value_and_gradients(experts, x, weight, expert, d_y, "triton")
    assert all(torch.equal(left, wanted) for left, wanted in zip(captured, right, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_device() -> None:
    layer = MoE(64, MoESpec(num_experts=4, expert_width=64)).to(DEVICE)
    x = torch.randn(2, 1024, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    for path in ("triton", "grouped"):
        layer.path = path  # type: ignore[assignment]
        for debug in ("default", "error"):  # the first round compiles
            torch.cuda.set_sync_debug_mode(debug)
            try:
                y, record = layer(x)
                (y.float().square().mean() + record.loss).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
