"""`moestro collect-garbage STORE`: delete what no release needs; on request read everything again."""

import dataclasses
from pathlib import Path

import typer

from moestro.cli.shipping import say
from moestro.core.units import bytes_text


def collect_garbage(
    store: Path = typer.Argument(help="Folder of the store; its server may run meanwhile."),
    grace_hours: float = typer.Option(24, min=0, help="Keep what was touched within so many hours."),
    scrub: bool = typer.Option(False, "--scrub", help="Also read all files and drop damaged ones, to be pushed again."),
    database: str = typer.Option(None, help="As serve-packages was given it."),
    objects: str = typer.Option(None, help="As serve-packages was given it."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Free space in a package store."""
    from moestro.core.errors import ConfigError
    from moestro.ship.store import Store

    if database is None and not (store / "store.db").exists():
        raise ConfigError(f"{store} is not a package store; start one with moestro serve-packages {store}")
    opened = Store.open(store, database, objects)
    bad = opened.scrub() if scrub else []
    for root in bad:
        opened.drop_damaged(root)
    done = opened.collect(int(grace_hours * 3600))
    lines = [f"removed {done.objects} objects, {bytes_text(done.num_bytes)}, and {done.uploads} unfinished uploads"]
    lines += [f"damaged: file {root}; push its package again" for root in bad]
    say(as_json, dataclasses.asdict(done) | {"damaged": bad}, lines)
    if bad:
        raise typer.Exit(1)
