"""`moestro verify PACKAGE`: is every byte what was promised, and by whom?"""

from pathlib import Path

import typer

from moestro.cli.package_session import BASE, JSON, KEY, TRUST, keys_of, progress_bar, say, size_below, trust_of
from moestro.core.units import bytes_text


def verify(
    package: Path = typer.Argument(help="A package folder."),
    trust: list[Path] = TRUST,
    key: list[Path] = KEY,
    base: list[Path] = BASE,
    as_json: bool = JSON,
) -> None:
    """Check signature, every file, every tensor; ends with status 1 and one line at the first thing that is wrong."""
    from moestro.package.pack import verify as verify_package

    with progress_bar("verifying", size_below(package)) as progress:
        found = verify_package(package, trust_of(trust), keys_of(key), base or (), progress)
    lines = [f"good: {found.files} files, {bytes_text(found.num_bytes)}, {found.tensors} tensors"]
    lines += [f"not looked into: {line}" for line in found.unread]
    lines += [f"signed by {keyid}" for keyid in found.signed_by]
    lines += [] if trust else ["signature not asked for; anybody could have made this package: give --trust"]
    facts = {
        "good": True,
        "files": found.files,
        "bytes": found.num_bytes,
        "tensors": found.tensors,
        "unread": found.unread,
        "signed_by": found.signed_by,
    }
    say(facts, lines, as_json)
