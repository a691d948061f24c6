"""`moestro to-oci PACKAGE OUT` and `moestro from-oci LAYOUT OUT`: packages for OCI registries."""

from pathlib import Path

import typer

from moestro.cli.package_session import JSON, progress_bar, say, size_below


def to_oci(
    package: Path = typer.Argument(help="A package folder."),
    out: Path = typer.Argument(help="The OCI image layout to make."),
    as_json: bool = JSON,
) -> None:
    """Write an OCI layout with CNCF ModelPack media types, one layer a file; push it with skopeo, oras or regctl."""
    from moestro.package.oci import to_oci as write_layout

    with progress_bar("writing", size_below(package)) as progress:
        digest = write_layout(package, out, progress)
    say({"out": str(out), "digest": digest}, [f"layout: {out}, manifest {digest}"], as_json)


def from_oci(
    layout: Path = typer.Argument(help="An OCI image layout made by to-oci, or fetched from a registry."),
    out: Path = typer.Argument(help="The package folder to make."),
    as_json: bool = JSON,
) -> None:
    """Read a package from an OCI layout; every layer and then the package is verified."""
    from moestro.package.oci import from_oci as read_layout

    with progress_bar("reading", size_below(layout)) as progress:
        read_layout(layout, out, progress)
    say(
        {"out": str(out)}, [f"package: {out}; signatures are checked by: moestro verify {out} --trust KEY.pub"], as_json
    )
