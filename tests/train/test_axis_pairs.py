"""Every axis, and every pair of axes, learns what one rank learns: losses, gradients and weights, to 1e-6.

The table of pairs is `PAIRS`: 67 of them on 4 or 8 ranks, uneven batches where the mesh allows them. A few run always,
all with -m slow. No pair is refused.
"""

import math
from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.core.errors import ConfigError
from moestro.dist.layout import fit
from moestro.dist.shard import pieces
from moestro.dist.testing import run_on_ranks
from moestro.train.data import open_data, prepare
from moestro.train.ranks import Ranks, check_pipeline
from moestro.train.recipe import Recipe
from moestro.train.trainer import Trainer

MakeRecipe = Callable[..., Recipe]
STEPS = 3
CLOSE = 1e-6

KINDS = {
    "pp": {
        "pp 1f1b": "pp=2",
        "pp interleaved": "pp=2 schedule=interleaved",
        "pp zero_bubble": "pp=2 schedule=zero_bubble",
    },
    "copies": {"dp_replicate": "dp_replicate=2"},
    "shards": {
        "dp_shard": "dp_shard=2",
        "zero 1": "dp_shard=2 zero=1",
        "zero 2": "dp_shard=2 zero=2",
        "zero 3": "dp_shard=2 zero=3",
    },
    "tp": {"tp": "tp=2", "expert_tp": "tp=2 expert_tp=true ranks_per_node=2"},
    "experts": {
        "ep": "dp_shard=2 ep=2",
        "hierarchical": "dp_shard=4 ep=4 dispatch=hierarchical ranks_per_node=2",
    },
    "recompute": {"recompute": "recompute=all", "recompute experts": "recompute=experts"},
}
"""Axes of one kind exclude each other."""
AXES = {name: settings for kind in KINDS.values() for name, settings in kind.items()}
PAIRS = [pair for one, other in combinations(KINDS.values(), 2) for pair in product(one, other)]
QUICK = {("pp 1f1b", "zero 3"), ("pp zero_bubble", "ep"), ("zero 3", "expert_tp")}


