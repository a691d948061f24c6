"""`moestro encrypt PACKAGE OUT --to KEY` and `moestro decrypt PACKAGE OUT --key KEY`."""

from pathlib import Path

import typer

from moestro.cli.package_session import JSON, KEY, TO, keys_of, progress_bar, recipients_of, say, size_below
from moestro.core.units import bytes_text


def encrypt(
    package: Path = typer.Argument(help="A package in clear, or with --rewrap an encrypted one."),
    out: Path = typer.Argument(help="The encrypted package to make."),
    to: list[str] = TO,
    rewrap: bool = typer.Option(False, help="Open PACKAGE with --key and wrap its data key for --to; data stays."),
    key: list[Path] = KEY,
    suite: str = typer.Option("A256GCM", help="A256GCM, SM4GCM or C20P1305."),
    as_json: bool = JSON,
) -> None:
    """Encrypt the models of a package; names, shapes and numbers can be read by the recipients only. Sign it anew."""
    from moestro.package import reseal

    with progress_bar("encrypting", size_below(package)) as progress:
        if rewrap:
            manifest = reseal.rewrap(package, out, keys_of(key), recipients_of(to), progress)
        else:
            manifest = reseal.encrypt(package, out, recipients_of(to), suite, progress)
    say({"out": str(out), "bytes": manifest.size}, [f"package: {out}, {bytes_text(manifest.size)}"], as_json)


def decrypt(
    package: Path = typer.Argument(help="An encrypted package."),
    out: Path = typer.Argument(help="The package in clear to make."),
    key: list[Path] = KEY,
    as_json: bool = JSON,
) -> None:
    """Decrypt the models of a package; gives the bytes it had before it was encrypted."""
    from moestro.package.reseal import decrypt as decrypt_package

    with progress_bar("decrypting", size_below(package)) as progress:
        manifest = decrypt_package(package, out, keys_of(key), progress)
    say({"out": str(out), "bytes": manifest.size}, [f"package: {out}, {bytes_text(manifest.size)}"], as_json)
