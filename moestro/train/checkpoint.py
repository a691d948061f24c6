"""Checkpoints: a folder that is whole or absent, checked by digest, without pickled code.

    checkpoint/model.json             the ModelSpec
               model.safetensors      weights, and the router's buffers: thresholds, biases
               tokenizer.json
               origin.json            where an imported model came from         (imported models only)
               optimizer.safetensors  moments by parameter name     (a run's checkpoints only)
               state.safetensors      random state, recurrent memory (a run's checkpoints only)
               manifest.json          step, and the SHA-256 of every other file

A run on several ranks writes model-00000.safetensors and so on instead, see `train/shards.py`; everything here reads
both. An imported model has the same form without the optimiser (`train/import_folder.py`). Writing goes aside, is read
back and compared, flushed, and renamed; older checkpoints are deleted only after that.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.config import build, to_table
from moestro.core.errors import CheckpointError, ConfigError
from moestro.core.files import folder_aside, sha256_of
from moestro.core.specs import ModelSpec
from moestro.core.tokens import Tokenizer, load_tokenizer
from moestro.nn.attention import Cache
from moestro.nn.decoder import Decoder
from moestro.train.run_folder import RunFolder
from moestro.train.shards import Shards, save_checked

FORMAT = "moestro-checkpoint-1"
ORIGIN = "origin.json"
Tensors = dict[str, Tensor]


@dataclass(slots=True)
class TrainingState:
    """What a run needs beside the model to go on exactly."""

    step: int
    """Optimiser steps done."""
    moments: Tensors = field(default_factory=dict)
    other: Tensors = field(default_factory=dict)


def save_model(
    folder: Path,
    model: Decoder,
    tokenizer: Tokenizer,
    state: TrainingState | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint whole or not at all; StorageError: the disk is full; CheckpointError: it lies."""
    with folder_aside(folder) as aside:
        if origin is not None:
            (aside / ORIGIN).write_text(json.dumps(origin, indent=1))
        (aside / "model.json").write_text(json.dumps(to_table(model.spec), indent=1))
        tokenizer.save(aside / "tokenizer.json")
        parts = {"model": dict(model.state_dict())}
        if state is not None:
            parts |= {"optimizer": state.moments, "state": state.other}
        for name, tensors in parts.items():
            save_checked(aside / f"{name}.safetensors", tensors)
        digests = {path.name: sha256_of(path) for path in sorted(aside.iterdir())}
        write_manifest(aside, state.step if state else None, digests)


def write_manifest(folder: Path, step: int | None, digests: Mapping[str, str]) -> None:
    """The last file of a checkpoint: what it is, and the SHA-256 of all the others."""
    manifest = {"format": FORMAT, "step": step, "sha256": dict(sorted(digests.items()))}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def verify(folder: Path) -> Mapping[str, Any]:
    """The manifest of a checkpoint whose files all have their digest; raises CheckpointError otherwise."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {manifest['format']}; this version reads {FORMAT}")
        bad = [name for name, digest in manifest["sha256"].items() if not _has_digest(folder / name, digest)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is not a moestro checkpoint (manifest.json: {error}); moestro import reads Hugging Face folders"
        ) from error
    if bad:
        raise CheckpointError(f"{folder} is damaged: {', '.join(bad)} truncated or changed; use an earlier checkpoint")
    return dict(manifest)


def _has_digest(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_of(path) == digest


def load_spec(folder: Path) -> ModelSpec:
    """The model of a checkpoint, without its weights."""
    try:
        return build(ModelSpec, json.loads((folder / "model.json").read_text()), where=str(folder / "model.json"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not a moestro checkpoint (model.json: {error})") from error


def load_model(folder: Path) -> tuple[Decoder, Tokenizer]:
    """Model and tokenizer of a checked checkpoint, in evaluation mode."""
    verify(folder)
    model = Decoder(load_spec(folder))
    load_weights(model, folder)
    return model.eval(), load_tokenizer(folder / "tokenizer.json")


def load_weights(model: nn.Module, folder: Path) -> None:
    """Fill a model; raises CheckpointError listing every tensor that is missing, unknown or of another shape."""
    tensors = Shards(folder, "model").all()
    own = model.state_dict()
    problems = [
        f"{name} is {list(tensors[name].shape)}, not {list(own[name].shape)}"
        for name in own
        if name in tensors and own[name].shape != tensors[name].shape
    ]
    problems += [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in own]
    if problems:
        shown = "; ".join(problems[:20]) + ("; ..." if len(problems) > 20 else "")
        raise CheckpointError(f"{folder} does not fit the model, {len(problems)} tensors differ: {shown}")
    model.load_state_dict(tensors)


def capture(step: int, model: Decoder, optimizer: torch.optim.Optimizer, memory: list[list[Cache]]) -> TrainingState:
    """The state of a run between two steps."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moments = {
        f"{key}.{names[id(parameter)]}": value
        for parameter, entries in optimizer.state.items()
        for key, value in entries.items()
    }
    other = {"random": torch.get_rng_state()}
    if torch.cuda.is_available():
        other["random_cuda"] = torch.cuda.get_rng_state()
    for place, layer, cache in _numbered(memory):
        other |= {f"memory.{place}.{layer}.{i}": part for i, part in enumerate(cache.parts)}
    return TrainingState(step, moments, other)


def restore(folder: Path, model: Decoder, optimizer: torch.optim.Optimizer, memory: list[list[Cache]]) -> int:
    """Bring a run back to where `capture` saw it; returns the steps done."""
    manifest = verify(folder)
    if not isinstance(manifest.get("step"), int):
        raise CheckpointError(f"{folder} has no optimiser state; start from it with train.init={folder}")
    load_weights(model, folder)
    moments, other = Shards(folder, "optimizer").all(), Shards(folder, "state").all()
    for name, parameter in model.named_parameters():
        keys = [key for key in moments if key.partition(".")[2] == name]
        if keys:
            optimizer.state[parameter] = {key.partition(".")[0]: moments[key].to(parameter.device) for key in keys}
    torch.set_rng_state(other["random"])
    if "random_cuda" in other and torch.cuda.is_available():
        torch.cuda.set_rng_state(other["random_cuda"])
    device = next(model.parameters()).device
    for place, layer, cache in _numbered(memory):
        found = sorted(key for key in other if key.startswith(f"memory.{place}.{layer}."))
        cache.parts = tuple(other[key].to(device) for key in found)
    return int(manifest["step"])


def _numbered(memory: list[list[Cache]]) -> Iterator[tuple[int, int, Cache]]:
    """(micro-batch, layer, cache) of a recurrent model's memory."""
    for place, caches in enumerate(memory):
        for layer, cache in enumerate(caches):
            yield place, layer, cache


def keep_newest(folder: RunFolder, number: int) -> None:
    """Delete all but the newest checkpoints."""
    for old in folder.checkpoints()[number:]:
        shutil.rmtree(old)


def find_checkpoint(path: Path) -> Path:
    """The newest sound checkpoint of a run, or the folder itself where it is a checkpoint or imported model."""
    if (path / "manifest.json").exists():
        return path
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist; give the out folder of a run, a checkpoint or an imported model")
    candidates = RunFolder(path).checkpoints()
    for candidate in candidates:
        try:
            verify(candidate)
        except CheckpointError:
            continue
        return candidate
    if candidates:
        raise CheckpointError(f"all {len(candidates)} checkpoints of {path} are damaged; start anew with moestro train")
    raise CheckpointError(
        f"{path} holds no checkpoint; give the out folder of a run, a checkpoint, or a folder made by moestro import"
    )
