"""Experts that live in slots, have replicas or move learn what one rank learns, and lose nothing on the way."""

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moestro.cluster.links import links_of
from moestro.cluster.topology import Cluster, DeviceSpec, LevelSpec
from moestro.core.errors import ConfigError
from moestro.core.events import read_events
from moestro.core.specs import MoESpec, RouterSpec
from moestro.dist.dispatch import AllToAll, Hierarchical
from moestro.dist.layout import Layout, fit
from moestro.dist.mesh import Mesh
from moestro.dist.replicas import Copy
from moestro.dist.shard import pieces
from moestro.dist.testing import RankFailed, run_on_ranks
from moestro.nn.moe import MoE
from moestro.nn.routing_rules import Choice
from moestro.place.cost import Layer, Placement, TokenSet, exchange_bytes
from moestro.place.plan_file import save_placements
from moestro.place.planner import Gated, compile_searches
from moestro.train.data import open_data, prepare
from moestro.train.history import read_history
from moestro.train.loop import go_on, start
from moestro.train.park import LinkWatch
from moestro.train.placed import PlacedExperts, by_rank, with_moments
from moestro.train.ranks import Ranks
from moestro.train.recipe import Recipe
from moestro.train.report import write_report
from moestro.train.report_balance import foretold
from moestro.train.run_folder import RunFolder
from moestro.train.trainer import Trainer
from moestro.train.whole_steps import WholeSteps

MakeRecipe = Callable[..., Recipe]
Holders = list[dict[int, float]]
"""By expert: rank and share."""
PLAIN: Holders = [{0: 1}, {0: 1}, {1: 1}, {1: 1}]
UNEVEN: Holders = [{1: 1}, {0: 0.3, 1: 0.7}, {0: 1}, {1: 1}]
"""A hot expert on both ranks, an empty slot on rank 0."""
STEPS = 3
DEVICE = DeviceSpec(name="D", memory_gib=1, memory_gb_per_s=1, peak_tflops={"fp32": 1})


@pytest.fixture(scope="module", autouse=True)
def searches_are_compiled() -> None:
    """Once, before ranks are forked."""
    level = LevelSpec(name="host", fan_out=2, gb_per_s=1.0)
    compile_searches(links_of(Cluster(name="two", device=DEVICE, network=(level,))))


