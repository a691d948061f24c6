"""`package.sign`: only the threshold of trusted keys makes a package trusted (8.2.7)."""

import base64
import json
from pathlib import Path

import pytest

from moestro.core.errors import ConfigError, FormatError, PackageError, SignatureError
from moestro.package.api import (
    SIGNATURE,
    Options,
    Package,
    Release,
    Trust,
    new_key,
    pack,
    save_pair,
    sign_package,
    verify,
)
from moestro.package.keys import SIGNING_KINDS
from moestro.package.sign import pre_authentication


@pytest.fixture
def package(model: Path, tmp_path: Path) -> Path:
    pack(model, tmp_path / "p", Options(release=Release(package_id="demo")))
    return tmp_path / "p"


def keyed(tmp_path: Path, name: str, kind: str = "ed25519") -> tuple[Path, Path]:
    """Paths of a private key and its public key."""
    return tmp_path / name, save_pair(new_key(kind), tmp_path / name)


@pytest.mark.parametrize("kind", SIGNING_KINDS)
def test_a_package_signed_by_a_trusted_key_is_accepted(package: Path, tmp_path: Path, kind: str) -> None:
    key, public = keyed(tmp_path, "a", kind)
    _, stranger = keyed(tmp_path, "b", kind)
    ids = sign_package(package, key)
    assert verify(package, Trust.load([public])).signed_by == ids
    with pytest.raises(SignatureError, match="0 trusted keys signed, 1 must"):
        verify(package, Trust.load([stranger]))


def test_an_unsigned_package_is_refused_where_trust_is_asked(package: Path, tmp_path: Path) -> None:
    _, public = keyed(tmp_path, "a")
    with pytest.raises(SignatureError, match="not signed"):
        verify(package, Trust.load([public]))


def test_two_of_three_keys_must_sign(package: Path, tmp_path: Path) -> None:
    pairs = [keyed(tmp_path, name) for name in "abc"]
    trust_file = tmp_path / "trust.toml"
    trust_file.write_text('threshold = 2\nkeys = ["a.pub", "b.pub", "c.pub"]')
    trust = Trust.load([trust_file])
    sign_package(package, pairs[0][0])
    sign_package(package, pairs[0][0])  # the same key twice is one signature
    with pytest.raises(SignatureError, match="1 trusted keys signed, 2 must"):
        verify(package, trust)
    assert len(sign_package(package, pairs[2][0])) == 2
    assert len(verify(package, trust).signed_by) == 2
    trust_file.write_text('threshold = 4\nkeys = ["a.pub", "b.pub", "c.pub"]')
    with pytest.raises(ConfigError, match=r"1\.\.3"):
        Trust.load([trust_file])


def test_a_key_listed_twice_counts_once(tmp_path: Path) -> None:
    keyed(tmp_path, "a")
    (tmp_path / "trust.toml").write_text('threshold = 2\nkeys = ["a.pub", "a.pub"]')
    with pytest.raises(ConfigError, match=r"1\.\.1"):
        Trust.load([tmp_path / "trust.toml"])


def test_x_6_every_changed_byte_of_manifest_and_signature_is_found(package: Path, tmp_path: Path) -> None:
    key, public = keyed(tmp_path, "a")
    sign_package(package, key)
    trust = Trust.load([public])
    for path in (package / "Meta-info" / "manifest.json", package / SIGNATURE):
        good = path.read_bytes()
        for at in range(0, len(good), 11):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 7]) + good[at + 1 :])
            with pytest.raises(PackageError):
                Package.open(package, trust)
        path.write_bytes(good)
    verify(package, trust)


def test_the_envelope_is_dsse_that_others_can_check(package: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key, public = keyed(tmp_path, "a")
    sign_package(package, key)
    envelope = json.loads((package / SIGNATURE).read_bytes())
    payload = base64.b64decode(envelope["payload"])
    assert payload == (package / "Meta-info" / "manifest.json").read_bytes()
    kind = envelope["payloadType"].encode()
    signed = b"DSSEv1 " + b" ".join([b"%d" % len(kind), kind, b"%d" % len(payload), payload])
    assert signed == pre_authentication(payload)
    loaded = load_pem_public_key(public.read_bytes())
    loaded.verify(base64.b64decode(envelope["signatures"][0]["sig"]), signed)  # type: ignore[union-attr, call-arg]


def test_a_signature_of_another_package_does_not_serve(package: Path, model: Path, tmp_path: Path) -> None:
    key, public = keyed(tmp_path, "a")
    pack(model, tmp_path / "q", Options(release=Release(package_id="demo", sequence=2)))
    sign_package(package, key)
    (tmp_path / "q" / SIGNATURE).write_bytes((package / SIGNATURE).read_bytes())
    with pytest.raises(SignatureError, match="another manifest"):
        verify(tmp_path / "q", Trust.load([public]))


def test_unused_bits_of_a_signature_must_be_zero(package: Path, tmp_path: Path) -> None:
    key, public = keyed(tmp_path, "a")
    sign_package(package, key)
    path = package / SIGNATURE
    text = path.read_bytes()
    end = text.index(b'=="}')  # the last character of 64 bytes in base64 has four bits to spare
    path.write_bytes(text[: end - 1] + bytes([text[end - 1] + 1]) + text[end:])
    with pytest.raises(FormatError, match="unused bits"):
        verify(package, Trust.load([public]))


def test_a_key_whose_bytes_do_not_fit_its_kind_is_refused(package: Path, tmp_path: Path) -> None:
    key, _ = keyed(tmp_path, "a")
    lines = key.read_bytes().split(b"\n")
    lines[1] = base64.b64encode(base64.b64decode(lines[1]).replace(b"\x2b\x65\x70", b"\x2b\x65\x6f"))  # now X448
    key.write_bytes(b"\n".join(lines))
    with pytest.raises(ConfigError, match="not a usable private key"):
        sign_package(package, key)


def test_key_files_are_private_and_never_overwritten(package: Path, tmp_path: Path) -> None:
    key, public = keyed(tmp_path, "a")
    assert key.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="exists already"):
        save_pair(new_key("ed25519"), key)
    with pytest.raises(ConfigError, match="private key"):
        sign_package(package, public)
