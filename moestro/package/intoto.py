"""A package's signature for OpenSSF model-signing: an in-toto statement over all of its files, in a Sigstore bundle.

    to_model_signing(package, out, key)      then: model_signing verify key PACKAGE --signature OUT --public_key KEY.pub

For those who check models with that tool and know nothing of manifests. The statement names every file of the folder
by its SHA-256, manifest and its signature included (in-toto Statement v1, predicate https://model_signing/signature/v1.0;
DSSE v1; Sigstore bundle v0.3 with a public key). Its verifier takes keys on NIST's curves only, hence P-256.
"""

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from moestro.core.errors import ConfigError
from moestro.core.files import write_bytes
from moestro.package.bulk import read_at
from moestro.package.folder import Package
from moestro.package.keys import load_signing
from moestro.package.manifest import MANIFEST, SIGNATURE
from moestro.package.paths import open_below
from moestro.package.sign import pre_authentication, signed_bytes
from moestro.package.spans import Progress, ignore

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
READ_BYTES = 4 << 20


def to_model_signing(folder: Path, out: Path, key: Path, progress: Progress = ignore) -> dict[str, Any]:
    """Write the signature; the package is verified first. Returns the statement.

    out   outside of the package, since nothing may lie in it that its manifest does not list
    raises ConfigError for a key that is not P-256
    """
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    if out.exists() or out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{out} exists already or lies inside {folder}; choose another place")
    private = load_signing(key)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{key} is not on a curve that model-signing knows; make one with moestro keygen --kind p256")
    with Package.open(folder) as package:
        package.verify()
        table = statement(package, progress)
    payload = json.dumps(table, sort_keys=True).encode()
    signature = signed_bytes(private, pre_authentication(payload, PAYLOAD_TYPE))
    pem = private.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    envelope = {"payload": _base64(payload), "payloadType": PAYLOAD_TYPE}
    bundle = {
        "mediaType": BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": hashlib.sha256(pem).hexdigest()}, "tlogEntries": []},
        "dsseEnvelope": envelope | {"signatures": [{"sig": _base64(signature), "keyid": ""}]},
    }
    write_bytes(out, json.dumps(bundle).encode())
    return table


def statement(package: Package, progress: Progress = ignore) -> dict[str, Any]:
    """What is signed: the SHA-256 of every file in order of names, and of these digests as the subject."""
    paths = [entry.path for entry in package.manifest.files] + [MANIFEST]
    paths += [SIGNATURE] if package.envelope() is not None else []
    digests = {path: _sha256(package, path, progress) for path in sorted(paths)}
    root = hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests.values())).hexdigest()
    resources = [{"name": name, "algorithm": "sha256", "digest": digest} for name, digest in digests.items()]
    serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
    return {
        "_type": STATEMENT,
        "subject": [{"name": package.manifest.package_id, "digest": {"sha256": root}}],
        "predicateType": PREDICATE,
        "predicate": {"serialization": serialization, "resources": resources},
    }


def _sha256(package: Package, path: str, progress: Progress) -> str:
    state, buffer, at = hashlib.sha256(), memoryview(bytearray(READ_BYTES)), 0
    handle = open_below(package.handle, path)
    try:
        while count := read_at(handle, buffer, at):
            state.update(buffer[:count])
            progress(count)
            at += count
    finally:
        os.close(handle)
    return state.hexdigest()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
