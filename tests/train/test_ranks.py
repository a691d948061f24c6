"""Runs on several ranks leave what a run on one rank leaves, and go on after a stop, under any mesh."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.core.errors import ConfigError
from moestro.core.events import read_events
from moestro.dist.layout import Layout, fit
from moestro.dist.shard import held_rows, pieces
from moestro.dist.testing import run_on_ranks
from moestro.train import checkpoint
from moestro.train.data import open_data, prepare
from moestro.train.engine import Engine, OneRank
from moestro.train.loop import go_on, start
from moestro.train.ranks import Ranks, check_alone
from moestro.train.recipe import Recipe
from moestro.train.run_folder import RunFolder
from moestro.train.trainer import Trainer

MakeRecipe = Callable[..., Recipe]


def slow(*settings: str) -> Any:
    """A case for the long suite; the quick one keeps one or two of each kind."""
    return pytest.param(settings, marks=pytest.mark.slow, id=" ".join(settings))


def engine_for(recipe: Recipe) -> Ranks:
    return Ranks(fit(recipe.dist, torch.distributed.get_world_size()), torch.device("cpu"), recipe)


def after(steps: int) -> Callable[[], bool]:
    """Asks to stop after so many steps; 0: never. Ranks that learn apart ask where they meet only."""
    begun: list[int] = []

    def stop() -> bool:
        begun.append(1)
        return bool(steps) and len(begun) > steps

    return stop


def run_all(recipe: Recipe, stop_at: int = 0, engine: Engine | None = None) -> Any:
    return start(recipe, stop=after(stop_at), engine=engine or engine_for(recipe)).evaluation


def run_on(recipe: Recipe, stop_at: int = 0, engine: Engine | None = None) -> Any:
    return go_on(recipe.out, stop=after(stop_at), engine=engine or engine_for(recipe), recipe=recipe).evaluation


def losses(root: Path) -> list[float]:
    return [event["loss"] for event in read_events(RunFolder(root).events) if event["event"] == "step"]


def test_a_whole_run_equals_one_rank_and_evaluates_on_one_machine(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    one = start(make_recipe(f"out={tmp_path}/one"))
    recipe = make_recipe(f"out={tmp_path}/four", "dist.ep=2")
    evaluations = run_on_ranks(run_all, recipe, ranks=4)
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert one.evaluation is not None
    assert all(evaluation == evaluations[0] for evaluation in evaluations)
    assert evaluations[0].bits_per_byte == pytest.approx(one.evaluation.bits_per_byte, rel=1e-4)
    assert evaluations[0].tokens == one.evaluation.tokens
    model, _ = checkpoint.load_model(checkpoint.find_checkpoint(tmp_path / "four"))
    assert len(model.blocks[0].feed_forward.experts.gate_up_EDF) == 4


CHAINS = (
    "4 ep=4 > 2 ep=2 > 1",
    "1 > 2 ep=2 > 4 ep=4",
    "4 tp=2 ep=2 > 2 > 4 tp=2 expert_tp=true",
    "4 pp=2 ep=2 > 2 ep=2 > 4 pp=2 zero=1",
    "4 ep=2 zero=3 > 4 ep=2 > 2 zero=2",
    "4 pp=2 zero=3 > 4 tp=2 zero=1 > 1",
    "8 dp_replicate=2 ep=4 zero=2 > 4 pp=2 schedule=interleaved > 6 dp_shard=6 ep=2",
    "4 pp=2 schedule=zero_bubble > 4 ep=4 dispatch=hierarchical ranks_per_node=2 > 2 tp=2",
)


@pytest.mark.parametrize("chain", [CHAINS[0], *(pytest.param(chain, marks=pytest.mark.slow) for chain in CHAINS[1:])])
def test_under_other_meshes_the_next_steps_are_those_of_never_stopping(
    make_recipe: MakeRecipe, tmp_path: Path, chain: str
) -> None:
    sizes = ["train.micro_batches=2", "train.sequences=16", "model.num_layers=4", "optimizer.eps=1e-3"]
    start(make_recipe(f"out={tmp_path}/whole", *sizes))
    for number, (ranks, *keys) in enumerate(mesh.split() for mesh in chain.split(" > ")):
        recipe = make_recipe(f"out={tmp_path}/parts", *sizes, *(f"dist.{key}" for key in keys))
        work, stop_at = (run_on, 2 if number < 2 else 0) if number else (run_all, 2)
        if ranks == "1":
            work(recipe, stop_at, OneRank())
        else:
            run_on_ranks(work, recipe, stop_at, ranks=int(ranks))
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        slow("dist.ep=2"),
        slow("dist.ep=2", "dist.shares=3:1:0:2"),
        slow("dist.ep=2", "dist.zero=3"),
        slow("dist.pp=2", "dist.zero=2", "train.micro_batches=2"),
        slow("dist.tp=2", "model.moe.router.rule=gshard"),  # draws at random
        slow("dist.compression=int8"),
        slow("dist.compression=topk", "dist.layerwise=true"),
        slow("dist.compression=sign", "dist.pp=2", "train.micro_batches=2"),
        slow("dist.compression=powersgd", "dist.dp_replicate=2", "dist.ep=2"),
        slow("dist.sync=local", "dist.dp_replicate=2", "dist.zero=3"),
        slow("dist.sync=local", "dist.dp_replicate=2", "dist.compression=sign", "dist.sync_after=2"),
        ("dist.sync=diloco", "dist.dp_replicate=2", "dist.compression=int8", "dist.ep=2"),
        slow("dist.sync=diloco", "dist.dp_replicate=2", "dist.compression=powersgd", "dist.zero=2"),
        slow("dist.sync=diloco", "dist.dp_replicate=2", "dist.pp=2", "train.micro_batches=2"),
        slow("dist.sync=stale", "dist.dp_replicate=4", "dist.staleness=2"),
        slow("dist.sync=hybrid", "dist.dp_replicate=2", "dist.tp=2"),
    ],
    ids=" ".join,
)
def test_under_the_same_mesh_a_run_goes_on_bit_for_bit(
    make_recipe: MakeRecipe, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    """Also what compression owes, outer momentum, and the moments of copies that learn apart."""
    often = ("train.steps=12", "train.sequences=8", "train.evaluate_every=4", "train.checkpoint_every=4")
    for name, stop_at in (("whole", 0), ("parts", 8)):
        run_on_ranks(
            run_all, make_recipe(f"out={tmp_path}/{name}", "dist.sync_every=2", *often, *settings), stop_at, ranks=4
        )
    parts = make_recipe(f"out={tmp_path}/parts", "dist.sync_every=2", *often, *settings)
    assert len(losses(tmp_path / "parts")) == 8
    run_on_ranks(run_on, parts, ranks=4)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def said_on_return(recipe: Recipe) -> str:
    engine = engine_for(recipe)
    return Trainer(recipe, open_data(RunFolder(recipe.out).data), engine).restore(
        RunFolder(recipe.out).checkpoints()[0]
    )


def test_what_another_mesh_remembers_is_dropped_with_a_message(make_recipe: MakeRecipe) -> None:
    settings = (
        "dist.dp_replicate=2",
        "dist.sync=diloco",
        "dist.sync_every=2",
        "train.evaluate_every=2",
        "train.steps=2",
    )
    recipe = make_recipe(*settings)
    run_on_ranks(run_all, recipe, ranks=2)
    assert run_on_ranks(said_on_return, recipe, ranks=2) == ["", ""]
    said = run_on_ranks(said_on_return, make_recipe("dist.ep=2"), ranks=2)[0]
    assert "dp_replicate was 2, is 1" in said
    assert "what travels between copies and moments of other copies began anew" in said


def test_one_rank_goes_on_with_what_four_began(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    start(make_recipe(f"out={tmp_path}/one"))
    run_on_ranks(run_all, make_recipe(f"out={tmp_path}/four", "dist.ep=2"), 3, ranks=4)
    go_on(tmp_path / "four", recipe=make_recipe(f"out={tmp_path}/four"))
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def check_boxes_cover_every_number_once(recipe: Recipe) -> list[tuple[str, int]]:
    engine = engine_for(recipe)
    trainer = Trainer(recipe, open_data(recipe.out), engine)
    state = trainer.model.state_dict()
    written = [name for name in state if held_rows(state[name], engine.parts[name]).writes(engine.mesh)]
    return [(name, part.numel()) for name in written for _, _, part in pieces(name, state[name], engine.parts[name])]


def test_every_number_is_written_by_exactly_one_rank(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("dist.ep=2")
    prepare(recipe.data, recipe.out)
    written = [pair for pairs in run_on_ranks(check_boxes_cover_every_number_once, recipe, ranks=4) for pair in pairs]
    whole = Trainer(make_recipe(), open_data(recipe.out)).model.state_dict()
    for name, tensor in whole.items():
        assert sum(size for other, size in written if other == name) == tensor.numel(), name


@pytest.mark.parametrize(
    "settings",
    [
        ("dist.compression=topk", "dist.density=0.05"),
        slow("dist.compression=int8", "dist.layerwise=true"),
        slow("dist.sync=local", "dist.sync_every=3"),
        slow("dist.sync=diloco", "dist.sync_every=3", "dist.sync_after=3", "dist.compression=int8"),
        ("dist.sync=stale", "dist.sync_every=3", "dist.staleness=2"),
        ("dist.sync=hybrid", "dist.sync_every=3", "dist.dp_shard=2", "dist.ep=2"),
    ],
    ids=" ".join,
)
def test_fewer_bytes_and_later_updates_still_learn(make_recipe: MakeRecipe, settings: tuple[str, ...]) -> None:
    recipe = make_recipe("train.steps=30", "train.checkpoint_every=15", "dist.dp_replicate=2", *settings)
    evaluations = run_on_ranks(run_all, recipe, ranks=4 if "dist.dp_shard=2" in settings else 2)
    assert evaluations[0] == evaluations[-1]  # the copies have met
    assert evaluations[0].loss < 4.5  # from ln 257 = 5.55
    steps = [event for event in read_events(RunFolder(recipe.out).events) if event["event"] == "step"]
    assert steps[-1]["sent_bytes"] > 0


def test_the_layout_is_part_of_the_log(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("dist.ep=2", "train.steps=1")
    run_on_ranks(run_all, recipe, ranks=2)
    started = read_events(RunFolder(recipe.out).events)[0]
    assert started["ranks"] == f"2 ranks: {Layout(dp_shard=2, ep=2).text()}"


def test_a_mesh_that_nobody_starts_is_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError, match=r"dist asks for 4 ranks, but this is one process; .* dist.ranks=1"):
        check_alone(make_recipe("dist.pp=2", "dist.dp_shard=2"))
    check_alone(make_recipe("dist.pp=2", "dist.ranks=1"))
    check_alone(make_recipe("dist.ep=1"))
