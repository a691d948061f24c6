"""`moestro token new|list|revoke STORE`: who may read, publish or administer which packages of a store."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from moestro.ship.database import Database

app = typer.Typer(help="Tokens of a package store, on the machine where it lies.", no_args_is_help=True)
STORE = typer.Argument(help="Folder of the store.")
DATABASE = typer.Option(None, help="As serve-packages was given it.")
DAY_S = 86400


@app.command("new")
def new(
    store: Path = STORE,
    name: str = typer.Argument(help="Whose it is, for the audit log."),
    scope: list[str] = typer.Option(help="ACTION:PACKAGE with read, publish or admin, e.g. read:demo-*. Repeatable."),
    days: float = typer.Option(90, min=0.0001, max=36500, help="Days until it expires."),
    database: str = DATABASE,
) -> None:
    """Make a token and print it; it cannot be shown again."""
    from moestro.ship.tokens import new_token

    print(new_token(_database(store, database), name, scope, int(days * DAY_S)))


@app.command("list")
def show(
    store: Path = STORE,
    database: str = DATABASE,
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """List tokens without their secrets."""
    names = ("id", "name", "scopes", "created", "expires", "revoked")
    rows = _database(store, database).rows(f"SELECT {', '.join(names)} FROM token ORDER BY created, id")
    tables = [dict(zip(names, row, strict=True)) for row in rows]
    if as_json:
        print(json.dumps(tables))
        return
    for table in tables:
        state = "revoked" if table["revoked"] else _until(table["expires"])
        print(f"{table['id']}  {table['name']:20}  {', '.join(json.loads(table['scopes'])):40}  {state}")


def _until(expires: int | None) -> str:
    if expires is None:
        return "never expires"
    day = time.strftime("%Y-%m-%d", time.gmtime(expires))
    return f"expired {day}" if expires <= time.time() else f"until {day}"


@app.command("revoke")
def revoke(
    store: Path = STORE,
    token_id: str = typer.Argument(help="The id that list shows."),
    database: str = DATABASE,
) -> None:
    """Refuse a token from now on."""
    from moestro.ship.tokens import revoke_token

    revoke_token(_database(store, database), token_id)
    print(f"revoked {token_id}; a running server refuses it within 5 seconds")


def _database(store: Path, url: str | None) -> "Database":
    from moestro.core.errors import ConfigError
    from moestro.ship.database import Database as Opened

    if url is None and not (store / "store.db").exists():
        raise ConfigError(f"{store} is not a package store; start one with moestro serve-packages {store}")
    return Opened(url or f"sqlite://{(store / 'store.db').absolute()}")
