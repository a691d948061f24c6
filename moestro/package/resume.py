"""Go on where a killed process stopped: what it left beside the target is kept, checked by digest, never trusted.

    with folder_resumed(out, keep) as aside      as folder_aside, but of a leftover the files in `keep` are still there
    handle, former = reopen(path, mode)          such a file, and how many bytes it has
    Former(handle, start, length)                its bytes, to be hashed and written again

Only one process at a time works on a target: it holds a lock on the folder beside it, which ends with the process.
"""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moestro.core.errors import ConfigError
from moestro.core.files import ASIDE, cannot_write, put_in_place
from moestro.package.bulk import read_at


@contextmanager
def folder_resumed(path: Path, keep: Collection[str]) -> Iterator[Path]:
    """Yield a folder beside `path` that is empty but for files of `keep`; renamed to `path` when the block ends well.

    An error removes it; a kill or an interruption leaves it for the next try.

    raises  ConfigError where another process is at it or `path` exists, StorageError when the disk is full or refuses
    """
    aside = path.with_name(path.name + ASIDE)
    try:
        if aside.is_symlink():
            aside.unlink()
        aside.mkdir(parents=True, exist_ok=True)
        handle = os.open(aside, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
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


def reopen(path: Path, mode: int) -> tuple[int, int]:
    """A new file for reading and writing, or the one that is there, and its size.

    A file with another mode than a new one would get, or with a second name, gives way to a new one.
    """
    wanted = mode & path.parent.stat().st_mode
    with suppress(FileNotFoundError):
        found = path.lstat()
        if stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == wanted and found.st_nlink == 1:
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            return handle, os.fstat(handle).st_size
        path.unlink()
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), 0


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
