"""Rows go where they are done soonest, all ranks agree on it, and what is learned stays the same."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.core.errors import ConfigError
from moestro.core.events import read_events
from moestro.dist.layout import Layout, fit
from moestro.dist.spec import DistSpec
from moestro.dist.testing import run_on_ranks
from moestro.dist.timeline import Spent
from moestro.train.checkpoint import find_checkpoint
from moestro.train.data import open_data
from moestro.train.loop import start
from moestro.train.ranks import Ranks
from moestro.train.recipe import Recipe
from moestro.train.run_folder import RunFolder
from moestro.train.shares import FIRST_STEPS, Shares, check_shares, deal
from moestro.train.trainer import Trainer

MakeRecipe = Callable[..., Recipe]


def shares(text: str, parts: int, rows: int, **dist: Any) -> Shares:
    return Shares(DistSpec(shares=text, **dist), Layout(dp_shard=parts), rows)


def steps_of(*compute_W: float) -> list[Spent]:
    """As many steps as a first cut needs, in each of which ranks computed so long."""
    second_WP = torch.tensor([[seconds, 0.0, 0.0, 0.0] for seconds in compute_W], dtype=torch.float64)
    return [Spent(step, second_WP) for step in range(FIRST_STEPS + 1)]


@pytest.mark.parametrize(
    ("text", "rows", "cut"),
    [
        ("even", 8, [2, 2, 2, 2]),
        ("even", 6, [1, 2, 1, 2]),
        ("3:1:0:4", 8, [3, 1, 0, 4]),
        ("3:1:0:4", 16, [6, 2, 0, 8]),
        ("1.5:0.5:1:1", 8, [3, 1, 2, 2]),
        ("0:0:1:0", 5, [0, 0, 5, 0]),
    ],
)
def test_rows_are_cut_as_the_recipe_says(text: str, rows: int, cut: list[int]) -> None:
    assert shares(text, 4, 8).cut(rows) == cut


def test_parts_are_neighbours() -> None:
    cut = shares("3:1:0:4", 4, 8)
    assert [cut.own(8, part) for part in range(4)] == [slice(0, 3), slice(3, 4), slice(4, 4), slice(4, 8)]


def test_rows_are_dealt_so_that_the_slowest_ends_soonest() -> None:
    assert deal(8, [1.0, 3.0]) == [6, 2]
    assert deal(9, [1.0, 1.0, 1.0]) == [3, 3, 3]
    assert deal(4, [1.0, 1.0, 100.0]) == [2, 1, 1]  # never none


def test_a_slow_part_gets_fewer_rows_and_noise_moves_none() -> None:
    measured = shares("measured", 2, 8)
    assert not measured.learn(steps_of(1.0, 3.0)[:-1])  # too few steps yet
    assert measured.learn(steps_of(1.0, 3.0)[:1])
    assert measured.cut(8) == [6, 2]
    assert not measured.learn(steps_of(1.5, 1.55) * 10)
    assert measured.cut(8) == [6, 2]


def test_work_that_does_not_depend_on_rows_leads_to_equal_times_too() -> None:
    measured, fixed_s, row_s = shares("measured", 2, 24, shares_every=1), 2.0, (0.1, 0.3)
    for _ in range(12):
        measured.learn(steps_of(*(fixed_s + s * rows for s, rows in zip(row_s, measured.cut(24), strict=True))))
    assert measured.cut(24) == pytest.approx([18, 6], abs=2)


def test_the_slowest_of_tensor_parallel_ranks_counts() -> None:
    measured = Shares(DistSpec(shares="measured"), Layout(dp_shard=2, tp=2), 8)
    assert measured.learn(steps_of(1.0, 1.0, 1.0, 3.0))
    assert measured.cut(8) == [6, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("dist.shares=3:1",), r"dist.shares is 3:1, 2 numbers; it must have 4"),
        (("dist.shares=3:1:1:1", "dist.pp=2"), r"a pipeline moves equal pieces .* choose dist.shares=even"),
        (("dist.shares=measured", "dist.dp_replicate=2", "dist.sync=local"), r"dist.sync local"),
        (("dist.shares=measured", "train.sequences=3"), r"is 3; it must be 4 or more"),
    ],
)
def test_what_cannot_be_shared_is_refused(make_recipe: MakeRecipe, settings: tuple[str, ...], message: str) -> None:
    recipe = make_recipe("dist.dp_shard=0", *settings)
    with pytest.raises(ConfigError, match=message):
        check_shares(recipe, fit(recipe.dist, 4), recipe.train.sequences)


@pytest.mark.parametrize("text", ["", "fast", "3:-1", "0:0", "3:1/0"])
def test_shares_that_are_no_numbers_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"dist.shares is .*it must be even, measured, or numbers"):
        DistSpec(shares=text)


def engine_with_a_slow_rank(recipe: Recipe) -> Ranks:
    """Rank 1 takes 20 ms more for every row."""

    class Slowed(Ranks):
        def place(self, model: Any) -> None:
            super().place(model)
            if self.mesh.rank == 1:
                model.blocks[0].register_forward_pre_hook(
                    lambda block, x: time.sleep(0.02 * len(x[0]) * block.training)
                )

    return Slowed(fit(recipe.dist, torch.distributed.get_world_size()), torch.device("cpu"), recipe)


def rows_and_losses(recipe: Recipe) -> tuple[list[int], list[float]]:
    engine = engine_with_a_slow_rank(recipe)
    start(recipe, engine=engine)
    return engine.shares.cut(recipe.train.sequences), losses(recipe.out)


def losses(root: Path) -> list[float]:
    return [event["loss"] for event in read_events(RunFolder(root).events) if event["event"] == "step"]


def go_on_and_tell_rows(recipe: Recipe) -> list[int]:
    trainer = Trainer(recipe, open_data(RunFolder(recipe.out).data), engine := engine_with_a_slow_rank(recipe))
    trainer.restore(find_checkpoint(recipe.out))
    return engine.shares.cut(8)


def test_a_slowed_rank_gets_fewer_rows_and_all_learn_the_same(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    sizes = ("train.sequences=8", "train.steps=8", "train.evaluate_every=0", "train.checkpoint_every=0")
    recipe = make_recipe(*sizes, f"out={tmp_path}/two", "dist.ep=2", "dist.shares=measured")
    (row_P, curve), (same_P, _) = run_on_ranks(rows_and_losses, recipe, ranks=2)
    assert row_P == same_P
    assert sum(row_P) == 8
    assert row_P[1] < 4
    alone = Trainer(make_recipe(*sizes), open_data(RunFolder(recipe.out).data))
    assert curve == pytest.approx([alone.run_step().loss for _ in range(8)], rel=1e-4)
    events = read_events(RunFolder(recipe.out).events)
    assert [event["rows"] for event in events if event["event"] == "shares"][-1] == row_P
    timeline = {event["step"]: event for event in events if event["event"] == "timeline"}
    assert sorted(timeline) == list(range(1, 9))
    assert timeline[3]["idle_s"][0] > timeline[3]["idle_s"][1]
    assert run_on_ranks(go_on_and_tell_rows, recipe, ranks=2) == [row_P, row_P]  # from the checkpoint
