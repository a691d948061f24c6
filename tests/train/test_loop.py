"""A run ends whole whatever happens: stopped and resumed anywhere it gives the same bits as undisturbed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moestro.core.errors import CheckpointError, ConfigError, TrainingError
from moestro.core.events import read_events
from moestro.nn.kernels import gpu
from moestro.place.loads import read_loads
from moestro.train.loop import ended, go_on, start
from moestro.train.progress import Silent
from moestro.train.recipe import Recipe
from moestro.train.run_folder import RunFolder
from moestro.train.shards import Shards, _same_bytes

MakeRecipe = Callable[..., Recipe]


def losses(folder: RunFolder) -> list[float]:
    return [event["loss"] for event in read_events(folder.events) if event["event"] == "step"]


def stop_after(steps: int) -> Callable[[], bool]:
    asked = iter([False] * steps + [True])
    return lambda: next(asked)


def final_tensors(folder: RunFolder) -> dict[str, torch.Tensor]:
    newest = folder.checkpoints()[0]
    files = ("model", "optimizer", "state")
    return {f"{file}.{k}": v for file in files for k, v in Shards(newest, file).all().items()}


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(_same_bytes(left[k], right[k]) for k in left)


VARIANTS = {
    "gap": [],
    "gshard draws at random": ["model.moe.router.rule=gshard", "train.micro_batches=2", "train.recompute=all"],
    "recurrent memory": ["model.attention.kind=transformer_xl", "model.attention.memory_length=40"],
    "biases and cut-offs": ["model.moe.router.rule=quantile", "model.moe.router.selection_bias=loss_free"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_run_goes_on_bit_for_bit(make_recipe: MakeRecipe, tmp_path: Path, variant: str) -> None:
    whole = start(make_recipe(f"out={tmp_path}/whole", *VARIANTS[variant]))
    for stop in range(0, 6, 2 if variant != "gap" else 1):
        recipe = make_recipe(f"out={tmp_path}/stop{stop}", *VARIANTS[variant])
        torch.manual_seed(999)  # whatever the process did before
        first = start(recipe, stop=stop_after(stop))
        assert (first.finished, first.step) == (False, stop)
        torch.manual_seed(123)
        second = go_on(recipe.out)
        assert second.finished
        assert losses(second.folder) == losses(whole.folder)
        assert same_bits(final_tensors(second.folder), final_tensors(whole.folder))
        assert second.evaluation == whole.evaluation
        read = ended(recipe.out)  # by ranks that are started again after the last step
        assert (read.step, read.evaluation, read.compressors) == (second.step, second.evaluation, second.compressors)


def test_a_killed_run_goes_on_from_its_last_checkpoint(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    whole = start(make_recipe(f"out={tmp_path}/whole"))
    recipe = make_recipe()

    class Killed(BaseException):
        pass

    steps = iter(range(6))

    def kill() -> bool:
        if next(steps) == 5:  # after step 5; the last checkpoint is of step 4
            raise Killed
        return False

    with pytest.raises(Killed):
        start(recipe, stop=kill)
    again = go_on(recipe.out)
    assert losses(again.folder) == losses(whole.folder)
    assert same_bits(final_tensors(again.folder), final_tensors(whole.folder))
    steps_N, count_NLE = read_loads(again.folder.loads)
    assert steps_N.tolist() == [1, 2, 3, 4, 5, 6]
    assert torch.equal(torch.from_numpy(count_NLE), torch.from_numpy(read_loads(whole.folder.loads)[1]))


def test_a_damaged_checkpoint_is_passed_over(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    whole = start(make_recipe(f"out={tmp_path}/whole"))
    recipe = make_recipe()
    start(recipe, stop=stop_after(5))
    newest = RunFolder(recipe.out).checkpoints()[0]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])

    said: list[str] = []

    class Ear:
        def step(self, reading: object) -> None: ...
        def say(self, message: str) -> None:
            said.append(message)

    again = go_on(recipe.out, Ear())
    assert "step-00000005 is damaged; going on from step-00000004" in said
    assert losses(again.folder) == losses(whole.folder)


def test_when_every_checkpoint_is_damaged_it_says_so(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    start(recipe, stop=stop_after(5))
    for folder in RunFolder(recipe.out).checkpoints():
        (folder / "state.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints of .* are damaged"):
        go_on(recipe.out)


def test_a_run_is_never_overwritten(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    start(recipe, stop=stop_after(1))
    with pytest.raises(ConfigError, match=r"already holds a run; go on with: moestro resume .*, or choose another out"):
        start(recipe)
    go_on(recipe.out)
    with pytest.raises(ConfigError, match="already holds a run; look at it with moestro report"):
        start(recipe)
    with pytest.raises(TrainingError, match=r"is finished \(6 steps\)"):
        go_on(recipe.out)


def test_a_recipe_that_cannot_start_leaves_the_folder_free(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError, match=r"train.length is 99999"):
        start(make_recipe("train.length=99999"))
    assert start(make_recipe()).finished


def test_resuming_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no run \(no recipe.toml\)"):
        go_on(tmp_path)


def test_only_the_newest_checkpoints_are_kept(make_recipe: MakeRecipe) -> None:
    outcome = start(make_recipe("train.keep_checkpoints=2", "train.checkpoint_every=1"))
    assert [folder.name for folder in outcome.folder.checkpoints()] == ["step-00000006", "step-00000005"]


def poisoned(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the loss of some steps not finite by a poisoned token embedding, as an overflow would."""
    from moestro.train.trainer import Trainer

    run_step = Trainer.run_step

    def run(self: Trainer) -> object:
        scale = self.model.norm.scale_D
        kept = scale.detach().clone()
        if self.step in steps:
            scale.data[0] = torch.nan
        result = run_step(self)
        if not result.applied:
            scale.data.copy_(kept)
        return result

    monkeypatch.setattr(Trainer, "run_step", run)


