"""Checkpoints are whole, checked and plain; what is damaged, foreign or does not fit is refused by name."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from moestro.core.errors import CheckpointError, ConfigError, StorageError
from moestro.core.specs import ModelSpec, MoESpec
from moestro.core.tokens import ByteTokenizer
from moestro.nn.decoder import Decoder
from moestro.train.checkpoint import find_checkpoint, load_model, load_weights, save_model, verify
from moestro.train.loop import start
from moestro.train.recipe import Recipe

SPEC = ModelSpec(num_layers=1, width=16, vocab_size=257, moe=MoESpec(num_experts=2, expert_width=8))


def saved(folder: Path, spec: ModelSpec = SPEC) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(spec).initialise()
    for router in model.routers:
        router.budget.threshold.fill_(0.125)
    save_model(folder, model, ByteTokenizer())
    return model


def test_a_model_comes_back_bit_for_bit_with_its_thresholds(tmp_path: Path) -> None:
    model = saved(tmp_path / "m")
    again, tokenizer = load_model(tmp_path / "m")
    assert again.spec == model.spec
    assert not again.training
    assert tokenizer.vocab_size == 257
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
    assert float(again.routers[0].budget.threshold) == 0.125


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "model.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damage_is_noticed(tmp_path: Path, file: str, damage: str) -> None:
    saved(tmp_path / "m")
    path = tmp_path / "m" / file
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content[:-1] if damage == "cut" else content)
    with pytest.raises(CheckpointError, match=f"is damaged: {file} truncated or changed"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("manifest", [None, "", "{}", '{"format": "other"}', "[]"])
def test_a_foreign_folder_is_refused(tmp_path: Path, manifest: str | None) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"not a moestro checkpoint|has format other|holds no checkpoint"):
        verify(find_checkpoint(tmp_path))


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent does not exist"):
        find_checkpoint(tmp_path / "absent")


def test_every_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    other = Decoder(ModelSpec(num_layers=1, width=16, vocab_size=300, dense_width=8))
    with pytest.raises(CheckpointError) as caught:
        load_weights(other, tmp_path / "m")
    message = str(caught.value)
    assert "embedding.weight is [257, 16], not [300, 16]" in message
    assert "blocks.0.feed_forward.down.weight is missing" in message
    assert "is unknown" in message


def test_no_code_is_stored(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    assert {path.suffix for path in (tmp_path / "m").iterdir()} == {".json", ".safetensors"}
    json.loads((tmp_path / "m" / "manifest.json").read_text())


def test_a_full_disk_keeps_the_old_checkpoint(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    saved(tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    said = r"cannot be written: .*nothing was overwritten"
    with pytest.raises(StorageError, match=said), full_disk(4096):
        saved(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_full_disk_in_mid_run_is_reported_and_training_goes_on(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Ear:
        def step(self, reading: object) -> None: ...
        def say(self, message: str) -> None:
            said.append(message)

    real, refused = save_model, []

    def full_once(folder: Path, *rest: object) -> None:
        if not refused:
            refused.append(folder)
            raise CheckpointError("the disk is full")
        real(folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("moestro.train.checkpoint.save_model", full_once)
    outcome = start(make_recipe(), Ear())
    assert outcome.finished
    assert "the disk is full; training goes on and tries again" in said
    assert [folder.name for folder in outcome.folder.checkpoints()] == ["step-00000006", "step-00000004"]
