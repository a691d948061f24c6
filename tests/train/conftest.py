"""A corpus of a few kilobytes and a model that trains on it in milliseconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moestro.core.config import build, with_overrides
from moestro.train.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Eight small text files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(8):
        lines = (f"line {i} of file {number}: {'abc' * (i % 5)}\n" for i in range(60))
        (folder / f"file{number}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def make_recipe(tmp_path: Path, corpus: Path) -> MakeRecipe:
    """A tiny recipe; settings as on the command line."""

    def make(*settings: str) -> Recipe:
        table: dict[str, Any] = {
            "out": str(tmp_path / "run"),
            "data": {"source": str(corpus), "heldout_share": 0.2},
            "model": {
                "num_layers": 2,
                "width": 16,
                "attention": {"num_heads": 2},
                "moe": {"num_experts": 4, "expert_width": 16},
            },
            "train": {
                "steps": 6,
                "length": 32,
                "sequences": 4,
                "precision": "fp32",
                "evaluate_every": 3,
                "checkpoint_every": 2,
                "tensorboard": False,
            },
            "optimizer": {"warmup_steps": 2, "lr": 0.01},
        }
        return build(Recipe, with_overrides(table, settings))

    return make
