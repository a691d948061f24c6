"""`package.intoto`: OpenSSF model-signing accepts what is exported, and what it names are the files that are there."""

import base64
import hashlib
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from package.samples import contents, save_signed

from moestro.core.errors import ConfigError, IntegrityError
from moestro.package.api import new_key, save_pair, to_model_signing


@pytest.fixture
def package(model: Path, tmp_path: Path) -> Path:
    return save_signed(model, tmp_path, "p256")


def test_the_bundle_is_signed_dsse_over_the_sha256_of_every_file(package: Path, tmp_path: Path) -> None:
    to_model_signing(package, tmp_path / "model.sig", tmp_path / "key")
    bundle = json.loads((tmp_path / "model.sig").read_bytes())
    envelope = bundle["dsseEnvelope"]
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"]
    public = serialization.load_pem_public_key((tmp_path / "key.pub").read_bytes())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
    public.verify(base64.b64decode(envelope["signatures"][0]["sig"]), message, ec.ECDSA(hashes.SHA256()))
    hint = hashlib.sha256((tmp_path / "key.pub").read_bytes()).hexdigest()
    assert bundle["verificationMaterial"]["publicKey"]["hint"] == hint
    found = {item["name"]: item["digest"] for item in json.loads(payload)["predicate"]["resources"]}
    assert found == {path: hashlib.sha256(data).hexdigest() for path, data in contents(package).items()}


def test_model_signing_itself_accepts_it_and_finds_a_changed_byte(package: Path, tmp_path: Path) -> None:
    verifying = pytest.importorskip("model_signing.verifying")
    to_model_signing(package, tmp_path / "model.sig", tmp_path / "key")
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=tmp_path / "key.pub")
    verifier.verify(package, tmp_path / "model.sig")
    file = next(package.rglob("*.ptm"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"model\.ptm"):
        verifier.verify(package, tmp_path / "model.sig")


def test_other_keys_places_inside_and_damaged_packages_are_refused(package: Path, tmp_path: Path) -> None:
    save_pair(new_key("ed25519"), tmp_path / "other")
    with pytest.raises(ConfigError, match="--kind p256"):
        to_model_signing(package, tmp_path / "model.sig", tmp_path / "other")
    with pytest.raises(ConfigError, match="lies inside"):
        to_model_signing(package, package / "model.sig", tmp_path / "key")
    file = next(package.rglob("*.ptm"))
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    with pytest.raises(IntegrityError):
        to_model_signing(package, tmp_path / "model.sig", tmp_path / "key")
    assert not (tmp_path / "model.sig").exists()
