"""`moestro COMMAND`: one file per command beside this one; parsing and printing only, the work is elsewhere."""

import os
import sys

import typer

# Both are read once, when torch and OpenMP load: large tensors in large pages; threads that wait let others run
# (beside one busy process a spinning pool was 13 times slower than one that sleeps, docs/LOG.md).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from moestro import __version__
from moestro.cli import (
    cluster,
    doctor,
    evaluate,
    export_model,
    generate,
    import_model,
    loads,
    place,
    report,
    resume,
    train,
)
from moestro.core.errors import Error

app = typer.Typer(
    help="Sparse mixture-of-experts models from plan to device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("resume")(resume.resume)
app.command("evaluate")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("report")(report.report)
app.command("import")(import_model.import_model)
app.command("export")(export_model.export_model)
app.command("doctor")(doctor.doctor)
app.command("place")(place.place)
app.add_typer(cluster.app, name="cluster")
app.add_typer(loads.app, name="loads")


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=show_version, is_eager=True),
) -> None:
    """Sparse mixture-of-experts models from plan to device."""


def main() -> None:
    """Run a command; our own errors come out as one line, anything else is a bug and keeps its traceback."""
    try:
        app()
    except Error as error:
        print(f"moestro: {error}", file=sys.stderr)
        sys.exit(1)