def recipe_settings(*axes: str) -> tuple[int, list[str]]:
    """(ranks, settings) of these axes together: sizes multiply; fewer than 4 ranks get copies."""
    keys: dict[str, str] = {}
    for axis in axes:
        for key, value in (setting.split("=") for setting in AXES[axis].split()):
            keys[key] = str(int(keys.get(key, 1)) * int(value)) if value.isdigit() and key != "zero" else value
    sizes = {key: int(keys.get(key, 1)) for key in ("pp", "dp_replicate", "dp_shard", "tp")}
    more = max(4 // math.prod(sizes.values()), 1)
    copies = sizes["dp_replicate"] * more
    parts = copies * sizes["dp_shard"]
    recompute = keys.pop("recompute", "none")
    settings = [f"dist.{key}={value}" for key, value in (keys | {"dp_replicate": str(copies)}).items()]
    pipeline = [f"train.sequences={4 * parts}", "train.micro_batches=4", "model.num_layers=4"]
    plain = [f"train.sequences={2 * parts + 2}", "train.micro_batches=2"]  # one part of the batch has two rows
    settings += [*(pipeline if "pp" in keys else plain), f"train.recompute={recompute}"]
    return math.prod(sizes.values()) * more, settings


def slow(*settings: str) -> Any:
    """A case for the long suite; the quick one keeps one or two of each kind."""
    return pytest.param(settings, marks=pytest.mark.slow, id=" ".join(settings))


def engine_for(recipe: Recipe) -> Ranks:
    return Ranks(fit(recipe.dist, torch.distributed.get_world_size()), torch.device("cpu"), recipe)


def trained(recipe: Recipe, trainer: Trainer) -> tuple[list[tuple[float, float]], dict[str, Tensor], dict[str, Tensor]]:
    """(loss, gradient norm) of some steps, the first step's gradients, and the weights after the last."""
    gradients: dict[str, Tensor] = {}

    before = trainer.engine.before_update

    def remember() -> None:
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                gradients.setdefault(name, parameter.grad.clone())
        before()

    trainer.engine.before_update = remember  # type: ignore[method-assign]
    results = [trainer.run_step() for _ in range(STEPS)]
    return [(r.loss, r.grad_norm) for r in results], gradients, dict(trainer.model.state_dict())


def check_learns_the_same(recipe: Recipe, wanted: Any) -> None:
    engine = engine_for(recipe)
    trainer = Trainer(recipe, open_data(recipe.out), engine)
    curve, *states = trained(recipe, trainer)
    for (loss, norm), (one_loss, one_norm) in zip(curve, wanted[0], strict=True):
        assert loss == pytest.approx(one_loss, rel=CLOSE)
        assert norm == pytest.approx(one_norm, rel=CLOSE)
    assert states[0].keys() == engine.parameters.keys()  # every weight had a gradient
    for tensors, wholes in zip(states, wanted[1:], strict=True):
        for name, tensor in tensors.items():
            for _, box, part in pieces(name, tensor, engine.parts[name]):
                whole = wholes.get(name, torch.zeros(engine.parts[name].shape))  # no token came to any of these experts
                largest = float(whole[whole.isfinite()].abs().max()) if whole.isfinite().any() else 0.0
                own = whole[tuple(slice(*side) for side in box)]
                torch.testing.assert_close(
                    part,
                    own,
                    rtol=0,
                    atol=CLOSE * largest,
                    equal_nan=True,
                    msg=lambda text, name=name: f"{name}: {text}",
                )


def compare(make_recipe: MakeRecipe, ranks: int, *settings: str) -> None:
    """Adam divides tiny gradients by their own size: a large eps keeps rounding from growing."""
    plain = make_recipe("optimizer.eps=1e-3", *(s for s in settings if not s.startswith("dist.")))
    if not plain.out.exists():
        prepare(plain.data, plain.out)
    wanted = trained(plain, Trainer(plain, open_data(plain.out)))
    recipe = make_recipe("optimizer.eps=1e-3", *settings)
    run_on_ranks(check_learns_the_same, recipe, wanted, ranks=ranks)


@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, marks=[] if pair in QUICK else pytest.mark.slow, id=" x ".join(pair)) for pair in PAIRS],
)
def test_every_pair_of_axes_learns_what_one_rank_learns(make_recipe: MakeRecipe, pair: tuple[str, str]) -> None:
    ranks, settings = recipe_settings(*pair)
    assert ranks in (4, 8)
    compare(make_recipe, ranks, *settings)


LOW_RANK = ("model.moe.sharing=low_rank", "model.moe.sharing_rank=4")
SYNC = ("dist.dp_replicate=2", "dist.sync_every=3", "dist.outer_lr=0.5")
INNER = {
    name: AXES[name] for kind in ("pp", "shards", "tp", "experts") for name in KINDS[kind] if name != "hierarchical"
}


def check_copy_learns_the_same(recipe: Recipe, wanted: list[Any]) -> None:
    check_learns_the_same(recipe, wanted[engine_for(recipe).mesh["dp_replicate"].index])


def trained_apart(recipe: Recipe) -> Any:
    return trained(recipe, Trainer(recipe, open_data(recipe.out), engine_for(recipe)))


@pytest.mark.parametrize(
    ("sync", "inner"),
    [
        pytest.param(*pair, marks=[] if pair == ("diloco", "zero 3") else pytest.mark.slow)
        for pair in product(("local", "diloco", "stale", "hybrid"), INNER)
    ],
)
def test_copies_learn_the_same_apart_whatever_each_is_made_of(make_recipe: MakeRecipe, sync: str, inner: str) -> None:
    compare_apart(make_recipe, sync, *(f"dist.{setting}" for setting in INNER[inner].split()))


