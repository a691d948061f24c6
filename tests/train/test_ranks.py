"""Training on several ranks learns what one rank learns: losses, gradients, weights, and what is on disk."""

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
from moestro.train.loop import go_on, start
from moestro.train.ranks import Ranks, check_alone
from moestro.train.recipe import Recipe
from moestro.train.run_folder import RunFolder
from moestro.train.trainer import Trainer

MakeRecipe = Callable[..., Recipe]
STEPS = 3


def engine_for(recipe: Recipe) -> Ranks:
    return Ranks(fit(recipe.dist, torch.distributed.get_world_size()), torch.device("cpu"), recipe)


def trained(recipe: Recipe, trainer: Trainer) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """(loss, gradient norm) of some steps, and the weights after them."""
    results = [trainer.run_step() for _ in range(STEPS)]
    return [(r.loss, r.grad_norm) for r in results], dict(trainer.model.state_dict())


def check_learns_the_same(recipe: Recipe, wanted: Any) -> None:
    engine = engine_for(recipe)
    trainer = Trainer(recipe, open_data(recipe.out), engine)
    curve, tensors = trained(recipe, trainer)
    for (loss, norm), (one_loss, one_norm) in zip(curve, wanted[0], strict=True):
        assert loss == pytest.approx(one_loss, rel=1e-6)
        assert norm == pytest.approx(one_norm, rel=1e-5)
    for name, tensor in tensors.items():
        for _, box, part in pieces(name, tensor, engine.parts[name]):
            whole = wanted[1][name][tuple(slice(*side) for side in box)]
            torch.testing.assert_close(part, whole, rtol=1e-5, atol=2e-6, equal_nan=True)


def compare(make_recipe: MakeRecipe, ranks: int, *settings: str) -> None:
    """Adam divides tiny gradients by their own size: a large eps keeps rounding from growing."""
    plain = make_recipe("optimizer.eps=1e-3", *(s for s in settings if not s.startswith("dist.")))
    if not plain.out.exists():
        prepare(plain.data, plain.out)
    wanted = trained(plain, Trainer(plain, open_data(plain.out)))
    recipe = make_recipe("optimizer.eps=1e-3", *settings)
    run_on_ranks(check_learns_the_same, recipe, wanted, ranks=ranks)


def slow(*settings: str) -> Any:
    """A case for the long suite; the quick one keeps one or two of each kind."""
    return pytest.param(settings, marks=pytest.mark.slow, id=" ".join(settings))


@pytest.mark.parametrize(
    "settings",
    [
        slow("dist.dp_replicate=4"),
        ("dist.ep=2",),
        slow("dist.ep=4"),
        ("dist.dp_replicate=2", "dist.ep=2"),
        slow("dist.ep=2", "train.recompute=true"),
        ("dist.ep=2", "train.micro_batches=2", "train.sequences=14"),
    ],
    ids=" ".join,
)
def test_data_and_expert_parallel_learn_what_one_rank_learns(
    make_recipe: MakeRecipe, settings: tuple[str, ...]
) -> None:
    compare(make_recipe, 4, *settings)


@pytest.mark.parametrize(
    "settings",
    [
        slow("dist.zero=1", "dist.ep=2", "train.micro_batches=2", "train.sequences=8"),
        slow("dist.zero=2", "dist.ep=4", "train.micro_batches=2", "train.sequences=8"),
        ("dist.zero=3", "dist.ep=2"),
        ("dist.zero=3", "dist.dp_replicate=2", "dist.ep=2", "train.recompute=true"),
    ],
    ids=" ".join,
)
def test_sharing_out_state_gradients_and_weights_changes_nothing(
    make_recipe: MakeRecipe, settings: tuple[str, ...]
) -> None:
    compare(make_recipe, 4, *settings)


@pytest.mark.parametrize(
    "settings",
    [
        ("dist.tp=2", "dist.ep=2"),
        slow("dist.tp=2", "dist.ep=4", "dist.zero=3", "model.attention.qk_norm=head"),
        ("dist.tp=2", "dist.ep=2", "dist.expert_tp=true", "model.moe.shared_width=8"),
        slow("dist.tp=2", "dist.dp_replicate=2", "model.dense_layers=[0]", "model.dense_width=24"),
        slow("dist.tp=2", "dist.zero=1", "dist.expert_tp=true", "model.attention.bias=true", "train.recompute=true"),
        (
            "dist.tp=2",
            "model.attention.kind=mla",
            "model.attention.kv_rank=8",
            "model.attention.rope_head_dim=4",
            "model.attention.head_dim=8",
        ),
    ],
    ids=" ".join,
)
def test_tensor_parallel_learns_what_one_rank_learns(make_recipe: MakeRecipe, settings: tuple[str, ...]) -> None:
    compare(make_recipe, 4, *settings)


PIPELINE = ("train.micro_batches=4", "train.sequences=8", "model.num_layers=4")


@pytest.mark.parametrize(
    "settings",
    [
        slow("dist.pp=2"),
        ("dist.pp=2", "dist.ep=2", "train.recompute=true"),
        slow("dist.pp=2", "dist.tp=2", "model.tied_head=false"),
        slow("dist.pp=2", "dist.schedule=interleaved"),
        ("dist.pp=2", "dist.ep=2", "dist.schedule=zero_bubble"),
        slow("dist.pp=4", "model.dense_layers=[0]", "model.dense_width=24"),
    ],
    ids=" ".join,
)
def test_pipelines_learn_what_one_rank_learns(make_recipe: MakeRecipe, settings: tuple[str, ...]) -> None:
    compare(make_recipe, 4, *PIPELINE, *settings)


def test_two_level_dispatch_learns_what_one_rank_learns(make_recipe: MakeRecipe) -> None:
    compare(make_recipe, 4, "dist.ep=4", "dist.dispatch=hierarchical", "dist.ranks_per_node=2")


