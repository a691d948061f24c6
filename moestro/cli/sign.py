"""`moestro sign PACKAGE --key KEY`, `moestro to-model-signing PACKAGE OUT` and `moestro keygen FILE`: who vouches."""

from pathlib import Path

import typer

from moestro.cli.package_session import JSON, progress_bar, say, size_below


def sign(
    package: Path = typer.Argument(help="A package folder."),
    key: Path = typer.Option(help="Private signing key, made by moestro keygen."),
    as_json: bool = JSON,
) -> None:
    """Add a signature over the manifest, which names every file by digest; earlier signatures stay."""
    from moestro.package.pack import sign_package

    ids = sign_package(package, key)
    say(
        {"signatures": ids},
        [f"signed; the package carries the signatures of {', '.join(name[:16] for name in ids)}"],
        as_json,
    )


def to_model_signing(
    package: Path = typer.Argument(help="A package folder."),
    out: Path = typer.Argument(help="The signature to write, outside of the package."),
    key: Path = typer.Option(help="Private signing key of kind p256."),
    as_json: bool = JSON,
) -> None:
    """Sign all files as an in-toto statement that OpenSSF's model_signing verifies."""
    from moestro.package.intoto import to_model_signing as write_signature

    with progress_bar("hashing", size_below(package)) as progress:
        statement = write_signature(package, out, key, progress)
    check = f"model_signing verify key {package} --signature {out} --public_key {key}.pub"
    say({"out": str(out), "statement": statement}, [f"signature: {out}", f"check it with: {check}"], as_json)


def keygen(
    path: Path = typer.Argument(help="Where the private key goes; the public one goes to PATH.pub."),
    kind: str = typer.Option("ed25519", help="To sign: ed25519, p256, mldsa65. To receive: x25519, mlkem768-x25519."),
    as_json: bool = JSON,
) -> None:
    """Make a pair of keys; the private one is readable by you alone."""
    from moestro.package.keys import new_key, save_pair

    public = save_pair(new_key(kind), path)
    say({"private": str(path), "public": str(public)}, [f"private key {path} (keep it), public key {public}"], as_json)
