"""What the commands on packages share: keys and trust from options, a progress bar on long work, one way to print."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moestro.core.errors import ConfigError

if TYPE_CHECKING:  # numpy and cryptography are imported by the command that needs them
    from moestro.package.encrypt import Keys, Recipient
    from moestro.package.sign import Trust

PASSWORD = "MOESTRO_PASSWORD"
"""Environment variable; a password on the command line could be read by others."""

JSON = typer.Option(False, "--json", help="Print one JSON object instead of text.")
TRUST = typer.Option(None, help="Public key (.pub) whose signature counts, or one trust.toml; may be given often.")
KEY = typer.Option(None, help=f"Private key that opens encrypted models; may be given often. Passwords: {PASSWORD}.")
BASE = typer.Option(None, help="What an update needs: the full package, then earlier updates in order.")
TO = typer.Option(None, help=f"Encrypt to this public key (.pub), or to `password` in {PASSWORD}; may be given often.")


def trust_of(paths: Sequence[Path] | None) -> "Trust | None":
    """From --trust."""
    from moestro.package.sign import Trust

    return Trust.load(paths) if paths else None


def keys_of(paths: Sequence[Path] | None) -> "Keys":
    """From --key and the environment."""
    from moestro.package.encrypt import Keys
    from moestro.package.keys import load_receiving

    return Keys([load_receiving(path) for path in paths or ()], os.environ.get(PASSWORD))


def recipients_of(words: Sequence[str] | None) -> "list[Recipient]":
    """From --to."""
    from moestro.package.encrypt import Password
    from moestro.package.keys import load_recipient

    found: list[Recipient] = []
    for word in words or ():
        if word != "password":
            found.append(load_recipient(Path(word)))
        elif os.environ.get(PASSWORD):
            found.append(Password(os.environ[PASSWORD]))
        else:
            raise ConfigError(f"--to password needs the password in the environment variable {PASSWORD}")
    return found


def size_below(*paths: Path) -> int:
    """Bytes of all files, for the end of a progress bar."""
    files = (file for path in paths for file in ([path] if path.is_file() else path.rglob("*")))
    return sum(file.stat().st_size for file in files if file.is_file())


@contextmanager
def progress_bar(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Call what it gives with each number of bytes done; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda count: bar.advance(task, count)


def say(facts: dict[str, Any], lines: Sequence[str], as_json: bool) -> None:
    """Facts for machines or lines for people."""
    print(json.dumps(facts, indent=1) if as_json else "\n".join(lines))
