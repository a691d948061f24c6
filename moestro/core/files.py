"""Files that are whole or absent: written aside, flushed to the disk, then renamed.

    write_text / write_bytes   one file
    folder_aside               a folder of files: fill it inside the `with`, it appears under its name at the end

Nothing is ever half-written under its final name, and a failure leaves what was there before.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moestro.core.errors import StorageError
from moestro.core.units import bytes_text

ASIDE = ".partial"
"""Ending of files and folders that are being written; a leftover one may be deleted."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; raises StorageError when the disk is full or refuses."""
    aside = path.with_name(path.name + ASIDE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(content)
            flush_to_disk(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all."""
    write_bytes(path, text.encode())


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; when the block ends well it is flushed and renamed to `path`.

    An existing `path` is replaced only after the new folder is complete. Raises StorageError when the disk
    is full or refuses; then `path` is as it was.
    """
    aside = path.with_name(path.name + ASIDE)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        put_in_place(aside, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def put_in_place(aside: Path, path: Path) -> None:
    """Flush a complete folder and give it its name; what had the name is deleted after that."""
    old = path.with_name(path.name + ".old" + ASIDE)
    for file in aside.rglob("*"):
        flush_path(file)
    flush_path(aside)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    aside.rename(path)
    flush_path(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush_path(path: Path) -> None:
    """Make a file or folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        flush_to_disk(handle)
    finally:
        os.close(handle)


def flush_to_disk(handle: int) -> None:
    """fsync, tolerating file systems that do not offer it."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise


def cannot_write(path: Path, error: OSError) -> StorageError:
    """One line that says why a file could not be written and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = bytes_text(shutil.disk_usage(existing_parent(path)).free)
        return StorageError(
            f"{path} cannot be written: {os.strerror(error.errno)} ({free} free); "
            "free some space or choose another folder; nothing was overwritten"
        )
    return StorageError(f"{path} cannot be written: {error.strerror or error}; choose another folder")


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
