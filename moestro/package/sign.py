"""Signatures over the manifest, as DSSE envelopes (secure-systems-lab/dsse, v1), and whom one trusts.

    sign(manifest_bytes, key, former) -> manifest.sig        Trust.load(files).check(manifest_bytes, envelope)

Ed25519 always; ECDSA P-256 and ML-DSA-65 where `cryptography` has them. A trust file (TOML) asks for k of n keys:
threshold = 2, keys = ["a.pub", "b.pub", "c.pub"]; a lone public key is a trust of 1 of 1.
"""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.core.config import read_toml
from moestro.core.errors import ConfigError, FormatError, SignatureError, UnsupportedVersion
from moestro.package import canonical
from moestro.package.fields import Fields
from moestro.package.keys import key_id, load_verifying
from moestro.package.limits import MAX_MANIFEST_BYTES

PAYLOAD_TYPE = "application/vnd.gbt42382.2.manifest+json"
MAX_SIGNATURES = 64
MAX_ENVELOPE_BYTES = 2 * MAX_MANIFEST_BYTES


def pre_authentication(payload: bytes, payload_type: str = PAYLOAD_TYPE) -> bytes:
    """What is signed: DSSE's encoding of type and payload with their lengths."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def sign(payload: bytes, key: Any, former: bytes | None = None) -> bytes:
    """An envelope with this key's signature, beside those of a former envelope over the same payload."""
    keyid = key_id(key.public_key())
    signatures = [] if former is None else [s for s in _signatures(former, payload) if s["keyid"] != keyid]
    signatures.append(
        {"keyid": keyid, "sig": base64.b64encode(signed_bytes(key, pre_authentication(payload))).decode()}
    )
    signatures.sort(key=lambda s: str(s["keyid"]))
    envelope = {"payload": base64.b64encode(payload).decode(), "payloadType": PAYLOAD_TYPE, "signatures": signatures}
    return canonical.dumps(envelope)


def signed_bytes(key: Any, message: bytes) -> bytes:
    """A bare signature by a private key."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256

    return bytes(
        key.sign(message, ec.ECDSA(SHA256())) if isinstance(key, ec.EllipticCurvePrivateKey) else key.sign(message)
    )


def _is_signed(key: Any, signature: bytes, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256

    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, message, ec.ECDSA(SHA256()))
        else:
            key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _signatures(envelope: bytes, payload: bytes) -> list[dict[str, str]]:
    """The signatures of an envelope over exactly this payload; raises FormatError or SignatureError."""
    fields = Fields(canonical.loads_loosely(envelope, MAX_ENVELOPE_BYTES, "manifest.sig"), "manifest.sig")
    if fields.text("payloadType") != PAYLOAD_TYPE:
        raise FormatError(f"manifest.sig signs {fields.text('payloadType')[:60]!r}, not {PAYLOAD_TYPE}")
    if _decoded(fields.text("payload", MAX_ENVELOPE_BYTES)) != payload:
        raise SignatureError("manifest.sig signs another manifest.json than this one")
    found = []
    for item in fields.items("signatures", MAX_SIGNATURES):
        inner = Fields(item, "a signature")
        found.append({"keyid": inner.text("keyid", 200), "sig": inner.text("sig", 20_000)})
    return found


def signed_payload(envelope: bytes) -> bytes:
    """What an envelope signs, unchecked."""
    fields = Fields(canonical.loads_loosely(envelope, MAX_ENVELOPE_BYTES, "manifest.sig"), "manifest.sig")
    return _decoded(fields.text("payload", MAX_ENVELOPE_BYTES))


def _decoded(text: str) -> bytes:
    """One spelling only: the last character has bits that decoding ignores, and nothing in a package may change."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError("manifest.sig holds what is not base64") from error
    if base64.b64encode(data).decode() != text:
        raise FormatError("manifest.sig holds base64 whose unused bits are not zero")
    return data


@dataclass(frozen=True, slots=True)
class Trust:
    """Keys that count, and how many of them must have signed."""

    keys: dict[str, Any]
    """By key id."""
    threshold: int = 1

    @classmethod
    def load(cls, paths: Sequence[Path]) -> "Trust":
        """From public keys, or one trust file in TOML."""
        if len(paths) == 1 and paths[0].suffix == ".toml":
            return cls._from_toml(paths[0])
        return cls._of([load_verifying(path) for path in paths], 1)

    @classmethod
    def _from_toml(cls, path: Path) -> "Trust":
        table = read_toml(path)
        files, threshold = table.get("keys"), table.get("threshold", 1)
        if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
            raise ConfigError(f'{path}: keys must be a list of public key files, for example keys = ["a.pub"]')
        return cls._of([load_verifying(path.parent / file) for file in files], threshold)

    @classmethod
    def _of(cls, keys: Sequence[Any], threshold: Any) -> "Trust":
        by_id = {key_id(key): key for key in keys}
        if type(threshold) is not int or not 1 <= threshold <= len(by_id):
            raise ConfigError(f"trust: threshold is {threshold}; it must be in 1..{len(by_id)}, the number of keys")
        return cls(by_id, threshold)

    def check(self, payload: bytes, envelope: bytes | None) -> list[str]:
        """Ids of the trusted keys that signed; raises SignatureError where they are too few."""
        if envelope is None:
            raise SignatureError("the package is not signed (no manifest.sig); sign it with moestro sign")
        message = pre_authentication(payload)
        signatures = _signatures(envelope, payload)
        valid = {
            keyid
            for keyid in {signature["keyid"] for signature in signatures} & self.keys.keys()
            if any(
                _is_signed(self.keys[keyid], _decoded(signature["sig"]), message)
                for signature in signatures
                if signature["keyid"] == keyid
            )
        }
        if len(valid) < self.threshold:
            raise SignatureError(
                f"{len(valid)} trusted keys signed, {self.threshold} must; "
                "the package may be forged, or --trust lacks its key"
            )
        return sorted(valid)


def signers(payload: bytes, envelope: bytes) -> list[str]:
    """Key ids an envelope claims, unchecked; for display only."""
    try:
        return [signature["keyid"] for signature in _signatures(envelope, payload)]
    except (FormatError, UnsupportedVersion):
        return []
