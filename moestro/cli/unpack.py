"""`moestro unpack PACKAGE OUT`: the model's files as they were before packing."""

from pathlib import Path

import typer

from moestro.cli.package_session import BASE, JSON, KEY, TRUST, keys_of, progress_bar, say, size_below, trust_of


def unpack(
    package: Path = typer.Argument(help="A package folder."),
    out: Path = typer.Argument(help="The folder to make; an existing one is never overwritten."),
    model: str = typer.Option(None, help="Which model, where the package holds several."),
    trust: list[Path] = TRUST,
    key: list[Path] = KEY,
    base: list[Path] = BASE,
    as_json: bool = JSON,
) -> None:
    """Write a model's files, bit for bit; each tensor is verified while it is written."""
    from moestro.package.pack import unpack as unpack_model

    with progress_bar("unpacking", size_below(package)) as progress:
        paths = unpack_model(
            package, out, model, trust=trust_of(trust), keys=keys_of(key), base=base or (), progress=progress
        )
    say({"out": str(out), "files": paths}, [f"{len(paths)} files in {out}"], as_json)