@pytest.mark.slow
@pytest.mark.parametrize("inner", [("dist.tp=2", "model.attention.qk_norm=head"), ("dist.ep=2", *LOW_RANK)])
def test_weights_that_all_ranks_of_a_copy_share_learn_apart_too(
    make_recipe: MakeRecipe, inner: tuple[str, ...]
) -> None:
    compare_apart(make_recipe, "local", *inner)


def compare_apart(make_recipe: MakeRecipe, sync: str, *inner: str) -> None:
    """Two copies of two ranks as two copies of one rank; hybrid is stale between copies of several ranks."""
    model = [setting for setting in inner if setting.startswith("model.")]
    sizes = ["optimizer.eps=1e-3", "train.sequences=16", "train.micro_batches=4", "model.num_layers=4", *SYNC, *model]
    single = make_recipe(*sizes, f"dist.sync={'stale' if sync == 'hybrid' else sync}")
    prepare(single.data, single.out)
    wanted = run_on_ranks(trained_apart, single, ranks=2)
    several = make_recipe(*sizes, f"dist.sync={sync}", *inner)
    run_on_ranks(check_copy_learns_the_same, several, wanted, ranks=4)


def digests(recipe: Recipe) -> list[tuple[str, Any, bytes]]:
    """(name, box, numbers) of everything this rank holds after some steps and a meeting."""
    engine = engine_for(recipe)
    trainer = Trainer(recipe, open_data(recipe.out), engine)
    for _ in range(5):
        trainer.run_step()
    engine.meet()
    state = trainer.model.state_dict()
    return [
        (name, box, part.contiguous().numpy().tobytes())
        for name, tensor in state.items()
        for _, box, part in pieces(name, tensor, engine.parts[name])
    ]


@pytest.mark.parametrize(
    "settings",
    [
        slow("dist.compression=topk", "dist.tp=2", "dist.ep=2"),
        slow("dist.compression=sign", "dist.pp=2", "train.micro_batches=2", "dist.layerwise=true"),
        slow("dist.compression=powersgd", "dist.tp=2", "dist.expert_tp=true"),
        ("dist.compression=int8", "dist.sync=diloco", "dist.dp_replicate=2", "dist.ep=2", "dist.sync_every=2"),
        slow("dist.compression=topk", "dist.sync=local", "dist.dp_replicate=2", "dist.pp=2", "train.micro_batches=2"),
        slow("dist.compression=int8", "dist.sync=local", "dist.dp_replicate=2", "dist.tp=2", "dist.sync_every=2"),
        slow("dist.sync=hybrid", "dist.dp_replicate=2", "dist.tp=2"),
    ],
    ids=" ".join,
)
def test_ranks_that_hold_the_same_weights_keep_them_equal_to_the_bit(
    make_recipe: MakeRecipe, settings: tuple[str, ...]
) -> None:
    recipe = make_recipe("train.sequences=8", "dist.density=0.1", *settings)
    prepare(recipe.data, recipe.out)
    seen: dict[tuple[str, Any], bytes] = {}
    for name, box, numbers in (held for rank in run_on_ranks(digests, recipe, ranks=4) for held in rank):
        assert seen.setdefault((name, box), numbers) == numbers, f"{name} {box}"


@pytest.mark.slow
@pytest.mark.parametrize("axis", AXES)
def test_every_axis_alone_learns_what_one_rank_learns(make_recipe: MakeRecipe, axis: str) -> None:
    ranks, settings = recipe_settings(axis)
    compare(make_recipe, ranks, *settings)


