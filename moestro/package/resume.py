"""Go on where a killed process stopped: what it left beside the target is kept, checked by digest, never trusted.

    with folder_resumed(out, keep) as aside      as folder_aside, but of a leftover the files in `keep` are still there
    reopen(path, mode) -> Leftover               such a file, to be gone on with
    with set_aside(path, mode, keys) as left     an encrypted one, only to be read
    left.in_clear(start), left.sealed(...)       find its bytes, to be hashed and written again

An encrypted file is never gone on with: under one key, no chunk may be sealed twice, since a base or update that was
damaged meanwhile would give other bytes under the same nonce. Each try has a key of its own, and what the former one
left is decrypted, compared with its digests and encrypted again. Its key is read from the envelope that it began with,
so that only who can read the result can go on with it.

Only one process at a time works on a target: it holds a lock on the folder beside it, which ends with the process.
"""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.core.errors import ConfigError, FormatError, PackageError
from moestro.core.files import ASIDE, cannot_write, put_in_place
from moestro.package.bulk import read_at
from moestro.package.descriptor import Descriptor
from moestro.package.encrypt import Keys, Opened, check_envelope, stored_bytes
from moestro.package.layout import MODEL_HEADER, data_start, round_up
from moestro.package.limits import CHUNK_BYTES, MAX_DESCRIPTOR_BYTES
from moestro.package.paths import FOLDER_FLAGS
from moestro.package.spans import Part, Span


@contextmanager
def folder_resumed(path: Path, keep: Collection[str]) -> Iterator[Path]:
    """Yield a folder beside `path` that is empty but for files of `keep`; renamed to `path` when the block ends well.

    An error removes it; a kill or an interruption leaves it for the next try.

    raises  ConfigError where another process is at it or `path` exists, StorageError when the disk is full or refuses
    """
    aside = path.with_name(path.name + ASIDE)
    try:
        handle = _open_or_make(aside)
    except OSError as error:
        raise cannot_write(aside, error) from error
    try:
        alone = _lock(handle, aside)
        try:
            if path.exists() or path.is_symlink():
                raise ConfigError(f"{path} exists already; packages are never overwritten: choose another name")
            _clear(aside, keep if alone else ())
            yield aside
            put_in_place(aside, path)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise cannot_write(path, error) from error
        except Exception:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _open_or_make(aside: Path) -> int:
    """A handle on the folder. A link in its place gives way, and what another user left, unless he is at it: he could
    change there what has been compared."""
    if aside.is_symlink():
        aside.unlink()
    aside.mkdir(parents=True, exist_ok=True)
    handle = os.open(aside, FOLDER_FLAGS)
    if os.fstat(handle).st_uid == os.geteuid():
        return handle
    try:
        _lock(handle, aside)
        shutil.rmtree(aside)
    finally:
        os.close(handle)
    aside.mkdir()
    return os.open(aside, FOLDER_FLAGS)


def _lock(handle: int, aside: Path) -> bool:
    """False on a file system without locks, where nothing is kept."""
    busy = ConfigError(f"another process is writing {aside}; wait for it, or choose another name")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise busy from error
    except OSError:
        return False
    try:
        same = os.path.samestat(os.fstat(handle), os.lstat(aside))
    except FileNotFoundError:
        same = False
    if not same:  # the other one ended between our opening and locking
        raise busy
    return True


def _clear(folder: Path, keep: Collection[str]) -> None:
    """Remove all but regular files of `keep` and the folders above them."""
    for root, folders, files in os.walk(folder, topdown=False, followlinks=False):
        for name in files + folders:
            path = Path(root, name)
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode):
                with suppress(OSError):  # not empty: something below is kept
                    path.rmdir()
            elif not stat.S_ISREG(mode) or path.relative_to(folder).as_posix() not in keep:
                path.unlink()


Find = Callable[[int, int], Span | None]
"""So many bytes of a model's data from an offset on; None where they are not there."""


