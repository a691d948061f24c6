"""`moestro resume RUN`: go on from the newest sound checkpoint."""

from pathlib import Path

import typer


def resume(run: Path = typer.Argument(help="The out folder of moestro train.")) -> None:
    """Go on with a run that was stopped or killed; on one CPU the result is the same bit for bit."""
    from moestro.cli.session import run_with_progress
    from moestro.train import loop
    from moestro.train.run_folder import RunFolder

    steps = RunFolder(run).load_recipe().train.steps
    run_with_progress(steps, lambda watcher, stop: loop.go_on(run, watcher, stop))