@pytest.fixture(autouse=True)
def experts_are_equally_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured speeds differ from run to run, and decisions with them."""
    monkeypatch.setattr("moestro.train.balance.rows_per_s", lambda *_: 1e6)


def placement(holders: Holders, ranks: int = 2) -> Placement:
    most = max(map(len, holders))
    device_EP, share_EP = np.full((len(holders), most), -1), np.zeros((len(holders), most))
    for expert, held in enumerate(holders):
        device_EP[expert, : len(held)], share_EP[expert, : len(held)] = list(held), list(held.values())
    nobody = np.zeros(ranks, np.int64)
    return Placement(device_EP=device_EP, share_AEP=share_EP[None], group_S=nobody, devices=ranks)


def placement_file(folder: Path, *layers: Holders, ranks: int = 2) -> str:
    path = folder / "placement.toml"
    save_placements(path, [placement(layer, ranks) for layer in layers])
    return f"balance.placement={path}"


def cluster_file(folder: Path, devices: int, gb_per_s: float = 1.0, memory_gib: float = 1.0) -> str:
    path = folder / "cluster.toml"
    path.write_text(
        f'name = "test"\n[device]\nname = "CPU"\nmemory_gib = {memory_gib}\nmemory_gb_per_s = 10\n'
        f'[device.peak_tflops]\nfp32 = 0.1\n[[network]]\nname = "host"\nfan_out = {devices}\ngb_per_s = {gb_per_s}\n'
    )
    return f"balance.cluster={path}"


def engine_for(recipe: Recipe) -> Ranks:
    return Ranks(fit(recipe.dist, torch.distributed.get_world_size()), torch.device("cpu"), recipe)


def trainer_for(recipe: Recipe) -> Trainer:
    return Trainer(recipe, open_data(recipe.out), engine_for(recipe))


def one_rank(make_recipe: MakeRecipe, *settings: str, steps: int = STEPS) -> Any:
    """(losses and gradient norms, weights) of one rank; a large eps keeps rounding from growing in Adam."""
    recipe = make_recipe("optimizer.eps=1e-3", *(s for s in settings if not s.startswith(("dist.", "balance."))))
    if not recipe.out.exists():
        prepare(recipe.data, recipe.out)
    trainer = Trainer(recipe, open_data(recipe.out))
    results = [trainer.run_step() for _ in range(steps)]
    return [(r.loss, r.grad_norm) for r in results], dict(trainer.model.state_dict())


def assert_same(curve: Any, trainer: Trainer, wanted: Any) -> None:
    engine = trainer.engine
    assert isinstance(engine, Ranks)
    for (loss, norm), (one_loss, one_norm) in zip(curve, wanted[0], strict=True):
        assert loss == pytest.approx(one_loss, rel=1e-6)
        assert norm == pytest.approx(one_norm, rel=1e-5)
    engine.meet()
    for name, tensor in trainer.model.state_dict().items():
        for _, box, part in pieces(name, tensor, engine.parts[name]):
            whole = wanted[1][name][tuple(slice(*side) for side in box)]
            torch.testing.assert_close(part, whole, rtol=1e-5, atol=2e-6, equal_nan=True)


def check_learns_the_same(recipe: Recipe, wanted: Any) -> None:
    trainer = trainer_for(recipe)
    results = [trainer.run_step() for _ in wanted[0]]
    assert_same([(r.loss, r.grad_norm) for r in results], trainer, wanted)


THREE: Holders = [{2: 1}, {0: 0.5, 1: 0.125, 2: 0.375}, {0: 1}, {1: 0.9, 2: 0.1}]
FOUR: Holders = [{3: 1}, {0: 0.4, 2: 0.6}, {1: 1}, {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25}]


@pytest.mark.parametrize(
    ("layers", "settings"),
    [
        ((UNEVEN, PLAIN), ("dist.ep=2",)),
        ((FOUR, UNEVEN), ("dist.ep=4", "dist.dispatch=hierarchical", "dist.ranks_per_node=2")),
        pytest.param((UNEVEN, UNEVEN), ("dist.dp_replicate=2", "dist.ep=2"), marks=pytest.mark.slow),
        pytest.param((UNEVEN, UNEVEN), ("dist.tp=2", "dist.ep=2", "train.recompute=all"), marks=pytest.mark.slow),
        pytest.param(
            (THREE, THREE), ("dist.ep=3", "train.micro_batches=2", "train.sequences=6"), marks=pytest.mark.slow
        ),
    ],
)
def test_any_placement_learns_what_one_rank_learns(
    make_recipe: MakeRecipe, tmp_path: Path, layers: tuple[Holders, Holders], settings: tuple[str, ...]
) -> None:
    ranks = int(next(s for s in settings if s.startswith("dist.ep="))[-1])
    wanted = one_rank(make_recipe, *settings)
    placed = placement_file(tmp_path, *layers, ranks=ranks)
    world = {2: 2 if len(settings) == 1 else 4, 3: 3, 4: 4}[ranks]
    run_on_ranks(check_learns_the_same, make_recipe("optimizer.eps=1e-3", placed, *settings), wanted, ranks=world)


def check_moves(recipe: Recipe, wanted: Any, plans: list[list[Holders]]) -> None:
    """A new placement after every step; what arrives is what was sent, and holders stay equal."""
    trainer = trainer_for(recipe)
    engine = trainer.engine
    assert isinstance(engine, Ranks)
    assert engine.balance is not None
    placed, curve = engine.balance.placed, []
    for plan in plans:
        result = trainer.run_step()
        curve.append((result.loss, result.grad_norm))
        before = by_expert(trainer)
        placements = [by_rank(placement(layer)) for layer in plan]
        nearest_EG = np.array([[next(iter(held)) for _ in range(2)] for held in plan[0]])
        copies = []
        for number, one in enumerate(placements):
            holder_E = placed.placements[number].held_EG.argmax(axis=1)
            nearest_EG = np.repeat(holder_E[:, None], 2, axis=1)
            copies.append(placed.copies(number, one, nearest_EG))
        assert any(isinstance(copy, Copy) for layer in copies for copy in layer)
        placed.adopt(placements, copies, trainer.optimizer)
        engine._follow_placement()
        if len(curve) == 1:  # else they arrive when the next forward pass needs them
            engine.meet()
            assert_equal_experts(by_expert(trainer), before)
    assert_same(curve, trainer, wanted)


def by_expert(trainer: Trainer) -> dict[tuple[int, int], list[torch.Tensor]]:
    """Weights and moments of every layer's experts, gathered from all ranks; holders must agree to the bit."""
    engine = trainer.engine
    assert isinstance(engine, Ranks)
    assert engine.balance is not None
    own = {}
    for number, layer in enumerate(engine.balance.placed.layers):
        for place, expert in enumerate(layer.table.expert_RS[engine.mesh["ep"].index].tolist()):
            if expert >= 0:
                own[number, expert] = [tensor[place].clone() for tensor in with_moments(layer, trainer.optimizer)]
    everyones: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyones, own)
    merged: dict[tuple[int, int], list[torch.Tensor]] = {}
    for one in everyones:
        for key, tensors in one.items():
            assert all(torch.equal(a, b) for a, b in zip(merged.setdefault(key, tensors), tensors, strict=True)), key
    return merged


