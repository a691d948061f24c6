"""`package.encrypt` and `package.reseal`: known answers, every kind of recipient, and nothing readable without a key
(8.2.5)."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from package.samples import contents, save_model, tensors

from moestro.core.errors import ConfigError, DecryptionError, FormatError, PackageError
from moestro.package import canonical
from moestro.package.api import (
    Kek,
    Keys,
    Options,
    Package,
    Password,
    Release,
    load_receiving,
    load_recipient,
    new_key,
    pack,
    save_pair,
    unpack,
    verify,
)
from moestro.package.encrypt import (
    Opened,
    Place,
    Recipient,
    Sealer,
    _cipher,
    check_envelope,
    derive,
    envelope_mac,
    nonce_of,
    stored_bytes,
)
from moestro.package.hashing import leaf_hashes
from moestro.package.limits import CHUNK_BYTES
from moestro.package.reader import ModelFile
from moestro.package.reseal import decrypt, encrypt, rewrap
from moestro.package.spans import Bytes

DEK, SALT = bytes(range(32)), bytes(range(32, 64))


def test_z_3_known_answers() -> None:
    """Payload key and envelope MAC of annex Z.3; the ciphertext under its associated data, which held the length."""
    key = derive(DEK, SALT, b"PTMF/1 payload", 32)
    assert key.hex() == "a6175db4b3107176e0a94a548103ce34ff418ce3d13068621e57d7423d1d26a8"
    table = {"chunk": CHUNK_BYTES, "plain_length": 128, "recipients": [], "salt": SALT.hex(), "suite": "A256GCM"}
    assert envelope_mac(DEK, table) == "4569523c4298566923499979870fccac1d5df1c46d1b53f89312b2433f2785a4"
    associated = {"chunk": CHUNK_BYTES, "model_id": "demo-1", "plain_length": 128, "salt": SALT.hex()}
    bound = hashlib.sha256(canonical.dumps(associated | {"suite": "A256GCM"})).digest()
    assert bound.hex() == "f583af6ad982cab133d5c9ad87eb4aad860188bfc065d7799d060d248234dd64"
    private = canonical.dumps({"segments": [], "tensors": [], "weights_root": hashlib.sha256().hexdigest()})
    plain = (len(private).to_bytes(8, "little") + private).ljust(128, b"\0")
    sealed = bytearray(144)
    _cipher("A256GCM", key).encrypt_into(nonce_of(0, True), plain, bound, sealed)
    assert hashlib.sha256(sealed).hexdigest() == "eb539633c590f6de780639c4b2c28fb64dd8ca6b496cec4e0071a9393f04984a"
    assert sealed[-16:].hex() == "942333fc0c0ed139023fa43ee5bcb85f"


def receiver(tmp_path: Path, kind: str) -> tuple[Recipient, Keys]:
    match kind:
        case "password":
            return Password("correct horse"), Keys(password="correct horse")
        case "kek":
            key = bytes(range(32))
            return Kek("vault-7", key), Keys(kek=lambda kid: key if kid == "vault-7" else None)
    public = save_pair(new_key(kind), tmp_path / kind)
    return load_recipient(public), Keys([load_receiving(tmp_path / kind)])


@pytest.mark.parametrize("kind", ["x25519", "mlkem768-x25519", "password", "kek"])
@pytest.mark.parametrize("suite", ["A256GCM", "SM4GCM", "C20P1305"])
def test_what_was_encrypted_comes_back(model: Path, tmp_path: Path, kind: str, suite: str) -> None:
    if kind == "password" and suite != "A256GCM":
        pytest.skip("one slow password is enough")
    to, keys = receiver(tmp_path, kind)
    pack(model, tmp_path / "p", Options(release=Release(package_id="demo"), to=[to], suite=suite))
    assert verify(tmp_path / "p").unread == ["demo: encrypted, no key given"]
    assert verify(tmp_path / "p", keys=keys).tensors == len(tensors())
    unpack(tmp_path / "p", tmp_path / "out", keys=keys)
    assert contents(tmp_path / "out") == contents(model)
    assert all(p.stat().st_mode & 0o077 == 0 for p in (tmp_path / "out").rglob("*") if p.is_file())


@pytest.mark.parametrize("compact", [False, True])
def test_encrypting_and_decrypting_a_package_gives_its_bytes_again(model: Path, tmp_path: Path, compact: bool) -> None:
    to, keys = receiver(tmp_path, "x25519")
    pack(model, tmp_path / "p", Options(release=Release(package_id="demo"), compact=compact, shard_bytes=10**5))
    encrypt(tmp_path / "p", tmp_path / "e", [to])
    decrypt(tmp_path / "e", tmp_path / "d", keys)
    assert contents(tmp_path / "d") == contents(tmp_path / "p")
    with pytest.raises(FormatError, match="already"):
        encrypt(tmp_path / "e", tmp_path / "ee", [to])


@pytest.mark.parametrize("kind", ["x25519", "mlkem768-x25519"])
def test_8_2_5_rewrapping_changes_the_envelope_and_no_ciphertext(model: Path, tmp_path: Path, kind: str) -> None:
    old, old_keys = receiver(tmp_path, "kek")
    new, new_keys = receiver(tmp_path, kind)
    release = Release(package_id="demo", sequence=3)
    pack(model, tmp_path / "p", Options(release=release, to=[old], shard_bytes=10**5))
    rewrap(tmp_path / "p", tmp_path / "r", old_keys, [new])
    assert verify(tmp_path / "r", keys=new_keys).tensors == len(tensors())
    with pytest.raises(DecryptionError):
        verify(tmp_path / "r", keys=old_keys)
    before, after = (sealed_bytes(tmp_path / name) for name in "pr")
    assert before == after
    assert len(before) > 1
    unpack(tmp_path / "r", tmp_path / "out", keys=new_keys)
    assert contents(tmp_path / "out") == contents(model)
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "r").rglob("*.ptm"))


def sealed_bytes(package: Path) -> dict[str, bytes]:
    """Ciphertext of each model file."""
    found = {}
    for path in package.rglob("*.ptm"):
        with ModelFile.open(path) as file:
            model = file.models[0]
            found[path.name] = bytes(model.data.read(0, model.data.length))
    return found


def test_only_an_encrypted_package_is_rewrapped_and_only_with_its_key(model: Path, tmp_path: Path) -> None:
    old, keys = receiver(tmp_path, "kek")
    new, foreign = receiver(tmp_path, "x25519")
    pack(model, tmp_path / "p", Options(release=Release(package_id="demo"), to=[old]))
    with pytest.raises(DecryptionError):
        rewrap(tmp_path / "p", tmp_path / "r", foreign, [new])
    pack(model, tmp_path / "clear", Options(release=Release(package_id="demo")))
    with pytest.raises(FormatError, match="not encrypted"):
        rewrap(tmp_path / "clear", tmp_path / "r", keys, [new])
    file = next((tmp_path / "p").rglob("*.ptm"))
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    with pytest.raises(PackageError):
        rewrap(tmp_path / "p", tmp_path / "r", keys, [new])
    assert not (tmp_path / "r").exists()


def test_nothing_of_the_weights_stands_in_clear(model: Path, tmp_path: Path) -> None:
    to, _ = receiver(tmp_path, "x25519")
    pack(model, tmp_path / "p", Options(release=Release(package_id="demo"), to=[to]))
    with Package.open(tmp_path / "p") as package:
        assert package.manifest.models[0].weights_root is None
    stored = next((tmp_path / "p").rglob("*.ptm")).read_bytes()
    for secret in (b"experts.w", b"float16", b"LlamaForCausalLM", tensors()["experts.w"].tobytes()[:64]):
        assert secret not in stored


def test_a_wrong_key_and_a_wrong_password_fail_alike(model: Path, tmp_path: Path) -> None:
    to, _ = receiver(tmp_path, "x25519")
    pack(model, tmp_path / "p", Options(release=Release(package_id="demo"), to=[to]))
    (tmp_path / "other").mkdir()
    _, foreign = receiver(tmp_path / "other", "x25519")
    for keys in (foreign, Keys(password="x")):
        with pytest.raises(DecryptionError, match="wrong key, or the encrypted bytes were changed"):
            decrypt(tmp_path / "p", tmp_path / "d", keys)
    with pytest.raises(DecryptionError, match="no key given"):
        decrypt(tmp_path / "p", tmp_path / "d", Keys())
    assert not (tmp_path / "d").exists()


def test_a_password_stands_alone() -> None:
    with pytest.raises(ConfigError, match="beside other recipients"):
        Sealer([Password("a"), Kek("k", bytes(32))], "demo")


def sealed(tmp_path: Path, plain: bytes) -> tuple[bytes, dict[str, object], Keys]:
    """Ciphertext, envelope and key of some bytes without a head."""
    to, keys = receiver(tmp_path, "kek")
    sealer = Sealer([to], "demo", dek=DEK, salt=SALT)
    with (tmp_path / "c").open("wb") as file:
        stream = sealer.stream(Place(file.fileno(), tmp_path / "c", 0, "sha256"), 64)
        stream.write(plain[64:])
        length, leaves = stream.close(plain[:64])
    assert length == stored_bytes(len(plain))
    assert leaves == leaf_hashes("sha256", (tmp_path / "c").read_bytes(), CHUNK_BYTES)
    return (tmp_path / "c").read_bytes(), sealer.envelope(len(plain)), keys


def _read_all(stored: bytes, envelope: dict[str, object], keys: Keys) -> bytes:
    opened = Opened.of(Bytes(stored), envelope, "demo", keys)
    return bytes(opened.read(0, opened.length))


@pytest.mark.parametrize("size", [64, 65, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES, 9_000_000])
def test_any_length_and_any_range_of_a_stream(tmp_path: Path, size: int) -> None:
    plain = np.random.default_rng(size).bytes(size)
    stored, envelope, keys = sealed(tmp_path, plain)
    opened = Opened.of(Bytes(stored), envelope, "demo", keys)
    assert bytes(opened.read(0, size)) == plain
    for start, count in ((size - 1, 1), (size // 2, size // 3), (0, 0)):
        assert bytes(opened.read(start, count)) == plain[start : start + count]


def test_a_read_in_the_middle_of_another_changes_neither(tmp_path: Path) -> None:
    plain = np.random.default_rng(0).bytes(2 * CHUNK_BYTES)
    stored, envelope, keys = sealed(tmp_path, plain)
    between: list[bytes] = []

    class Interrupted(Bytes):
        """As by another thread: the first read of ciphertext meets one of the other chunk."""

        def read(self, start: int, count: int) -> memoryview:
            if not between:
                between.append(b"")
                between[0] = bytes(opened.read(CHUNK_BYTES + 7, 100))
            return super().read(start, count)

    opened = Opened.of(Interrupted(stored), envelope, "demo", keys)
    assert bytes(opened.read(5, 100)) == plain[5:105]
    assert between == [plain[CHUNK_BYTES + 7 : CHUNK_BYTES + 107]]
    assert bytes(opened.read(CHUNK_BYTES + 9, 100)) == plain[CHUNK_BYTES + 9 : CHUNK_BYTES + 109]


def test_truncated_swapped_repeated_and_extended_streams_fail(tmp_path: Path) -> None:
    plain = np.random.default_rng(0).bytes(3 * CHUNK_BYTES + 5)
    stored, envelope, keys = sealed(tmp_path, plain)
    step = CHUNK_BYTES + 16
    cut = [stored[at : at + step] for at in range(0, len(stored), step)]
    wrong = {
        "swapped": cut[1] + cut[0] + cut[2] + cut[3],
        "repeated": cut[0] + cut[0] + cut[2] + cut[3],
        "another length": stored[:-1],
        "without its end": b"".join(cut[:3]),
        "extended": stored + cut[3],
        "changed": bytes([stored[0] ^ 1]) + stored[1:],
    }
    for name, data in wrong.items():
        with pytest.raises(DecryptionError):
            _read_all(data, envelope, keys)
        assert data != stored, name
    shorter = envelope | {"plain_length": 3 * CHUNK_BYTES}
    with pytest.raises(DecryptionError):  # the envelope's MAC
        Opened.of(Bytes(stored[: 3 * step]), shorter, "demo", keys)
    forged = shorter | {"mac": envelope_mac(DEK, {k: v for k, v in shorter.items() if k != "mac"})}
    opened = Opened.of(Bytes(stored[: 3 * step]), forged, "demo", keys)
    with pytest.raises(DecryptionError):  # the last chunk is not sealed as the last
        opened.read(2 * CHUNK_BYTES, 1)
    with pytest.raises(DecryptionError):  # bound to its model
        Opened.of(Bytes(stored), envelope, "other", keys).read(0, 1)


def test_8_2_5_envelopes_are_checked_before_any_key_is_used(tmp_path: Path) -> None:
    _, envelope, _ = sealed(tmp_path, bytes(100))
    good = stored_bytes(100)
    check_envelope(envelope, good)
    argon = {"type": "argon2id", "m": 1 << 21, "t": 3, "p": 4, "salt": "AAAAAAAAAAAAAAAAAAAAAA==", "wrapped": "AA=="}
    kek = envelope["recipients"][0]  # type: ignore[index]
    wrong: list[dict[str, object]] = [
        {"suite": "ROT13"},
        {"salt": "00"},
        {"chunk": 4096},
        {"plain_length": 101},
        {"plain_length": -1},
        {"recipients": []},
        {"recipients": [kek] * 65},
        {"recipients": [argon]},
        {"recipients": [argon | {"m": 1 << 16}, kek]},
        {"recipients": [kek | {"wrapped": "%"}]},
        {"recipients": [{"type": "magic", "wrapped": "AA=="}]},
        {"mac": None},
        {"surprise": 1},
    ]
    for change in wrong:
        with pytest.raises(PackageError):
            check_envelope(envelope | change, good)


def test_x_6_every_changed_byte_of_an_encrypted_file_is_found_with_the_key(tmp_path: Path) -> None:
    to, keys = receiver(tmp_path, "kek")
    save_model(tmp_path / "m", {"a": np.arange(20, dtype=np.float32)})
    pack(tmp_path / "m", tmp_path / "p", Options(release=Release(package_id="demo"), to=[to]))
    file = next((tmp_path / "p").rglob("*.ptm"))
    good = file.read_bytes()
    for at in range(0, len(good), 7):  # the file alone, without its manifest
        file.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        with pytest.raises(PackageError):
            _read_file(file, keys)


def _read_file(file: Path, keys: Keys) -> None:
    with ModelFile.open(file, keys) as opened:
        model = opened.models[0]
        model.data.read(0, model.data.length)