@pytest.mark.parametrize(
    "router",
    [
        ("rule=expert_choice", "selection_bias=none"),
        slow("rule=quantile", "score=sigmoid"),
        slow("rule=topk", "selection_bias=quantile"),
        ("rule=topk", "selection_bias=loss_free", "z_loss=0.01", "score=sigmoid"),
        slow("rule=relu"),
        slow("rule=null", "num_null=2"),
        slow("rule=gap", "aux_scope=sequence"),
        ("rule=gap", "aux_scope=global"),
        ("rule=topp", "k=3", "mean_experts=1.5"),
    ],
    ids=" ".join,
)
def test_every_routing_rule_decides_as_if_it_saw_all_tokens(make_recipe: MakeRecipe, router: tuple[str, ...]) -> None:
    keys = [f"model.moe.router.{setting}" for setting in router]
    compare(make_recipe, 2, "dist.ep=2", "train.micro_batches=2", *keys)


def test_low_rank_experts_share_their_base_over_all_ranks(make_recipe: MakeRecipe) -> None:
    compare(make_recipe, 4, "dist.ep=2", "model.moe.sharing=low_rank", "model.moe.sharing_rank=4")


@pytest.mark.parametrize(
    "settings",
    [
        ("dist.shares=3:1:0:1.5", "dist.ep=2", "train.micro_batches=2", "train.sequences=14"),
        ("dist.shares=3:0:1:0", "dist.zero=3", "dist.dp_replicate=2", "dist.ep=2"),
        slow("dist.shares=0:0:1:0", "dist.ep=4", "dist.dispatch=hierarchical", "dist.ranks_per_node=2"),
        slow("dist.shares=0:1", "dist.tp=2", "dist.ep=2", "model.moe.router.aux_scope=sequence"),
        slow("dist.shares=1:0:3:1", "dist.ep=2", "model.moe.router.rule=expert_choice", "train.recompute=true"),
        slow("dist.shares=0:1:3:1", "dist.zero=1", "dist.ep=4", "model.moe.router.selection_bias=quantile"),
        slow(
            "dist.shares=0:1:1:0",
            "model.attention.kind=mla",
            "model.attention.kv_rank=8",
            "model.attention.rope_head_dim=4",
            "model.attention.head_dim=8",
        ),
    ],
    ids=" ".join,
)
def test_uneven_shares_of_the_batch_change_nothing(make_recipe: MakeRecipe, settings: tuple[str, ...]) -> None:
    compare(make_recipe, 4, *settings)


@pytest.mark.parametrize(
    "settings",
    [
        ("dist.chunks=3", "dist.ep=2", "dist.zero=3", "train.recompute=true"),
        slow("dist.chunks=2", "dist.ep=4", "dist.dispatch=hierarchical", "dist.ranks_per_node=2"),
        slow("dist.chunks=2", "dist.ep=2", "dist.tp=2", "dist.zero=1", "train.micro_batches=2"),
        slow("dist.chunks=2", "dist.ep=2", "dist.pp=2", *PIPELINE),
        slow("dist.chunks=40", "dist.ep=2", "dist.shares=3:1:0:1"),
    ],
    ids=" ".join,
)
def test_exchange_in_chunks_learns_what_one_rank_learns(make_recipe: MakeRecipe, settings: tuple[str, ...]) -> None:
    compare(make_recipe, 4, *settings)


def run_all(recipe: Recipe, stop_at: int = 0) -> Any:
    asked = iter([False] * stop_at + [True])
    stop = (lambda: next(asked)) if stop_at else (lambda: False)
    return start(recipe, stop=stop, engine=engine_for(recipe)).evaluation


def run_on(recipe: Recipe) -> Any:
    return go_on(recipe.out, engine=engine_for(recipe), recipe=recipe).evaluation


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


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("4 dist.ep=4", "2 dist.ep=2"),
        ("4 dist.pp=2 dist.ep=2 train.micro_batches=2", "2 dist.ep=2 train.micro_batches=2"),
        pytest.param("4 dist.tp=2 dist.ep=2 dist.expert_tp=true", "2 dist.ep=2", marks=pytest.mark.slow),
        pytest.param("4 dist.ep=4", "2 dist.ep=1", marks=pytest.mark.slow),
        pytest.param("2 dist.ep=1", "4 dist.ep=2", marks=pytest.mark.slow),
        pytest.param("4 dist.ep=2", "4 dist.ep=2", marks=pytest.mark.slow),
        pytest.param("4 dist.ep=2 dist.zero=3", "2 dist.ep=2", marks=pytest.mark.slow),
        pytest.param("2 dist.ep=2 dist.shares=3:1", "2 dist.ep=2 dist.shares=3:1", marks=pytest.mark.slow),
        pytest.param("2 dist.ep=2", "4 dist.ep=2 dist.zero=1", marks=pytest.mark.slow),
        pytest.param("4 dist.ep=2 dist.zero=3", "4 dist.ep=2 dist.zero=3", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_goes_on_under_another_mesh(
    make_recipe: MakeRecipe, tmp_path: Path, first: str, then: str
) -> None:
    ranks, *settings = first.split()
    run_on_ranks(run_all, make_recipe(f"out={tmp_path}/whole", *settings), ranks=int(ranks))
    out = f"out={tmp_path}/parts"
    run_on_ranks(run_all, make_recipe(out, *settings), 3, ranks=int(ranks))
    other_ranks, *other_settings = then.split()
    run_on_ranks(run_on, make_recipe(out, *other_settings), ranks=int(other_ranks))
    if first == then:
        assert losses(tmp_path / "parts") == losses(tmp_path / "whole")  # bit for bit
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


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
