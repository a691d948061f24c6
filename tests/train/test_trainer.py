"""One step: micro-batches equal the batch, a bad step changes nothing, and recomputation is exact."""

from collections.abc import Callable

import pytest
import torch

from moestro.core.errors import CheckpointError, ConfigError
from moestro.train.data import TokenData, open_data, prepare
from moestro.train.loop import start
from moestro.train.recipe import Recipe
from moestro.train.run_folder import RunFolder
from moestro.train.trainer import Trainer

MakeRecipe = Callable[..., Recipe]
MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(make_recipe: MakeRecipe) -> MakeTrainer:
    def make(*settings: str) -> Trainer:
        recipe = make_recipe(*settings)
        if not recipe.out.exists():
            prepare(recipe.data, recipe.out)
        return Trainer(recipe, data_of(recipe))

    return make


def data_of(recipe: Recipe) -> TokenData:
    return open_data(recipe.out)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("scope", ["global", "sequence"])
def test_micro_batches_learn_what_the_whole_batch_learns(make_trainer: MakeTrainer, scope: str) -> None:
    router = ["model.moe.router.aux_loss=0", f"model.moe.router.aux_scope={scope}"]
    if scope == "sequence":
        router[0] = "model.moe.router.aux_loss=0.1"
    whole, parts = make_trainer(*router), make_trainer("train.micro_batches=4", *router)
    results = [trainer.run_step() for trainer in (whole, parts)]
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-5)
    for left, right in zip(results[0].records, results[1].records, strict=True):
        assert torch.equal(left.count_E, right.count_E)
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(parts)[name], rtol=1e-3, atol=1e-4, equal_nan=True)


def test_loss_falls(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("train.steps=60")
    losses = [trainer.run_step().loss for _ in range(60)]
    assert losses[0] == pytest.approx(5.55, abs=0.1)  # ln 257: knows nothing
    assert losses[-1] < 3.0


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_changes_nothing(make_trainer: MakeTrainer, poison: float) -> None:
    trainer = make_trainer()
    trainer.run_step()
    good = trainer.model.blocks[1].attention_norm.scale_D.data.clone()
    trainer.model.blocks[1].attention_norm.scale_D.data[0] = poison
    before = weights(trainer)
    moments = {k: v.clone() for k, v in trainer.optimizer.state[trainer.model.embedding.weight].items()}
    result = trainer.run_step()
    assert not result.applied
    for name, value in weights(trainer).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(moments[k], v) for k, v in trainer.optimizer.state[trainer.model.embedding.weight].items())
    trainer.model.blocks[1].attention_norm.scale_D.data.copy_(good)
    assert trainer.run_step().applied  # and it can go on


@pytest.mark.parametrize(
    "settings", [["all"], ["experts"], ["experts", "model.moe.sharing=low_rank", "model.moe.sharing_rank=2"]]
)
def test_recomputation_gives_the_same_weights(make_trainer: MakeTrainer, settings: list[str]) -> None:
    what, *model = settings
    plain, again = make_trainer(*model), make_trainer(f"train.recompute={what}", *model)
    for trainer in (plain, again):
        for _ in range(3):
            trainer.run_step()
    for name, value in weights(plain).items():
        torch.testing.assert_close(value, weights(again)[name], rtol=0, atol=0, equal_nan=True)


def test_the_gradient_is_clipped(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("optimizer.clip=0.001")
    norms: list[float] = []
    apply = trainer.optimizer.apply

    def spy(scale: float) -> None:
        grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        norms.append(scale * float(torch.nn.utils.get_total_norm(grads)))
        apply(scale)

    trainer.optimizer.apply = spy  # type: ignore[method-assign]
    assert trainer.run_step().grad_norm > 0.01
    assert norms[0] == pytest.approx(0.001, rel=1e-3)


def test_a_batch_is_named_by_its_documents(make_trainer: MakeTrainer) -> None:
    name = make_trainer().batch_name()
    assert "of file" in name
    assert ".txt" in name


def test_training_starts_from_another_runs_weights(make_recipe: MakeRecipe) -> None:
    first = start(make_recipe("train.steps=2"))
    fresh = make_recipe("out=elsewhere", f"train.init={first.folder.root}")
    trainer = Trainer(fresh, open_data(first.folder.data))
    saved = RunFolder(first.folder.root).checkpoints()[0]
    other = Trainer(make_recipe(), open_data(first.folder.data))
    other.restore(saved)
    assert torch.equal(trainer.model.embedding.weight, other.model.embedding.weight)
    wider = make_recipe("model.width=32", f"train.init={first.folder.root}")
    with pytest.raises(CheckpointError, match=r"does not fit the model, \d+ tensors differ: .*not \["):
        Trainer(wider, open_data(first.folder.data))


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ConfigError, match="vocab_size is 100; the tokenizer has 257"):
        make_trainer("model.vocab_size=100")


def test_a_device_that_is_not_there_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ConfigError, match=r"train.device is 'warp'"):
        make_trainer("train.device=warp")
