"""`moestro pull URL PACKAGE OUT`: a package from a store into a folder, verified."""

from pathlib import Path

import typer

from moestro.cli.shipping import (
    ALLOW_UNSIGNED,
    AS_JSON,
    AUTHORITY,
    CERTIFICATE,
    KEY,
    TOKEN_FILE,
    TRUST,
    URL,
    Bar,
    say,
    server_of,
    trust_of,
)
from moestro.core.units import bytes_text


def pull(
    url: str = URL,
    package_id: str = typer.Argument(help="Name of the package in the store."),
    out: Path = typer.Argument(help="Folder to make; must not exist."),
    sequence: int = typer.Option(None, min=1, help="Which release; else the newest."),
    known: list[Path] = typer.Option(None, help="A package folder here whose chunks can be used. Repeatable."),
    trust: list[Path] = TRUST,
    allow_unsigned: bool = ALLOW_UNSIGNED,
    allow_expired: bool = typer.Option(False, "--allow-expired", help="Accept a release whose own date has passed."),
    token_file: Path = TOKEN_FILE,
    authority: Path = AUTHORITY,
    certificate: Path = CERTIFICATE,
    key: Path = KEY,
    as_json: bool = AS_JSON,
) -> None:
    """Fetch and verify a package; a broken pull goes on where it stopped, wrong chunks alone are fetched again."""
    import dataclasses

    from moestro.ship import pull as work

    server = server_of(url, token_file, authority, certificate, key)
    guard = work.Guard(trust=trust_of(trust, allow_unsigned), allow_expired=allow_expired)
    with Bar(as_json) as bar:
        done = work.pull(server, package_id, out, guard, sequence, known or [], bar)
    traffic, manifest = done.traffic, done.manifest
    table = {"package_id": package_id, "sequence": manifest.sequence, **dataclasses.asdict(traffic)}
    say(
        as_json,
        table | {"signed_by": done.findings.signed_by},
        [
            f"{package_id} {manifest.sequence} is in {out}: fetched {bytes_text(traffic.fetched_bytes)}, "
            f"reused {bytes_text(traffic.reused_bytes)}, from an earlier try {bytes_text(traffic.resumed_bytes)}",
            f"verified {done.findings.files} files and {done.findings.tensors} tensors",
        ],
    )
