"""`moestro resume RUN [dist.key=value ...]`: go on from the newest sound checkpoint, on any number of ranks."""

from pathlib import Path

import typer


def resume(
    run: Path = typer.Argument(help="The out folder of moestro train."),
    settings: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="Another mesh than before, for example dist.ranks=2 dist.ep=1."
    ),
) -> None:
    """Go on with a run that was stopped or killed; on one CPU the result is the same bit for bit."""
    from moestro.cli.session import run_with_progress
    from moestro.train import loop
    from moestro.train.recipe import load_recipe
    from moestro.train.run_folder import RunFolder

    RunFolder(run).load_recipe()  # says what is wrong with the folder
    recipe = load_recipe(RunFolder(run).recipe, settings or [])
    run_with_progress(recipe, lambda watcher, stop, engine: loop.go_on(run, watcher, stop, engine, recipe))
