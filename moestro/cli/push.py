"""`moestro push PACKAGE URL`: upload what the store lacks, then publish."""

from pathlib import Path

import typer

from moestro.cli.shipping import AS_JSON, AUTHORITY, CERTIFICATE, KEY, TOKEN_FILE, URL, Bar, say, server_of
from moestro.core.units import bytes_text


def push(
    package: Path = typer.Argument(help="A package folder, as moestro pack makes it."),
    url: str = URL,
    token_file: Path = TOKEN_FILE,
    authority: Path = AUTHORITY,
    certificate: Path = CERTIFICATE,
    key: Path = KEY,
    as_json: bool = AS_JSON,
) -> None:
    """Publish a package; chunks that the store holds are not sent, a broken push goes on where it stopped."""
    import dataclasses

    from moestro.ship import push as work

    server = server_of(url, token_file, authority, certificate, key)
    with Bar(as_json) as bar:
        done = work.push(server, package, bar)
    state = "published" if done.is_new else "was published before"
    say(
        as_json,
        dataclasses.asdict(done),
        [
            f"{done.package_id} {done.sequence} {state}: sent {bytes_text(done.sent_bytes)}, "
            f"the store had {bytes_text(done.known_bytes)}"
        ],
    )
