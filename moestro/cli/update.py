"""`moestro update URL PACKAGE HOME`, `rollback PACKAGE HOME`, `watch URL PACKAGE HOME`: versions on a device."""

import dataclasses
import json
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from moestro.core.errors import Error
from moestro.core.units import bytes_text

if TYPE_CHECKING:
    from moestro.ship.install import Outcome

PACKAGE = typer.Argument(help="Name of the package in the store.")
HOME = typer.Argument(help="Folder of this device's packages.")
LOSSY = typer.Option(False, "--accept-quantised", help="Also take updates that lose some bits of the change.")
DEVICE = typer.Option(None, help="Report to the store under this name.")
EXPIRED = typer.Option(False, "--allow-expired", help="Accept a release whose own date has passed.")
AGAIN = typer.Option(False, "--again", help="Also install a release that was rolled back here.")


def update(
    url: str = URL,
    package_id: str = PACKAGE,
    home: Path = HOME,
    trust: list[Path] = TRUST,
    allow_unsigned: bool = ALLOW_UNSIGNED,
    accept_quantised: bool = LOSSY,
    again: bool = AGAIN,
    allow_expired: bool = EXPIRED,
    device: str = DEVICE,
    token_file: Path = TOKEN_FILE,
    authority: Path = AUTHORITY,
    certificate: Path = CERTIFICATE,
    key: Path = KEY,
    as_json: bool = AS_JSON,
) -> None:
    """Install the newest release by the fewest bytes, then switch to it; HOME/PACKAGE/active is the version to use."""
    from moestro.ship import install
    from moestro.ship.edge import Edge
    from moestro.ship.pull import Guard

    server = server_of(url, token_file, authority, certificate, key)
    guard = Guard(trust=trust_of(trust, allow_unsigned), allow_expired=allow_expired)
    how = install.How(modes=_modes(accept_quantised), again=again, device_id=device)
    with Bar(as_json) as bar:
        outcome = install.update(server, Edge(home, package_id), guard, how, bar)
    say(as_json, _table(package_id, outcome), _lines(package_id, outcome))


def rollback(
    package_id: str = PACKAGE,
    home: Path = HOME,
    url: str = typer.Option(None, help="Tell this store about it."),
    device: str = DEVICE,
    token_file: Path = TOKEN_FILE,
    authority: Path = AUTHORITY,
    as_json: bool = AS_JSON,
) -> None:
    """Switch back to the former version, verified first; the other is not installed again by itself."""
    from moestro.ship import install
    from moestro.ship.edge import Edge

    edge = Edge(home, package_id)
    server = server_of(url, token_file, authority) if url else None
    state = install.roll_back(edge, server, install.How(device_id=device))
    assert state.active
    assert state.previous
    table = {"package_id": package_id, "active": state.active.sequence, "held_back": list(state.held_back)}
    say(
        as_json,
        table,
        [
            f"{package_id}: version {state.active.sequence} is active again in {edge.folder(state.active)}; "
            f"{state.previous.sequence} is held back until update --again or a newer release"
        ],
    )


def watch(
    url: str = URL,
    package_id: str = PACKAGE,
    home: Path = HOME,
    every_s: float = typer.Option(60, "--every", min=0.1, help="Seconds between looks at the store."),
    trust: list[Path] = TRUST,
    allow_unsigned: bool = ALLOW_UNSIGNED,
    accept_quantised: bool = LOSSY,
    device: str = DEVICE,
    token_file: Path = TOKEN_FILE,
    authority: Path = AUTHORITY,
    certificate: Path = CERTIFICATE,
    key: Path = KEY,
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object per event, and no progress."),
) -> None:
    """Install releases as they appear, until Ctrl-C; what is being fetched then stays for the next time."""
    from moestro.ship import install
    from moestro.ship.edge import Edge
    from moestro.ship.pull import Guard

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    server = server_of(url, token_file, authority, certificate, key)
    guard = Guard(trust=trust_of(trust, allow_unsigned))
    how = install.How(modes=_modes(accept_quantised), device_id=device, stopped=stop.is_set)
    with Bar(as_json) as bar:
        for event in install.watch(server, Edge(home, package_id), guard, how, every_s, bar, stop.wait):
            if isinstance(event, Error):
                text = json.dumps({"error": type(event).__name__, "detail": str(event)}) if as_json else str(event)
                print(text, file=sys.stdout if as_json else sys.stderr, flush=True)
            else:
                shown = json.dumps(_table(package_id, event)) if as_json else "\n".join(_lines(package_id, event))
                print(shown, flush=True)


def _modes(accept_quantised: bool) -> tuple[str, ...]:
    return ("exact", "qres") if accept_quantised else ("exact",)


def _table(package_id: str, outcome: "Outcome") -> dict[str, Any]:
    table = dataclasses.asdict(outcome) | {"package_id": package_id}
    return table | {"folder": str(outcome.folder) if outcome.folder else None}


def _lines(package_id: str, outcome: "Outcome") -> list[str]:
    if outcome.state == "current":
        return [f"{package_id}: version {outcome.sequence} is active already"]
    if outcome.state == "held back":
        return [f"{package_id}: version {outcome.sequence} was rolled back here; install it with --again"]
    traffic = outcome.traffic
    full = f" of {bytes_text(outcome.full_bytes)}" if outcome.full_bytes else ""
    lines = [
        f"{package_id}: version {outcome.sequence} is active in {outcome.folder}",
        f"by {outcome.way}: fetched {bytes_text(traffic.fetched_bytes)}{full}, reused "
        f"{bytes_text(traffic.reused_bytes)}, from an earlier try {bytes_text(traffic.resumed_bytes)}",
    ]
    return lines + ([f"a residual update was not used: {outcome.dropped}"] if outcome.dropped else [])
