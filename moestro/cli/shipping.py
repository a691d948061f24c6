"""What the shipping commands share: how a server is named, whom to trust, a progress bar, what to say at the end."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moestro.core.errors import ConfigError

if TYPE_CHECKING:
    from moestro.package.sign import Trust
    from moestro.ship.transport import Server

TOKEN_VARIABLE = "MOESTRO_TOKEN"

URL = typer.Argument(help="The store, for example https://models.example:8443.")
TOKEN_FILE = typer.Option(None, help=f"File with the token; else the variable {TOKEN_VARIABLE} is used.")
AUTHORITY = typer.Option(None, help="PEM file of the authority that vouches for the server, if it is self-made.")
CERTIFICATE = typer.Option(None, help="PEM certificate of this client, for servers that ask for one.")
KEY = typer.Option(None, help="PEM key of --certificate.")
TRUST = typer.Option(None, help="Public key or trust file (TOML); packages must be signed accordingly. Repeatable.")
ALLOW_UNSIGNED = typer.Option(False, "--allow-unsigned", help="Accept packages of anybody who controls the server.")
AS_JSON = typer.Option(False, "--json", help="Print one JSON object at the end, and no progress.")


def server_of(
    url: str, token_file: Path | None, authority: Path | None, certificate: Path | None = None, key: Path | None = None
) -> "Server":
    """From the options above."""
    from moestro.ship.transport import Server

    token = os.environ.get(TOKEN_VARIABLE)
    if token_file is not None:
        try:
            token = token_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--token-file {token_file} cannot be read: {error}") from error
    return Server(url=url, token=token or None, authority=authority, certificate=certificate, key=key)


def trust_of(files: Sequence[Path] | None, allow_unsigned: bool) -> "Trust | None":
    """Whom to believe; nobody must be said explicitly."""
    from moestro.package.sign import Trust

    if files:
        return Trust.load(files)
    if not allow_unsigned:
        raise ConfigError("say whose packages to believe with --trust KEY, or believe the server with --allow-unsigned")
    return None


class Bar:
    """A progress bar on the terminal's error stream; nothing where that is no terminal."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Speed

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=quiet or not console.is_terminal)
        self._task: Any = None

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, what: str, total_bytes: int) -> None:
        """Start a row."""
        self._task = self._progress.add_task(what, total=total_bytes)

    def advance(self, num_bytes: int) -> None:
        """So many bytes further."""
        if self._task is not None:
            self._progress.advance(self._task, num_bytes)


def say(as_json: bool, table: dict[str, Any], lines: Sequence[str]) -> None:
    """The result, for machines or for people."""
    print(json.dumps(table) if as_json else "\n".join(lines))