class Former:
    """A span over an open file that is being written again; read, not mapped."""

    def __init__(self, handle: int, start: int, length: int) -> None:
        self.handle, self.start, self._length = handle, start, length

    @property
    def length(self) -> int:
        return self._length

    def read(self, start: int, count: int) -> memoryview:
        buffer = memoryview(bytearray(count))
        if read_at(self.handle, buffer, self.start + start) != count:
            raise OSError(errno.EIO, "a file became shorter while it was being written")
        return buffer


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a killed try left of a model file."""

    handle: int
    num_bytes: int
    """0 where there is nothing."""
    keys: Keys

    def in_clear(self, start: int) -> Find:
        """Data that begins at byte `start` of the file."""

        def find(offset: int, length: int) -> Span | None:
            at = start + offset
            return Former(self.handle, at, length) if at + length <= self.num_bytes else None

        return find

    def sealed(self, header_offset: int, align_log2: int, model_id: str, head_bytes: int) -> Find:
        """Encrypted data; nothing of it where no key fits.

        header_offset   of the model header and descriptor, which a try writes first of all
        head_bytes      of plaintext before the data; these, and what shares a chunk with them, a try writes last of all
        """
        try:
            stored, envelope = self._begun(header_offset, align_log2)
            opened = Opened.of(stored, envelope, model_id, self.keys)
        except (PackageError, OSError):
            return lambda offset, length: None
        first = (-(-head_bytes // CHUNK_BYTES) + 1) * CHUNK_BYTES
        there = self.num_bytes - stored.start

        def find(offset: int, length: int) -> Span | None:
            start = head_bytes + offset
            if start < first or start + length > opened.length:
                return None
            end = stored_bytes(min(round_up(start + length, CHUNK_BYTES), opened.length))
            return Part(opened, start, length) if end <= there else None

        return find

    def _begun(self, header_offset: int, align_log2: int) -> tuple[Former, dict[str, Any]]:
        """Ciphertext, of which much may be missing at the end, and its envelope."""
        if self.num_bytes < header_offset + MODEL_HEADER.size:
            raise FormatError("the file ends before the model header", offset=header_offset)
        header = Former(self.handle, header_offset, MODEL_HEADER.size).read(0, MODEL_HEADER.size)
        _, flags, text_bytes, low, high = MODEL_HEADER.unpack(header)
        if text_bytes > min(self.num_bytes, MAX_DESCRIPTOR_BYTES):
            raise FormatError(f"a descriptor of {text_bytes} bytes runs past the end", offset=header_offset)
        text = Former(self.handle, header_offset + MODEL_HEADER.size, text_bytes).read(0, text_bytes)
        data_bytes = low | high << 32
        descriptor = Descriptor.parse(bytes(text), flags, data_bytes, "a leftover")
        stored = Former(self.handle, data_start(header_offset, text_bytes, align_log2), data_bytes)
        return stored, check_envelope(descriptor.encryption, data_bytes)


def reopen(path: Path, mode: int) -> Leftover:
    """A new file for reading and writing, or the one that is there.

    A file with another owner or mode than a new one would get, or with a second name, gives way to a new one.
    """
    size = _kept(path, mode)
    if not size:
        return Leftover(create(path, mode), 0, Keys())
    return Leftover(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), size, Keys())


def create(path: Path, mode: int) -> int:
    """A new file for reading and writing."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)


@contextmanager
def set_aside(path: Path, mode: int, keys: Keys) -> Iterator[Leftover]:
    """The file that is there, or the one that was set aside before if that is longer; deleted when the block ends well.

    keys   to read it with; without any its room on the disk is given back at once
    """
    former = former_of(path)
    last, before = (_kept(path, mode), _kept(former, mode)) if keys else (0, 0)
    if last > before:
        path.replace(former)
    path.unlink(missing_ok=True)
    if not last and not before:
        former.unlink(missing_ok=True)
        yield Leftover(-1, 0, keys)
        return
    handle = os.open(former, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield Leftover(handle, max(last, before), keys)
    finally:
        os.close(handle)
    former.unlink()


def former_of(path: Path) -> Path:
    """Where an encrypted file is set aside."""
    return path.with_name(path.name + ".former")


def _kept(path: Path, mode: int) -> int:
    """Bytes of a regular file with owner and mode of a new one and no second name; anything else is removed: 0."""
    with suppress(FileNotFoundError):
        found, wanted = path.lstat(), mode & path.parent.stat().st_mode
        alone = stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_uid == os.geteuid()
        if alone and stat.S_IMODE(found.st_mode) == wanted and found.st_size:
            return found.st_size
        path.unlink()
    return 0
