"""TLS for the server and its clients; a self-made authority and certificate where there is none.

    own_certificate(folder, names) -> (chain, key, authority)      server_context(...)      client_context(...)

A store makes its authority once, in `tls/`; `tls/authority.pem` is what clients are given. The authority's key stays
there with mode 0600. TLS 1.2 at least, 1.3 as a rule.
"""

import datetime
import ipaddress
import os
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moestro.core.errors import ConfigError
from moestro.core.files import cannot_write

AUTHORITY_DAYS, CERTIFICATE_DAYS = 3650, 365
RENEW_DAYS = 30
"""A certificate with less than this left is made anew when the server starts."""


def own_certificate(folder: Path, names: Sequence[str]) -> tuple[Path, Path, Path]:
    """(certificate, key, authority) below `folder`, made where missing, nearly expired or for other names."""
    try:
        from cryptography import x509
    except ImportError as error:
        raise ConfigError("TLS with a self-made certificate needs: pip install 'moestro[ship]'") from error
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    certificate, key, authority = folder / "server.pem", folder / "server.key", folder / "authority.pem"
    wanted = sorted({"localhost", "127.0.0.1", "::1", *names})
    if not authority.exists():
        _make_authority(folder)
    if certificate.exists() and key.exists():
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
        left = found.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
        if left.days >= RENEW_DAYS and set(wanted) <= _names_of(found):
            return certificate, key, authority
    _make_certificate(folder, wanted)
    return certificate, key, authority


def _names_of(certificate: Any) -> set[str]:
    from cryptography import x509

    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    found = set(names.get_values_for_type(x509.DNSName))
    return found | {str(address) for address in names.get_values_for_type(x509.IPAddress)}


def _make_authority(folder: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder("moestro package store authority", AUTHORITY_DAYS).public_key(key.public_key())
    builder = builder.issuer_name(_name("moestro package store authority"))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    builder = builder.add_extension(usage, critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    _write_key(folder / "authority.key", key)
    (folder / "authority.pem").write_bytes(_pem(builder.sign(key, hashes.SHA256())))


def _make_certificate(folder: Path, names: Sequence[str]) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    authority = x509.load_pem_x509_certificate((folder / "authority.pem").read_bytes())
    signer: Any = serialization.load_pem_private_key((folder / "authority.key").read_bytes(), None)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder("moestro package server", CERTIFICATE_DAYS).public_key(key.public_key())
    builder = builder.issuer_name(authority.subject)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName(list(map(_alternative, names))), critical=False)
    usage = x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH])
    builder = builder.add_extension(usage, critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    builder = builder.add_extension(issuer, critical=False)
    _write_key(folder / "server.key", key)
    (folder / "server.pem").write_bytes(_pem(builder.sign(signer, hashes.SHA256())))


def _builder(name: str, days: int) -> Any:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(_name(name)).serial_number(x509.random_serial_number())
    start = now - datetime.timedelta(hours=1)
    return builder.not_valid_before(start).not_valid_after(now + datetime.timedelta(days=days))


def _name(text: str) -> Any:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _alternative(name: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(certificate: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return bytes(certificate.public_bytes(Encoding.PEM))


def _write_key(path: Path, key: Any) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
    except OSError as error:
        raise cannot_write(path, error) from error


def server_context(certificate: Path, key: Path, client_authority: Path | None = None) -> ssl.SSLContext:
    """For the server; with `client_authority` clients must show a certificate of it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        context.load_cert_chain(certificate, key)
        if client_authority is not None:
            context.load_verify_locations(client_authority)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{certificate} and {key} are not a certificate with its key: {error}") from error
    return context


def client_context(authority: Path | None, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """For clients: the system's authorities, or only the given one; verification cannot be switched off."""
    context = ssl.create_default_context(cafile=None)
    try:
        if authority is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(authority)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{authority or certificate} cannot be used as certificates in PEM: {error}") from error
    return context