def test_a_bad_batch_is_skipped_and_named(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe()
    poisoned(recipe, monkeypatch, {2})
    outcome = start(recipe)
    assert outcome.finished
    events = read_events(outcome.folder.events)
    skipped = [event for event in events if event["event"] == "skipped"]
    assert [event["step"] for event in skipped] == [3]
    assert ".txt" in skipped[0]["batch"]
    assert skipped[0]["loss"] == "nan"
    assert len(losses(outcome.folder)) == 5


def test_a_bad_batch_stops_the_run_where_the_recipe_says_so(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("train.on_nan=stop")
    poisoned(recipe, monkeypatch, {2})
    with pytest.raises(TrainingError, match=r"step 3 was not applied: loss nan.*batch: tokens .*txt.*on_nan=skip"):
        start(recipe)
    assert RunFolder(recipe.out).checkpoints()[0].name == "step-00000002"


def test_too_many_bad_batches_stop_the_run(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe("train.steps=40", "train.checkpoint_every=0", "train.evaluate_every=0")
    poisoned(recipe, monkeypatch, set(range(3, 40)))
    with pytest.raises(TrainingError, match=r"20 steps in a row: lower optimizer.lr"):
        start(recipe)


def test_the_log_holds_what_the_report_needs(make_recipe: MakeRecipe) -> None:
    outcome = start(make_recipe())
    events = read_events(outcome.folder.events)
    kinds = [event["event"] for event in events]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert kinds.count("evaluation") == 2
    step = next(event for event in events if event["event"] == "step")
    assert {
        "loss",
        "bits_per_byte",
        "lr",
        "tokens_per_s",
        "experts",
        "busiest_over_mean",
        "entropy",
        "threshold",
    } <= step.keys()
    assert len(step["experts"]) == 2
    _, count_NLE = read_loads(outcome.folder.loads)
    assert count_NLE.shape == (6, 2, 4)
    assert (count_NLE[0].sum(1) == 2 * 4 * 32).all()  # the budget starts at two experts


def test_a_dense_model_trains_too(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("model.dense_layers=[0, 1]", "model.dense_width=32")
    outcome = start(recipe)
    assert outcome.finished
    assert not outcome.folder.loads.exists()


class Listener(Silent):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def test_a_run_says_that_it_cannot_use_8_bits(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "why_not", lambda *_: "")  # as on a GPU: what is left are the widths
    listener = Listener()
    start(make_recipe("train.steps=1", "train.precision=fp8"), listener)
    told = [said for said in listener.said if "fp8" in said]
    assert told == ["train.precision is fp8, but experts stay in bfloat16: widths [16, 16] are not multiples of 128"]
