"""Where an imported model came from: what our own form has no place for and an export should give back.

import_folder -> origin.json beside the model -> export_folder
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moestro.core.config import build
from moestro.core.errors import Error, FamilyError
from moestro.train.checkpoint import ORIGIN, find_checkpoint
from moestro.train.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What an imported model was."""

    family: str = ""
    """The family whose config.json this is."""
    dtype: str = ""
    """The type of most weights, as safetensors names it; empty where the weights are no longer the family's."""
    other_dtypes: dict[str, str] = field(default_factory=dict)
    """Tensors of another type."""
    config: dict[str, Any] = field(default_factory=dict)
    """config.json as it was."""
    files: dict[str, str] = field(default_factory=dict)
    """Texts beside it that go with the tokenizer and with generation."""
    left_out: list[str] = field(default_factory=list)
    """What the user asked to leave behind."""

    def table(self) -> dict[str, Any]:
        """The content of origin.json."""
        return asdict(self)


def load_origin(path: Path) -> Origin:
    """The origin of a model folder, or of the model that a run began with; empty for a model that began here.

    A run has changed the weights, so of its origin the types are dropped.
    """
    folder = find_checkpoint(path)
    if (folder / ORIGIN).is_file():
        return build(Origin, json.loads((folder / ORIGIN).read_text()), where=str(folder / ORIGIN))
    for root in (path, path.parent.parent):
        run = RunFolder(root)
        init = run.load_recipe().train.init if run.recipe.exists() else ""
        if init:
            return _of_ancestor(folder, Path(init))
    return Origin()


def _of_ancestor(folder: Path, init: Path) -> Origin:
    """The origin of the model a run began with, where it is still there and has the same tokens."""
    try:
        ancestor = find_checkpoint(init)
        same = (ancestor / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        return replace(load_origin(ancestor), dtype="", other_dtypes={}) if same else Origin()
    except (Error, OSError):
        return Origin()


def check_free(out: Path) -> None:
    """Raise FamilyError where a folder would be overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FamilyError(f"{out} exists already; nothing is overwritten: choose another folder, or delete it first")