def assert_equal_experts(now: Any, before: Any) -> None:
    assert now.keys() == before.keys()
    for key, tensors in now.items():
        assert len(tensors) == 6  # two weights, two moments of each
        assert all(torch.equal(a, b) for a, b in zip(tensors, before[key], strict=True)), key


def test_experts_that_move_while_training_keep_their_bits_and_the_curve(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    swapped: Holders = [{1: 1}, {1: 1}, {0: 1}, {0: 1}]
    plans = [[UNEVEN, swapped], [swapped, UNEVEN], [PLAIN, PLAIN]]
    wanted = one_rank(make_recipe)
    settings = ("dist.ep=2", "balance.slots=3", placement_file(tmp_path, PLAIN, PLAIN))
    run_on_ranks(check_moves, make_recipe("optimizer.eps=1e-3", *settings), wanted, plans, ranks=2)


def check_replicas_stay_equal(recipe: Recipe) -> None:
    trainer = trainer_for(recipe)
    for _ in range(8):
        assert trainer.run_step().applied
    by_expert(trainer)  # raises where they differ


def test_replicas_are_equal_to_the_bit_after_many_steps(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("dist.ep=2", placement_file(tmp_path, UNEVEN, UNEVEN))
    prepare(recipe.data, recipe.out)
    run_on_ranks(check_replicas_stay_equal, recipe, ranks=2)


def run_all(recipe: Recipe, stop_at: int = 0) -> None:
    asked = iter([False] * stop_at + [True])
    start(recipe, stop=(lambda: next(asked)) if stop_at else (lambda: False), engine=engine_for(recipe))


def run_on(recipe: Recipe) -> None:
    go_on(recipe.out, engine=engine_for(recipe), recipe=recipe)


def events(root: Path, kind: str) -> list[Any]:
    return [event for event in read_events(RunFolder(root).events) if event["event"] == kind]


def losses(root: Path) -> list[float]:
    return [event["loss"] for event in events(root, "step")]


LIVE = ("dist.ep=2", "balance.enabled=true", "balance.interval=2", "train.checkpoint_every=3", "train.evaluate_every=0")
SKEWED = ("model.moe.router.aux_loss=0", "train.steps=8", "train.sequences=8")


def live(make_recipe: MakeRecipe, folder: Path, out: str, *settings: str) -> Recipe:
    """Experts are slow to reach and free to move, so that something moves in a few steps."""
    return make_recipe(f"out={folder}/{out}", *LIVE, *SKEWED, cluster_file(folder, 2, gb_per_s=1e-4), *settings)


def test_a_run_that_rebalances_gives_the_curve_of_one_that_does_not(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run_on_ranks(run_all, live(make_recipe, tmp_path, "live"), ranks=2)
    run_on_ranks(run_all, live(make_recipe, tmp_path, "still", "balance.enabled=false"), ranks=2)
    assert losses(tmp_path / "live") == pytest.approx(losses(tmp_path / "still"), rel=2e-6)
    decided = decisions(tmp_path / "live")
    assert [event["step"] for event in decided] == [4, 6]  # begun two steps earlier
    assert sum(event["moved"] for event in decided) > 0
    steps = events(tmp_path / "live", "step")
    assert all(len(step["rank_imbalance"]) == 2 and step["inside_bytes"] > 0 for step in steps)
    page = write_report(RunFolder(tmp_path / "live")).read_text()
    assert "2 decisions, " in page
    for title in ("Busiest rank over the mean", "Sent by dispatch", "Predicted time of a step", "Decisions"):
        assert title in page


@pytest.mark.parametrize(
    "then",
    [
        "2 dist.ep=2",
        pytest.param("4 dist.ep=4", marks=pytest.mark.slow),
        pytest.param("2 dist.ep=2 balance.enabled=false", marks=pytest.mark.slow),
        pytest.param("2 dist.ep=1", marks=pytest.mark.slow),
        pytest.param("2 dist.ep=2 balance.slots=4", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_between_moves_goes_on_under_any_mesh(make_recipe: MakeRecipe, tmp_path: Path, then: str) -> None:
    run_on_ranks(run_all, live(make_recipe, tmp_path, "whole"), ranks=2)
    run_on_ranks(run_all, live(make_recipe, tmp_path, "parts"), 5, ranks=2)
    ranks, *settings = then.split()
    recipe = live(make_recipe, tmp_path, "parts", *settings, cluster_file(tmp_path, int(ranks), gb_per_s=1e-4))
    run_on_ranks(run_on, recipe, ranks=int(ranks))
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    if then == "2 dist.ep=2":  # also what was being decided: begun in step 4, in force after step 6
        assert decisions(tmp_path / "parts") == decisions(tmp_path / "whole")


def decisions(root: Path) -> list[dict[str, Any]]:
    """What does not depend on a clock."""
    names = ("step", "reason", "moves", "now_ms", "planned_ms", "first_ms", "saved_s", "moved")
    return [{name: event[name] for name in names} for event in events(root, "balance") if "reason" in event]


def test_whole_steps_are_foretold_beside_what_they_took(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = live(make_recipe, tmp_path, "run", "train.steps=40", "train.checkpoint_every=0", "balance.interval=10")
    run_on_ranks(run_all, recipe, ranks=2)
    decided = [event for event in events(recipe.out, "balance") if "reason" in event]
    assert [event["step"] for event in decided] == [12, 22, 32]
    assert all(event["expected_ms"] > 0 and event["measured_ms"] > 0 for event in decided)
    known = foretold(read_history(RunFolder(recipe.out)))
    assert [step for step, _, _ in known] == [12, 22]
    page = write_report(RunFolder(recipe.out)).read_text()
    assert "Whole step" in page
    assert "times what was predicted" in page


def train_on_while_the_leader_searches(recipe: Recipe) -> list[int]:
    """The search of step 2 ends only when step 3 is done; returns the steps after which experts moved."""
    trainer, step_3_is_done = trainer_for(recipe), threading.Event()
    engine, consider = trainer.engine, Gated.consider
    assert isinstance(engine, Ranks)
    assert engine.balance is not None

    def wait_and_consider(planner: Gated, layer: Layer, sample: int) -> Any:
        assert step_3_is_done.wait(20)
        return consider(planner, layer, sample)

    Gated.consider = wait_and_consider  # type: ignore[method-assign]
    moved = []
    for step in range(1, 5):
        before = [one.held_EG for one in engine.balance.placed.placements]
        trainer.run_step()
        if step == 3:
            step_3_is_done.set()
        after = [one.held_EG for one in engine.balance.placed.placements]
        moved += [step] if any((a != b).any() for a, b in zip(before, after, strict=True)) else []
    return moved


def test_steps_go_on_while_the_leader_searches_and_its_plan_waits_for_its_step(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = live(make_recipe, tmp_path, "run", "balance.interval=2")
    prepare(recipe.data, recipe.out)
    assert run_on_ranks(train_on_while_the_leader_searches, recipe, ranks=2) == [[4], [4]]


@pytest.mark.slow
def test_one_rank_goes_on_with_what_moved_and_back(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run_on_ranks(run_all, live(make_recipe, tmp_path, "whole"), ranks=2)
    recipe = live(make_recipe, tmp_path, "parts")
    run_on_ranks(run_all, recipe, 3, ranks=2)
    asked = iter([False, False, True])
    go_on(recipe.out, stop=lambda: next(asked))
    run_on_ranks(run_on, recipe, ranks=2)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.parametrize(
    ("cluster", "problem"),
    [
        ("gb_per_s = nan", "gb_per_s is nan"),
        pytest.param("fan_out = 1", "has 1 devices; the run has 2 ranks", marks=pytest.mark.slow),
        pytest.param("memory_gib = 1e-7", "has 0.0 GiB", marks=pytest.mark.slow),
    ],
)
def test_a_network_that_does_not_do_is_said_once_and_training_goes_on(
    make_recipe: MakeRecipe, tmp_path: Path, cluster: str, problem: str
) -> None:
    recipe = live(make_recipe, tmp_path, "run", "train.steps=4")
    path = Path(recipe.balance.cluster)
    key = cluster.partition(" =")[0]
    lines = [cluster if line.startswith(key + " ") else line for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines))
    run_on_ranks(run_all, recipe, ranks=2)
    said = events(recipe.out, "balance")
    assert len(said) == 1
    assert problem in said[0]["problem"]
    assert len(losses(recipe.out)) == 4


def test_a_search_that_fails_is_said_once_and_training_goes_on(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("no gain to divide by")

    monkeypatch.setattr(Gated, "consider", fail)
    monkeypatch.setattr("moestro.train.rebalance.compile_searches", lambda _: None)
    recipe = live(make_recipe, tmp_path, "run")
    run_on_ranks(run_all, recipe, ranks=2)
    problems = [event["problem"] for event in events(recipe.out, "balance") if "problem" in event]
    assert problems == ["no new placement: no gain to divide by; training goes on with the one it has"]
    assert len(losses(recipe.out)) == 8


def test_links_are_not_looked_at_while_steps_take_as_long_as_expected(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    monkeypatch.setattr(LinkWatch, "changed", lambda _: looks.append(1))
    monkeypatch.setattr(WholeSteps, "as_expected", lambda *_: True)
    recipe = make_recipe("dist.ep=2", "balance.enabled=true", "balance.interval=1", "train.steps=14")
    prepare(recipe.data, recipe.out)
    assert run_on_ranks(looks_of, recipe, looks, ranks=2) == [2, 2]  # at the first decision and at the eleventh


def looks_of(recipe: Recipe, looks: list[int]) -> int:
    trainer = trainer_for(recipe)
    for _ in range(recipe.train.steps):
        trainer.run_step()
    return len(looks)


@pytest.mark.slow
def test_links_that_become_slower_are_probed_again(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([1.0, 1.5, 4.0, 4.1])  # at the start, then at each decision
    monkeypatch.setattr(LinkWatch, "_round_s", lambda _: next(seconds))
    recipe = make_recipe("dist.ep=2", "balance.enabled=true", "balance.interval=2", "train.steps=10")
    run_on_ranks(run_all, recipe, ranks=2)
    begun, *decided = events(recipe.out, "balance")
    assert "slots" in begun
    assert [event.get("links_slower") for event in decided] == [None, 4.0, None]


def die_while_experts_move(recipe: Recipe) -> None:
    """At the third decision all experts change places; rank 1 is killed while they are on their way."""
    engine = engine_for(recipe)
    adopt, calls = PlacedExperts.adopt, iter(range(100))

    def adopt_and_die(placed: PlacedExperts, placements: Any, copies: Any, optimizer: Any) -> None:
        dies = next(calls) == 2
        if dies:
            flipped = [np.where(one.device_EP < 0, -1, 1 - one.device_EP) for one in placed.placements]
            pairs = zip(placed.placements, flipped, strict=True)
            placements = [by_rank(replace(one, device_EP=device_EP)) for one, device_EP in pairs]
            nearest_EG = np.tile([1, 0], (4, 1))
            copies = [placed.copies(number, one, nearest_EG) for number, one in enumerate(placements)]
            assert all(copies)
        adopt(placed, placements, copies, optimizer)
        if dies and engine.mesh.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    PlacedExperts.adopt = adopt_and_die  # type: ignore[method-assign, assignment]
    start(recipe, engine=engine)


@pytest.mark.slow
def test_a_rank_killed_in_the_middle_of_a_move_costs_nothing_but_the_way_back(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    often = ("balance.interval=1", "train.checkpoint_every=1")
    run_on_ranks(run_all, live(make_recipe, tmp_path, "whole", *often), ranks=2)
    recipe = live(make_recipe, tmp_path, "parts", *often)
    with pytest.raises(RankFailed):
        run_on_ranks(die_while_experts_move, recipe, ranks=2)
    assert max(event["step"] for event in read_events(RunFolder(recipe.out).events)) in (3, 4)
    run_on_ranks(run_on, recipe, ranks=2)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def count_bytes(token_SX: Any, one: Placement, hierarchical: bool) -> tuple[int, int]:
    """(inside, between) of one forward exchange as the dispatcher counts them; two nodes of two ranks."""
    mesh = Mesh(Layout(dp_shard=4, ep=4, node=2), torch.device("cpu"))
    flat, levels = AllToAll(mesh["ep"], 2), Hierarchical(mesh["ep_node"], mesh["ep_rail"], 2)
    spec = MoESpec(num_experts=len(one.device_EP), expert_width=8, router=RouterSpec(rule="top2"))
    exchange, moe = levels if hierarchical else flat, MoE(16, spec)
    moe.experts.initialise(0.1, 0.1)
    placed = PlacedExperts([one], 2, mesh)
    moe.dispatcher = placed.cut("experts", moe, exchange)[1]
    expert_TK = torch.tensor(token_SX[mesh.rank])
    x_TD = torch.zeros(len(expert_TK), 16)
    moe.dispatcher(x_TD, Choice(expert_TK, torch.ones(expert_TK.shape)), moe.experts, "loop")
    return exchange.traffic.inside_bytes, exchange.traffic.between_bytes


@pytest.mark.parametrize("hierarchical", [False, True])
def test_the_cost_model_reckons_with_the_bytes_that_dispatch_sends(hierarchical: bool) -> None:
    """Counts are multiples of 4, shares of a quarter: rows are whole numbers."""
    one = by_rank(placement([{0: 0.5, 2: 0.5}, {1: 0.25, 3: 0.75}, {3: 1}, {0: 1}], ranks=4))
    draw = np.random.default_rng(3)
    pairs = [[[0, 1]] * 8 * int(draw.integers(1, 4)) + [[2, 3]] * 4 * int(draw.integers(4)) for _ in range(4)]
    counted_S = run_on_ranks(count_bytes, pairs, one, hierarchical, ranks=4)
    token_SE = np.array([np.bincount(np.ravel(pair_TK), minlength=4) for pair_TK in pairs], float)
    levels = (LevelSpec(name="host", fan_out=2, gb_per_s=1), LevelSpec(name="net", fan_out=2, gb_per_s=1))
    links = links_of(Cluster(name="two hosts", device=DEVICE, network=levels))
    sets = [
        TokenSet(host, (one_of, one_of + 1), float((pairs[2 * host] + pairs[2 * host + 1]).count([one_of, one_of + 1])))
        for host in (0, 1)
        for one_of in (0, 2)
    ]
    layer = Layer(
        links=links,
        token_SE=token_SE,
        tokens_per_s_G=np.ones(4),
        slot_G=np.full(4, 2),
        token_bytes=1.0,  # so that bytes are rows
        held_EG=one.held_EG,
        sets=sets if hierarchical else (),
    )
    rows = dict(zip(links.names, exchange_bytes(layer, one), strict=True))
    row = 16 * 4
    extra = 2 * (4 + 8) if hierarchical else 4
    for host in (0, 1):
        between = sum(counted_S[2 * host + place][1] for place in (0, 1))
        assert between == rows[f"host{host}.out"] * (row + extra) + rows[f"host{host}.in"] * row
    if not hierarchical:
        for rank, (inside, between) in enumerate(counted_S):
            assert inside + between == rows[f"device{rank}.out"] * (row + 4) + rows[f"device{rank}.in"] * row


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("dist.zero=1", "does not go with dist.zero 1"),
        ("dist.pp=2", "does not go with dist.pp 2"),
        ("model.moe.sharing=low_rank model.moe.sharing_rank=4", "low_rank"),
        ("balance.slots=1", "raise it to 2"),
    ],
)
def test_what_does_not_go_together_is_refused(make_recipe: MakeRecipe, settings: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_recipe("dist.ep=2", "balance.enabled=true", *settings.split())
