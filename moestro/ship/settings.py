"""How a package server behaves: addresses, TLS, limits. From flags or a TOML file, checked before anything starts."""

from dataclasses import dataclass, field
from pathlib import Path

from moestro.core.config import STRICT
from moestro.core.errors import ConfigError
from moestro.ship.store import Quotas
from moestro.ship.tokens import Scope


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Limits per client; a client is a token, or an address where there is none."""

    __pydantic_config__ = STRICT
    requests_per_s: float = 1000
    burst_requests: int = 2000
    failures_per_s: float = 1
    """Refused tokens per address, after a burst of 20."""
    bytes_per_s: float | None = None
    """Of file content sent to one client; None for no limit."""

    def __post_init__(self) -> None:
        for name in ("requests_per_s", "burst_requests", "failures_per_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"rates.{name} is {getattr(self, name)}; it must be above 0")
        if self.bytes_per_s is not None and self.bytes_per_s < 1e4:
            raise ConfigError(f"rates.bytes_per_s is {self.bytes_per_s}; it must be at least 10000, or left out")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Everything a server needs besides its folder."""

    __pydantic_config__ = STRICT
    host: str = "127.0.0.1"
    port: int = 8443
    """0 takes any free one."""
    plain: bool = False
    """HTTP without TLS; only on a loopback address unless `plain_anywhere`."""
    plain_anywhere: bool = False
    certificate: Path | None = None
    """PEM chain; without it the server makes its own authority and certificate."""
    key: Path | None = None
    names: tuple[str, ...] = ()
    """Further names and addresses for a self-made certificate."""
    client_authority: Path | None = None
    """PEM; clients must then show a certificate signed by it, besides their token."""
    trust: tuple[Path, ...] = ()
    """Keys, or one trust file; every release must then be signed accordingly."""
    public: tuple[str, ...] = ()
    """Packages that anybody may read, as `name` or `beginning*`."""
    database: str | None = None
    objects: str | None = None
    quotas: Quotas = field(default_factory=Quotas)
    rates: Rates = field(default_factory=Rates)
    collect_every_s: int = 3600
    collect_grace_s: int = 86400
    """Unfinished uploads and files without release are kept this long."""
    max_connections: int = 1000
    stall_s: float = 60
    """A client that neither sends nor takes a byte for this long is cut off."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be in 0..65535")
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("certificate and key belong together; give both or neither")
        if self.plain and not self.plain_anywhere and not is_loopback(self.host):
            raise ConfigError(
                f"host is {self.host} without TLS: tokens would cross the network readably; leave out --plain, or say "
                "--plain-anywhere behind a proxy that adds TLS"
            )
        for pattern in self.public:
            Scope.parse(f"read:{pattern}")


def is_loopback(host: str) -> bool:
    """True for addresses that never leave this machine."""
    return host in ("localhost", "::1", "[::1]") or host.startswith("127.")
