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
    apply,
    cluster,
    collect_garbage,
    diff,
    doctor,
    encrypt,
    evaluate,
    export_model,
    generate,
    import_model,
    inspect_package,
    loads,
    oci,
    pack,
    place,
    plan,
    pull,
    push,
    report,
    resume,
    serve_packages,
    sign,
    token,
    train,
    unpack,
    update,
    verify,
)
from moestro.core.errors import Error

app = typer.Typer(
    help="Sparse mixture-of-experts models from plan to device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(plan.app, name="plan")
app.command("train")(train.train)
app.command("resume")(resume.resume)
app.command("evaluate")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("report")(report.report)
app.command("import")(import_model.import_model)
app.command("export")(export_model.export_model)
app.command("pack")(pack.pack)
app.command("inspect")(inspect_package.inspect)
app.command("verify")(verify.verify)
app.command("unpack")(unpack.unpack)
app.command("diff")(diff.diff)
app.command("apply")(apply.apply)
app.command("sign")(sign.sign)
app.command("to-model-signing")(sign.to_model_signing)
app.command("keygen")(sign.keygen)
app.command("encrypt")(encrypt.encrypt)
app.command("decrypt")(encrypt.decrypt)
app.command("to-oci")(oci.to_oci)
app.command("from-oci")(oci.from_oci)
app.command("serve-packages")(serve_packages.serve_packages)
app.command("collect-garbage")(collect_garbage.collect_garbage)
app.command("push")(push.push)
app.command("pull")(pull.pull)
app.command("update")(update.update)
app.command("rollback")(update.rollback)
app.command("watch")(update.watch)
app.add_typer(token.app, name="token")
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
        if os.environ.get("RANK", "0") == "0":
            print(f"moestro: {error}", file=sys.stderr)
        sys.exit(1)
