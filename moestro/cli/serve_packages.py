"""`moestro serve-packages STORE`: a store of packages over HTTPS."""

import json
from pathlib import Path

import typer

from moestro.core.errors import ConfigError


def serve_packages(
    store: Path = typer.Argument(help="Folder of the store; made where it is missing."),
    host: str = typer.Option(None, help="Address to listen on, 127.0.0.1 by default; 0.0.0.0 for all."),
    port: int = typer.Option(None, min=0, max=65535, help="8443 by default; 0 takes any free one."),
    settings: Path = typer.Option(None, help="TOML file with any setting of docs/shipping.md."),
    trust: list[Path] = typer.Option(None, help="Accept only releases signed by these keys, or by a trust file."),
    public: list[str] = typer.Option(None, help="Package that anybody may read, as NAME or BEGINNING*. Repeatable."),
    name: list[str] = typer.Option(None, help="Further host name or address of a self-made certificate. Repeatable."),
    certificate: Path = typer.Option(None, help="PEM certificate chain; without it one is made."),
    key: Path = typer.Option(None, help="PEM key of --certificate."),
    client_authority: Path = typer.Option(None, help="PEM; clients must also show a certificate of it."),
    database: str = typer.Option(None, help="postgresql://USER@HOST/NAME instead of SQLite in the folder."),
    objects: str = typer.Option(None, help="s3://BUCKET/PREFIX?endpoint=URL instead of files in the folder."),
    plain: bool = typer.Option(False, "--plain", help="HTTP without TLS, on this machine only."),
    plain_anywhere: bool = typer.Option(False, "--plain-anywhere", help="HTTP behind a proxy that adds TLS."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object when ready."),
) -> None:
    """Serve packages until Ctrl-C; the first start makes a certificate and a token for everything."""
    given = {
        "host": host, "port": port, "trust": trust, "public": public, "names": name, "certificate": certificate,
        "key": key, "client_authority": client_authority, "database": database, "objects": objects,
        "plain": plain or None, "plain_anywhere": plain_anywhere or None,
    }  # fmt: skip
    try:
        from moestro.ship.serve import PackageServer
    except ImportError as error:
        raise ConfigError(f"serving packages needs: pip install 'moestro[ship]' ({error.name} is missing)") from error
    from moestro.core.config import build, read_toml
    from moestro.ship.settings import ServerSettings

    table = read_toml(settings) if settings else {}
    table |= {key: value for key, value in given.items() if value not in (None, [])}
    checked = build(ServerSettings, table, str(settings or "settings"))

    with PackageServer(store, checked) as server:
        address = server.address
        files = {"authority": address.authority, "admin_token": address.admin_token}
        lines = [f"serving {store} at {address.url}", f"admin token: {address.admin_token}"]
        lines += [f"clients need: --authority {address.authority}"] if address.authority else []
        shown = {key: str(value) for key, value in files.items() if value}
        print(json.dumps({"url": address.url, **shown}) if as_json else "\n".join(lines), flush=True)
        server.run()
