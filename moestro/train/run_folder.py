"""What a run leaves where, and what state it is in.

OUT/recipe.toml            the recipe as run, every default written out
    data/                  tokens and tokenizer
    events.jsonl           losses, evaluations, checkpoints, as they happened
    loads.trace            tokens per expert, every step
    checkpoints/step-N/    see train/checkpoint.py
    tensorboard/           the same curves for TensorBoard
    report.html
"""

import re
from dataclasses import dataclass
from pathlib import Path

from moestro.core.config import build, read_toml, save_toml
from moestro.core.errors import CheckpointError, ConfigError
from moestro.core.events import read_events
from moestro.core.files import ASIDE
from moestro.train.recipe import Recipe


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.toml"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def loads(self) -> Path:
        return self.root / "loads.trace"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def checkpoint(self, step: int) -> Path:
        """The folder of one checkpoint."""
        return self.root / "checkpoints" / f"step-{step:08d}"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, newest first."""
        found = (self.root / "checkpoints").glob("step-*")
        whole = [path for path in found if re.fullmatch(r"step-\d+", path.name) and not path.name.endswith(ASIDE)]
        return sorted(whole, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)

    def finished(self) -> bool:
        """True after the last step and its evaluation."""
        return any(event["event"] == "finished" for event in read_events(self.events))

    def create(self, recipe: Recipe) -> None:
        """Claim the folder for a new run; raises ConfigError where one is already there."""
        if self.recipe.exists():
            remedy = "look at it with moestro report" if self.finished() else f"go on with: moestro resume {self.root}"
            raise ConfigError(f"out is {self.root}, which already holds a run; {remedy}, or choose another out=FOLDER")
        if self.root.exists() and not self.root.is_dir():
            raise ConfigError(f"out is {self.root}, which is a file; choose another out=FOLDER")
        save_toml(self.recipe, recipe)

    def load_recipe(self) -> Recipe:
        """The recipe of an existing run."""
        if not self.recipe.exists():
            raise CheckpointError(f"{self.root} holds no run (no recipe.toml); give the out folder of moestro train")
        return build(Recipe, read_toml(self.recipe), where=str(self.recipe))
