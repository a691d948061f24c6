"""`moestro train RECIPE [key=value ...]`: train a model and leave a run folder with a report."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from moestro.train.engine import Engine
    from moestro.train.loop import Outcome, Stop
    from moestro.train.progress import Watcher


def train(
    recipe: Path = typer.Argument(help="A TOML file, for example recipes/demo.toml."),
    settings: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="Any key of the recipe, for example out=runs/mine train.steps=30."
    ),
) -> None:
    """Train a mixture-of-experts language model, on one rank, on dist.ranks=N ranks here, or under torchrun.

    Ctrl-C saves a checkpoint and says how to go on; a second Ctrl-C ends at once.
    """
    from moestro.cli.session import run_with_progress
    from moestro.train import loop
    from moestro.train.recipe import load_recipe
    from moestro.train.run_folder import RunFolder

    checked = load_recipe(recipe, settings or [])

    def work(watcher: "Watcher", stop: "Stop", engine: "Engine") -> "Outcome":
        folder = RunFolder(checked.out)
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # a rank was lost, and all began anew
        if restarted and engine.first(folder.finished):  # it was lost after the last step
            return loop.ended(checked.out)
        if restarted and engine.first(folder.recipe.exists):
            return loop.go_on(checked.out, watcher, stop, engine, checked)
        return loop.start(checked, watcher, stop, engine)

    run_with_progress(checked, work)
