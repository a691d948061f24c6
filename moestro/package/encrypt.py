"""Encryption of a model's data (specification 8.2.5, our design on public practice: age's STREAM and header MAC, HPKE).

    seal = Sealer(recipients, model_id)          writer -> ciphertext
    Opened.of(envelope, model_id, keys)          reader -> plaintext, chunk by chunk

A random data key per model is wrapped for each recipient. Data goes in chunks of 1 MiB, each sealed with its number
and whether it is the last, so that any chunk opens alone, while truncation, exchange and extension all fail. Whatever
fails gives one error that does not say what failed; no byte of a chunk is released before its tag has verified.
"""

import hmac
import os
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moestro.core.errors import ConfigError, DecryptionError, FormatError, LimitExceeded, UnsupportedVersion
from moestro.package import canonical
from moestro.package.bulk import aligned, write_all
from moestro.package.fields import Fields
from moestro.package.hashing import Buffer, leaf_hashes
from moestro.package.keys import PrivateKey, PublicKey, key_of_kek
from moestro.package.limits import CHUNK_BYTES, MAX_FILE_BYTES, MAX_RECIPIENTS
from moestro.package.sink import Sink
from moestro.package.spans import Span

TAG_BYTES = 16
KEY_BYTES = 32
SUITES = {"A256GCM": 32, "SM4GCM": 16, "C20P1305": 32}
"""Name and key bytes."""
ARGON_LIMITS = {"m": 1 << 20, "t": 16, "p": 16}
"""Largest memory in KiB, passes and lanes that a reader accepts."""
ARGON_DEFAULT = {"m": 1 << 16, "t": 3, "p": 4}
FAILED = "decryption failed: wrong key, or the encrypted bytes were changed"


class Cipher(Protocol):
    """An authenticated cipher with 12-byte nonces and 16-byte tags."""

    def encrypt_into(self, nonce: bytes, data: Buffer, associated_data: bytes, buf: Buffer) -> int: ...
    def decrypt_into(self, nonce: bytes, data: Buffer, associated_data: bytes, buf: Buffer) -> int: ...


@dataclass(frozen=True, slots=True)
class Password:
    """A recipient that is a password; it must be the only one."""

    password: str


@dataclass(frozen=True, slots=True)
class Kek:
    """A recipient that is a key-encryption key, for example from a key service."""

    kid: str
    key: bytes


Recipient = PublicKey | Password | Kek


@dataclass(frozen=True, slots=True)
class Keys:
    """What a reader may open models with."""

    private: Sequence[PrivateKey] = ()
    password: str | None = None
    kek: Callable[[str], bytes | None] | None = None
    """Gives the key-encryption key of an id, or None where it has none."""

    def __bool__(self) -> bool:
        """True where there is any key at all."""
        return bool(self.private) or self.password is not None or self.kek is not None


def _cipher(suite: str, key: bytes) -> Cipher:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

    match suite:
        case "A256GCM":
            return AESGCM(key)
        case "C20P1305":
            return ChaCha20Poly1305(key)
    return _Sm4(key)


class _Sm4:
    """SM4-GCM in the shape of the other two."""

    def __init__(self, key: bytes) -> None:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.ciphers import Cipher as Mode
        from cryptography.hazmat.primitives.ciphers import algorithms, modes

        def mode(nonce: bytes, tag: bytes | None = None) -> Any:
            return Mode(algorithms.SM4(key), modes.GCM(nonce, tag))

        self._mode = mode
        try:
            mode(bytes(12)).encryptor()
        except UnsupportedAlgorithm as error:
            raise UnsupportedVersion("suite is SM4GCM, which this machine's OpenSSL lacks; use A256GCM") from error

    def encrypt_into(self, nonce: bytes, data: Buffer, associated_data: bytes, buf: Buffer) -> int:
        run = self._mode(nonce).encryptor()
        run.authenticate_additional_data(associated_data)
        sealed = run.update(data) + run.finalize() + run.tag
        memoryview(buf)[:] = sealed
        return len(sealed)

    def decrypt_into(self, nonce: bytes, data: Buffer, associated_data: bytes, buf: Buffer) -> int:
        view = memoryview(data)
        run = self._mode(nonce, bytes(view[-TAG_BYTES:])).decryptor()
        run.authenticate_additional_data(associated_data)
        plain = run.update(view[:-TAG_BYTES]) + run.finalize()
        memoryview(buf)[:] = plain
        return len(plain)


