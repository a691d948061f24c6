"""Several ranks write the load trace that one rank writes, and say beside where tokens came from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moestro.dist.layout import Layout, fit, places
from moestro.dist.testing import run_on_ranks
from moestro.place.loads import read_trace
from moestro.train.data import open_data
from moestro.train.loop import go_on, start
from moestro.train.ranks import Ranks
from moestro.train.recipe import Recipe
from moestro.train.run_folder import RunFolder
from moestro.train.trainer import Trainer

MakeRecipe = Callable[..., Recipe]
SIZES = ("train.steps=4", "train.pairs_every=2", "train.sequences=8", "train.evaluate_every=0", "optimizer.eps=1e-3")


def engine_for(recipe: Recipe) -> Ranks:
    return Ranks(fit(recipe.dist, torch.distributed.get_world_size()), torch.device("cpu"), recipe)


def run_all(recipe: Recipe) -> None:
    start(recipe, engine=engine_for(recipe))


def run_on(recipe: Recipe) -> None:
    go_on(recipe.out, engine=engine_for(recipe), recipe=recipe)


def counts_of_first_rows(recipe: Recipe, rows: int) -> Any:
    """count_LE of the first step of one rank over the first rows of its batch."""
    trainer = Trainer(recipe, open_data(RunFolder(recipe.out).data))
    with torch.no_grad():
        _, records = trainer.model.train().loss(trainer.batches.at(0)[:rows])
    return np.stack([record.count_E.numpy() for record in records])


@pytest.mark.parametrize(
    ("ranks", "sources", "settings"),
    [
        (2, 2, "dist.ep=2"),
        pytest.param(4, 4, "train.micro_batches=2", marks=pytest.mark.slow),
        pytest.param(4, 2, "dist.dp_replicate=2 dist.ep=2", marks=pytest.mark.slow),
        pytest.param(4, 2, "dist.tp=2 dist.ep=4 dist.dispatch=hierarchical", marks=pytest.mark.slow),
        pytest.param(4, 2, "dist.tp=2 dist.ep=2 dist.expert_tp=true", marks=pytest.mark.slow),
        pytest.param(4, 2, "dist.pp=2 dist.ep=2 train.micro_batches=2", marks=pytest.mark.slow),
        pytest.param(2, 2, "dist.ep=2 model.moe.router.rule=gap", marks=pytest.mark.slow),
    ],
)
def test_ranks_record_what_one_rank_records_and_by_source(
    make_recipe: MakeRecipe, tmp_path: Path, ranks: int, sources: int, settings: str
) -> None:
    model = [setting for setting in settings.split() if not setting.startswith("dist.")]
    one = make_recipe(f"out={tmp_path}/one", *SIZES, *model)
    start(one)
    many = make_recipe(f"out={tmp_path}/many", *SIZES, *settings.split())
    run_on_ranks(run_all, many, ranks=ranks)
    alone, found = read_trace(RunFolder(one.out).loads), read_trace(RunFolder(many.out).loads)
    assert found.step_N.tolist() == [1, 2, 3, 4]
    assert found.pair_step_P.tolist() == [2, 4]
    np.testing.assert_array_equal(found.count_NLE[0], alone.count_NLE[0])
    np.testing.assert_allclose(found.count_NLE, alone.count_NLE, atol=2)  # rounding may tip a choice
    np.testing.assert_allclose(found.pair_PLX, alone.pair_PLX, atol=2)
    assert found.pair_PLX.sum() > 0
    assert found.source_MLSE.shape == (4, 2, sources, 4)
    assert found.merges == ("hierarchical" in settings)
    if settings == "dist.ep=2":
        np.testing.assert_array_equal(found.source_MLSE[0, :, 0], counts_of_first_rows(one, 4))


def test_one_process_is_one_source(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("train.pairs_every=0", "train.steps=2")
    start(recipe)
    trace = read_trace(RunFolder(recipe.out).loads)
    assert trace.source_MLSE.shape == (2, 2, 1, 4)
    assert not len(trace.pair_step_P)


@pytest.mark.slow
def test_a_trace_goes_on_under_another_mesh(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    whole, recipe = make_recipe(f"out={tmp_path}/whole", *SIZES), make_recipe(f"out={tmp_path}/parts", *SIZES)
    start(whole)
    asked = iter([False, False, True])
    start(recipe, stop=lambda: next(asked))
    other = make_recipe(f"out={tmp_path}/parts", *SIZES, "dist.ep=2")
    run_on_ranks(run_on, other, ranks=2)
    trace, wanted = read_trace(RunFolder(recipe.out).loads), read_trace(RunFolder(whole.out).loads)
    assert trace.step_N.tolist() == [1, 2, 3, 4]
    assert trace.source_MLSE.shape[::2] == (2, 2)  # what two ranks recorded
    np.testing.assert_allclose(trace.count_NLE, wanted.count_NLE, atol=2)
    np.testing.assert_allclose(trace.pair_PLX, wanted.pair_PLX, atol=2)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout(dp_shard=4), 0),
        (Layout(dp_shard=4, ep=4), 4),
        (Layout(dp_replicate=2, dp_shard=4, ep=2), 2),
        (Layout(dp_shard=2, tp=2, ep=4), 2),
        (Layout(dp_shard=2, tp=4, ep=2), 1),
        (Layout(dp_shard=4, tp=2, ep=4, expert_tp=True), 4),
    ],
)
def test_places_of_an_expert_group_with_tokens_of_their_own(layout: Layout, expected: int) -> None:
    assert places(layout) == expected
    groups, parts = layout.groups("ep"), layout.groups("tp")  # a group of tp shares the tokens of one part
    for group in groups if expected else ():
        part_of = {rank: number % layout.dp for number, ranks in enumerate(parts) for rank in ranks}
        own = [part_of[rank] % expected for rank in group]
        assert own == [place * expected // len(group) for place in range(len(group))]
