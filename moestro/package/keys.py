"""Keys in PEM files: Ed25519, ECDSA P-256 and ML-DSA-65 sign; X25519, alone or with ML-KEM-768, receives.

    new_key(kind) -> private key; save_pair(key, path) -> path and path.pub; load_private, load_public

The hybrid key is two PEM blocks in one file. Post-quantum kinds need a `cryptography` that has them.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.core.errors import ConfigError, UnsupportedVersion
from moestro.core.files import cannot_write

SIGNING_KINDS = ("ed25519", "p256", "mldsa65")
RECEIVING_KINDS = ("x25519", "mlkem768-x25519")
HYBRID = "MLKEM768_X25519"
KEY_FILE_BYTES = 1 << 16
BLOCK = re.compile(rb"-----BEGIN [A-Z ]{1,40}-----[^-]+-----END [A-Z ]{1,40}-----\n?")


def _suite(kem: str) -> Any:
    try:
        from cryptography.hazmat.primitives import hpke

        kind = {"X25519": hpke.KEM.X25519, HYBRID: getattr(hpke.KEM, HYBRID)}[kem]
    except (ImportError, AttributeError, KeyError) as error:
        raise UnsupportedVersion(
            f"kem is {kem}; it needs cryptography 48 or newer: pip install -U cryptography"
        ) from error
    return hpke.Suite(kind, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


@dataclass(frozen=True, slots=True)
class PublicKey:
    """Encrypts a data key to one recipient."""

    kem: str
    key: Any
    kid: str
    """Eight hexadecimal digits of the SHA-256 of the public key."""

    def encapsulate(self, secret: bytes, info: bytes) -> bytes:
        """HPKE, base mode."""
        return bytes(_suite(self.kem).encrypt(secret, self.key, info))


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """Decrypts what was encrypted to its public key."""

    kem: str
    key: Any
    kid: str

    def decapsulate(self, wrapped: bytes, info: bytes) -> bytes | None:
        """The secret, or None where this is the wrong key or the bytes were changed."""
        from cryptography.exceptions import InvalidTag

        try:
            return bytes(_suite(self.kem).decrypt(wrapped, self.key, info))
        except (InvalidTag, ValueError):
            return None


def key_of_kek(key: bytes) -> bytes:
    """A key-encryption key must have 32 bytes."""
    if len(key) != 32:
        raise ConfigError(f"the key-encryption key has {len(key)} bytes; AES-256 key wrap needs 32")
    return key


def new_key(kind: str) -> Any:
    """A fresh private key; a list of two for the hybrid kind."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519

    match kind:
        case "ed25519":
            return ed25519.Ed25519PrivateKey.generate()
        case "p256":
            return ec.generate_private_key(ec.SECP256R1())
        case "x25519":
            return x25519.X25519PrivateKey.generate()
        case "mldsa65":
            return _post_quantum("mldsa").MLDSA65PrivateKey.generate()
        case "mlkem768-x25519":
            return [_post_quantum("mlkem").MLKEM768PrivateKey.generate(), x25519.X25519PrivateKey.generate()]
    raise ConfigError(f"key kind is {kind}; it must be one of {', '.join(SIGNING_KINDS + RECEIVING_KINDS)}")


def _post_quantum(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"cryptography.hazmat.primitives.asymmetric.{module}")
    except ImportError as error:
        raise UnsupportedVersion(f"{module} needs cryptography 47 or newer: pip install -U cryptography") from error


def save_pair(key: Any, path: Path) -> Path:
    """Write PATH (private, mode 0600) and PATH.pub; neither may exist."""
    from cryptography.hazmat.primitives import serialization as s

    parts = key if isinstance(key, list) else [key]
    private = b"".join(p.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()) for p in parts)
    public = b"".join(p.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo) for p in parts)
    public_path = path.with_name(path.name + ".pub")
    for target, content, mode in ((path, private, 0o600), (public_path, public, 0o644)):
        _write_new(target, content, mode)
    return public_path


def _write_new(path: Path, content: bytes, mode: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError as error:
        raise ConfigError(f"{path} exists already; keys are never overwritten: choose another name") from error
    except OSError as error:
        raise cannot_write(path, error) from error
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def _blocks(path: Path) -> list[bytes]:
    try:
        with path.open("rb") as file:
            found = BLOCK.findall(file.read(KEY_FILE_BYTES))
    except OSError as error:
        raise ConfigError(f"key file {path} cannot be read: {error.strerror}") from error
    if not found:
        raise ConfigError(f"{path} holds no PEM key; make one with moestro keygen NAME")
    return found


def _load(path: Path, private: bool) -> list[Any]:
    from cryptography.exceptions import InternalError, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization as s

    try:
        blocks = _blocks(path)
        if private:
            return [s.load_pem_private_key(block, password=None) for block in blocks]
        return [s.load_pem_public_key(block) for block in blocks]
    except (ValueError, TypeError, UnsupportedAlgorithm, InternalError) as error:
        kind = "private" if private else "public"
        raise ConfigError(f"{path} is not a usable {kind} key in PEM form: {str(error)[:80]}") from error


def load_signing(path: Path) -> Any:
    """A private key that signs."""
    key = _load(path, private=True)[0]
    if not hasattr(key, "sign"):
        raise ConfigError(f"{path} is no signing key; make one with moestro keygen NAME --kind {SIGNING_KINDS[0]}")
    return key


def load_verifying(path: Path) -> Any:
    """A public key that checks signatures."""
    key = _load(path, private=False)[0]
    if not hasattr(key, "verify"):
        raise ConfigError(f"{path} is no key for signatures; give the .pub file of a signing key")
    return key


def load_receiving(path: Path) -> PrivateKey:
    """A private key that opens encrypted models."""
    parts = _load(path, private=True)
    kem, key, _ = _received(path, parts)
    return PrivateKey(kem, key, _kid([part.public_key() for part in parts]))


def load_recipient(path: Path) -> PublicKey:
    """A public key to encrypt to."""
    parts = _load(path, private=False)
    kem, key, _ = _received(path, parts)
    return PublicKey(kem, key, _kid(parts))


def _received(path: Path, parts: list[Any]) -> tuple[str, Any, list[Any]]:
    names = [type(part).__name__ for part in parts]
    if len(parts) == 1 and names[0].startswith("X25519"):
        return "X25519", parts[0], parts
    if len(parts) == 2 and names[0].startswith("MLKEM768") and names[1].startswith("X25519"):
        hpke = _hpke()
        joined = hpke.MLKEM768X25519PrivateKey if "Private" in names[0] else hpke.MLKEM768X25519PublicKey
        return HYBRID, joined(*parts), parts
    raise ConfigError(
        f"{path} holds {' and '.join(names)}; encryption needs X25519, made by moestro keygen NAME --kind x25519"
    )


def _hpke() -> Any:
    _suite(HYBRID)
    from cryptography.hazmat.primitives import hpke

    return hpke


def _kid(public_parts: list[Any]) -> str:
    return hashlib.sha256(b"".join(part.public_bytes_raw() for part in public_parts)).hexdigest()[:8]


def key_id(public: Any) -> str:
    """The id of a verifying key: SHA-256 of its SubjectPublicKeyInfo, in hexadecimal."""
    from cryptography.hazmat.primitives import serialization as s

    spki = public.public_bytes(s.Encoding.DER, s.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()