@pytest.mark.parametrize(
    "settings",
    [
        slow("dist.tp=2", "dist.ep=4", "dist.zero=3", "model.attention.qk_norm=head"),
        ("dist.tp=2", "dist.ep=2", "dist.expert_tp=true", "model.moe.shared_width=8"),
        slow("dist.tp=2", "dist.dp_replicate=2", "model.dense_layers=[0]", "model.dense_width=24"),
        slow("dist.tp=2", "dist.zero=1", "dist.expert_tp=true", "model.attention.bias=true", "train.recompute=all"),
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
def test_every_kind_of_layer_splits_by_columns(make_recipe: MakeRecipe, settings: tuple[str, ...]) -> None:
    compare(make_recipe, 4, *settings)


PIPELINE = ("train.micro_batches=4", "train.sequences=8", "model.num_layers=4")


@pytest.mark.parametrize(
    "settings",
    [
        slow("dist.pp=2", "dist.tp=2", "dist.zero=3", "model.tied_head=false"),
        slow("dist.pp=4", "model.dense_layers=[0]", "model.dense_width=24"),
        slow("dist.pp=2", "dist.ep=2", "dist.schedule=interleaved", "model.moe.router.aux_scope=global"),
    ],
    ids=" ".join,
)
def test_every_kind_of_model_fits_a_pipeline(make_recipe: MakeRecipe, settings: tuple[str, ...]) -> None:
    compare(make_recipe, 4, *PIPELINE, *settings)


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
    compare(make_recipe, 4, "dist.ep=2", *LOW_RANK)


@pytest.mark.parametrize(
    "settings",
    [
        ("dist.shares=3:1:0:1.5", "dist.ep=2", "train.micro_batches=2", "train.sequences=14"),
        ("dist.shares=3:0:1:0", "dist.zero=3", "dist.dp_replicate=2", "dist.ep=2"),
        slow("dist.shares=0:0:1:0", "dist.ep=4", "dist.dispatch=hierarchical", "dist.ranks_per_node=2"),
        slow("dist.shares=0:1", "dist.tp=2", "dist.ep=2", "model.moe.router.aux_scope=sequence"),
        slow("dist.shares=1:0:3:1", "dist.ep=2", "model.moe.router.rule=expert_choice", "train.recompute=all"),
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
        ("dist.chunks=3", "dist.ep=2", "dist.zero=3", "train.recompute=all"),
        slow("dist.chunks=2", "dist.ep=4", "dist.dispatch=hierarchical", "dist.ranks_per_node=2"),
        slow("dist.chunks=2", "dist.ep=2", "dist.tp=2", "dist.zero=1", "train.micro_batches=2"),
        slow("dist.chunks=2", "dist.ep=2", "dist.pp=2", *PIPELINE),
        slow("dist.chunks=40", "dist.ep=2", "dist.shares=3:1:0:1"),
    ],
    ids=" ".join,
)
def test_exchange_in_chunks_learns_what_one_rank_learns(make_recipe: MakeRecipe, settings: tuple[str, ...]) -> None:
    compare(make_recipe, 4, *settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "dist.pp=2 train.micro_batches=2 train.recompute=all model.moe.router.aux_scope=global",
            "recompute is all with dist.pp 2",
        ),
        ("dist.pp=4 train.micro_batches=2", "micro_batches is 2; it must be at least dist.pp = 4"),
        ("dist.pp=2 train.micro_batches=2 train.sequences=6", "micro_batches is 3; with dist.pp it must be a multiple"),
        ("dist.zero=1 dist.compression=int8", "compression is int8 with dist.zero 1"),
        ("dist.sync=local", "dp_replicate 1; it needs 2 or more copies"),
        ("dist.sync=hybrid dist.dp_replicate=4 dist.dp_shard=1", "a copy is one rank; use dist.sync=stale"),
        ("dist.sync=stale dist.dp_replicate=2 train.checkpoint_every=2", "must be multiples of dist.sync_every = 16"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(make_recipe: MakeRecipe, settings: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(lambda: make_recipe(*settings.split()))


def check(make: Callable[[], Recipe]) -> None:
    recipe = make()
    check_pipeline(recipe, fit(recipe.dist, 4), recipe.train.sequences // recipe.train.micro_batches)