def derive(dek: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """HKDF-SHA-256."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), length, salt, info).derive(dek)


def nonce_of(index: int, last: bool) -> bytes:
    """Eleven bytes of chunk number, big end first, and 1 for the last chunk."""
    return index.to_bytes(11, "big") + bytes([last])


def stored_bytes(plain_length: int) -> int:
    """Ciphertext of so much plaintext: a tag per chunk."""
    return plain_length + TAG_BYTES * -(-plain_length // CHUNK_BYTES)


def envelope_mac(dek: bytes, envelope: Mapping[str, Any]) -> str:
    """Commits to the key and to everything in the envelope."""
    key = derive(dek, bytes.fromhex(envelope["salt"]), b"PTMF/1 envelope", KEY_BYTES)
    rest = {name: value for name, value in envelope.items() if name != "mac"}
    return hmac.new(key, canonical.dumps(rest), "sha256").hexdigest()


def associated_data(suite: str, salt: bytes, model_id: str) -> bytes:
    """What every chunk is bound to. The length is not in it, so that data can be sealed as it is made; the last
    chunk's nonce and the envelope's MAC fix the length. Recipients are not in it, so that they can be changed."""
    from hashlib import sha256

    table = {"chunk": CHUNK_BYTES, "model_id": model_id, "salt": salt.hex(), "suite": suite}
    return sha256(canonical.dumps(table)).digest()


@dataclass(frozen=True, slots=True)
class Place:
    """Where ciphertext goes."""

    handle: int
    path: Path
    start: int
    """Byte of the file; a multiple of 4096."""
    hash: str


class Sealer:
    """Makes the envelope and ciphertext of one model."""

    def __init__(
        self,
        recipients: Sequence[Recipient],
        model_id: str,
        suite: str = "A256GCM",
        dek: bytes | None = None,
        salt: bytes | None = None,
    ) -> None:
        """`dek` and `salt` are drawn at random; only known-answer tests and re-wrapping give them."""
        if suite not in SUITES:
            raise ConfigError(f"suite is {suite}; it must be one of {', '.join(SUITES)}")
        self.model_id, self.suite = model_id, suite
        self.dek, self.salt = dek or os.urandom(KEY_BYTES), salt or os.urandom(KEY_BYTES)
        self.recipients = wrapped_for(recipients, self.dek, model_id)
        self.associated = associated_data(suite, self.salt, model_id)
        self.cipher = _cipher(suite, derive(self.dek, self.salt, b"PTMF/1 payload", SUITES[suite]))

    def envelope(self, plain_length: int) -> dict[str, Any]:
        """The descriptor's `encryption`."""
        table = {"suite": self.suite, "salt": self.salt.hex(), "chunk": CHUNK_BYTES, "plain_length": plain_length}
        table |= {"recipients": self.recipients}
        return table | {"mac": envelope_mac(self.dek, table)}

    def stream(self, place: Place, head_bytes: int) -> "EncryptingStream":
        """A sink for the plaintext after the first `head_bytes`."""
        return EncryptingStream(self, place, head_bytes)

    def seal(self, index: int, chunk: Buffer, last: bool, out: memoryview | None = None) -> memoryview:
        """One chunk and its tag, in `out` where that is given."""
        if out is None:
            out = memoryview(bytearray(len(chunk) + TAG_BYTES))
        self.cipher.encrypt_into(nonce_of(index, last), chunk, self.associated, out)
        return out


class EncryptingStream:
    """Seals chunks as they fill; those that hold the head stay in memory until it is known.

    Ciphertext from the first whole MiB after the head on goes through a sink, which hashes it on its way.
    """

    def __init__(self, sealer: Sealer, place: Place, head_bytes: int) -> None:
        self.sealer, self.place = sealer, place
        self.length = 0
        """Plaintext bytes after the head."""
        self._head_bytes = head_bytes
        self._first = bytearray()
        """What shares a chunk with the end of the head."""
        self._first_room = -head_bytes % CHUNK_BYTES
        self._stage, self._staged = aligned(CHUNK_BYTES), 0
        """At most one chunk and how much of it is there; the last one until the end is known, since it is sealed so."""
        self._next = num_head = -(-head_bytes // CHUNK_BYTES)
        self._edge = bytearray()
        """Ciphertext between the head's chunks and where the sink begins."""
        self._edge_room = CHUNK_BYTES - TAG_BYTES * num_head
        os.lseek(place.handle, place.start + (num_head + 1) * CHUNK_BYTES, os.SEEK_SET)
        self._sink = Sink(place.handle, place.path, place.hash, CHUNK_BYTES, direct=True)

    def write(self, data: Buffer, leaves: bytes | None = None) -> None:
        """Append plaintext."""
        view = memoryview(data).cast("B")
        self.length += len(view)
        room = self._first_room - len(self._first)
        self._first += view[:room]
        view = view[room:]
        if self._staged and self._staged + len(view) > CHUNK_BYTES:
            view = view[self._keep(view) :]
            self._seal(self._stage, last=False)
            self._staged = 0
        while len(view) > CHUNK_BYTES:
            self._seal(view[:CHUNK_BYTES], last=False)
            view = view[CHUNK_BYTES:]
        self._keep(view)

    def pad_to(self, length: int) -> None:
        """Append zero bytes up to a length."""
        self.write(bytes(length - self.length))

    def at_chunk_start(self) -> bool:
        """Leaves of plaintext are of no use here."""
        return False

    def close(self, head: bytes) -> tuple[int, bytes]:
        """Seal what is left, then the chunks with the head; returns stored bytes and leaf hashes of their chunks."""
        assert len(head) == self._head_bytes
        if self._staged:
            self._seal(self._stage[: self._staged], last=True)
        leaves, place = self._sink.finish(), self.place
        front, plain = bytearray(), memoryview(head + self._first)
        for index, start in enumerate(range(0, len(plain), CHUNK_BYTES)):
            last = self.length <= self._first_room and start + CHUNK_BYTES >= len(plain)
            front += self.sealer.seal(index, plain[start : start + CHUNK_BYTES], last)
        front += self._edge
        os.lseek(place.handle, place.start, os.SEEK_SET)
        write_all(place.handle, front, place.path)
        return stored_bytes(len(head) + self.length), leaf_hashes(place.hash, front, CHUNK_BYTES) + leaves

    def _keep(self, view: memoryview) -> int:
        """Stage what there is room for; returns how much that was."""
        count = min(len(view), CHUNK_BYTES - self._staged)
        self._stage[self._staged : self._staged + count] = view[:count]
        self._staged += count
        return count

    def _seal(self, chunk: Buffer, last: bool) -> None:
        room, size = self._edge_room - len(self._edge), len(chunk) + TAG_BYTES
        if room:
            sealed = self.sealer.seal(self._next, chunk, last)
            self._edge += sealed[:room]
            self._sink.write(sealed[room:])
        else:
            self.sealer.seal(self._next, chunk, last, self._sink.room(size))
            self._sink.took(size)
        self._next += 1


class Opened:
    """The plaintext of a model as a span; chunks are opened when they are read, and the last one is kept."""

    def __init__(self, stored: Span, dek: bytes, envelope: Mapping[str, Any], model_id: str) -> None:
        self.stored, self.dek, self._length = stored, dek, int(envelope["plain_length"])
        salt = bytes.fromhex(envelope["salt"])
        self.associated = associated_data(envelope["suite"], salt, model_id)
        key = derive(dek, salt, b"PTMF/1 payload", SUITES[envelope["suite"]])
        self.cipher = _cipher(envelope["suite"], key)
        self._kept = -1, memoryview(b"")
        """The last chunk of which only a part was asked for, after its number; one value, since threads may read."""

    @classmethod
    def of(cls, stored: Span, envelope: Mapping[str, Any], model_id: str, keys: Keys) -> "Opened":
        """Unwrap the data key and check the envelope's MAC; raises DecryptionError."""
        dek = unwrapped(envelope["recipients"], keys, model_id)
        if dek is None or not hmac.compare_digest(envelope_mac(dek, envelope), envelope["mac"]):
            raise DecryptionError(f"{model_id}: {FAILED}")
        if stored.length != stored_bytes(envelope["plain_length"]):
            raise DecryptionError(f"{model_id}: {FAILED}")
        return cls(stored, dek, envelope, model_id)

    @property
    def length(self) -> int:
        return self._length

    def read(self, start: int, count: int) -> memoryview:
        """Plaintext; raises DecryptionError where a chunk does not verify."""
        out, end = memoryview(bytearray(count)), start + count
        for index in range(start // CHUNK_BYTES, -(-end // CHUNK_BYTES) if count else 0):
            first = index * CHUNK_BYTES
            chunk_end = min(first + CHUNK_BYTES, self._length)
            low, high = max(start, first), min(end, chunk_end)
            kept, chunk = self._kept
            if (low, high) == (first, chunk_end) and index != kept:
                self._open(index, out[low - start : high - start])
                continue
            if index != kept:
                chunk = memoryview(bytearray(chunk_end - first))
                self._open(index, chunk)
                self._kept = index, chunk
            out[low - start : high - start] = chunk[low - first : high - first]
        return out

    def _open(self, index: int, out: memoryview) -> None:
        """Decrypt a chunk; what `out` holds after an error is not plaintext that anybody may see."""
        from cryptography.exceptions import InvalidTag

        size = CHUNK_BYTES + TAG_BYTES
        last = (index + 1) * CHUNK_BYTES >= self._length
        sealed = self.stored.read(index * size, min(size, self.stored.length - index * size))
        try:
            self.cipher.decrypt_into(nonce_of(index, last), sealed, self.associated, out)
        except InvalidTag as error:
            raise DecryptionError(FAILED) from error


def check_envelope(table: Any, data_bytes: int) -> dict[str, Any]:
    """The `encryption` of a descriptor, every field checked before any key is used."""
    fields = Fields(table, "encryption")
    suite = fields.text("suite")
    if suite not in SUITES:
        raise UnsupportedVersion(f"encryption suite is {suite[:20]!r}; known are {', '.join(SUITES)}")
    fields.hex32("salt")
    fields.hex32("mac")
    fields.whole("chunk", CHUNK_BYTES, CHUNK_BYTES)
    plain_length = fields.whole("plain_length", 8, MAX_FILE_BYTES)
    recipients = fields.items("recipients", MAX_RECIPIENTS)
    fields.finish()
    if not recipients:
        raise FormatError("encryption names no recipient")
    kinds = [_check_recipient(recipient) for recipient in recipients]
    if "argon2id" in kinds and len(kinds) > 1:
        raise FormatError("a password must be the only recipient")
    if stored_bytes(plain_length) != data_bytes:
        raise FormatError(f"{plain_length} bytes of plaintext do not make {data_bytes} stored bytes")
    return dict(fields.table)


def _check_recipient(recipient: Any) -> str:
    fields = Fields(recipient, "a recipient")
    kind = fields.text("type")
    _unbase64(fields.text("wrapped"))
    match kind:
        case "hpke":
            fields.text("kem", 40)
            fields.text("kid", 8)
        case "argon2id":
            for name, most in ARGON_LIMITS.items():
                value = fields.any(name)
                if type(value) is not int or value > most:
                    raise LimitExceeded(f"argon2id: {name} is {str(value)[:20]}; at most {most} is allowed")
                fields.whole(name, 8 * ARGON_DEFAULT["p"] if name == "m" else 1, most)
            if len(_unbase64(fields.text("salt"))) != 16:
                raise FormatError("argon2id: salt must have 16 bytes")
        case "kek":
            fields.text("kid", 512)
        case _:
            raise UnsupportedVersion(f"a recipient of type {kind[:20]!r}; known are hpke, argon2id, kek")
    fields.finish()
    return kind


def _unbase64(text: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except ValueError as error:
        raise FormatError(f"a recipient's {text[:20]!r} is not base64") from error


def _info(model_id: str) -> bytes:
    return b"PTMF/1 dek\0" + model_id.encode()


def _password_key(password: str, salt: bytes, cost: Mapping[str, Any]) -> bytes:
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

    kdf = Argon2id(salt=salt, length=KEY_BYTES, iterations=cost["t"], lanes=cost["p"], memory_cost=cost["m"])
    return kdf.derive(password.encode())


def wrapped_for(recipients: Sequence[Recipient], dek: bytes, model_id: str) -> list[dict[str, Any]]:
    """The data key, wrapped once for each recipient."""
    if not 1 <= len(recipients) <= MAX_RECIPIENTS:
        raise ConfigError(f"{len(recipients)} recipients; give 1 to {MAX_RECIPIENTS} with --to")
    if len(recipients) > 1 and any(isinstance(recipient, Password) for recipient in recipients):
        raise ConfigError("a password cannot stand beside other recipients; encrypt with one or the other")
    return [_wrap(recipient, dek, model_id) for recipient in recipients]


def _wrap(recipient: Recipient, dek: bytes, model_id: str) -> dict[str, Any]:
    from cryptography.hazmat.primitives.keywrap import aes_key_wrap

    match recipient:
        case PublicKey():
            wrapped = recipient.encapsulate(dek, _info(model_id))
            return {"type": "hpke", "kem": recipient.kem, "kid": recipient.kid, "wrapped": _base64(wrapped)}
        case Password(password):
            salt = os.urandom(16)
            wrapped = aes_key_wrap(_password_key(password, salt, ARGON_DEFAULT), dek)
            return {"type": "argon2id", **ARGON_DEFAULT, "salt": _base64(salt), "wrapped": _base64(wrapped)}
        case Kek(kid, key):
            return {"type": "kek", "kid": kid, "wrapped": _base64(aes_key_wrap(key_of_kek(key), dek))}


def _base64(data: bytes) -> str:
    return b64encode(data).decode()


def unwrapped(recipients: Sequence[Mapping[str, Any]], keys: Keys, model_id: str) -> bytes | None:
    """The data key by the first recipient that one of the keys fits, or None."""
    for recipient in recipients:
        dek = _unwrap(recipient, keys, model_id)
        if dek is not None and len(dek) == KEY_BYTES:
            return dek
    return None


def _unwrap(recipient: Mapping[str, Any], keys: Keys, model_id: str) -> bytes | None:
    from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap

    wrapped = _unbase64(recipient["wrapped"])
    if recipient["type"] == "hpke":
        fitting = [key for key in keys.private if (key.kem, key.kid) == (recipient["kem"], recipient["kid"])]
        return next(filter(None, (key.decapsulate(wrapped, _info(model_id)) for key in fitting)), None)
    if recipient["type"] == "kek":
        key = None if keys.kek is None else keys.kek(recipient["kid"])
        key = None if key is None else key_of_kek(key)
    else:
        key = None if keys.password is None else _password_key(keys.password, _unbase64(recipient["salt"]), recipient)
    try:
        return None if key is None else aes_key_unwrap(key, wrapped)
    except (InvalidUnwrap, ValueError):
        return None
