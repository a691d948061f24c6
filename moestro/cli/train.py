"""`moestro train RECIPE [key=value ...]`: train a model and leave a run folder with a report."""

from pathlib import Path

import typer


def train(
    recipe: Path = typer.Argument(help="A TOML file, for example recipes/demo.toml."),
    settings: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="Any key of the recipe, for example out=runs/mine train.steps=30."
    ),
) -> None:
    """Train a mixture-of-experts language model.

    Ctrl-C saves a checkpoint and says how to go on; a second Ctrl-C ends at once.
    """
    from moestro.cli.session import run_with_progress
    from moestro.train import loop
    from moestro.train.recipe import load_recipe

    checked = load_recipe(recipe, settings or [])
    run_with_progress(checked.train.steps, lambda watcher, stop: loop.start(checked, watcher, stop))
