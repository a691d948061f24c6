"""Paths inside packages, and files opened so that no path or link leads out of the package's folder.

    check_path / check_paths     the rules, whatever wrote the path (R-8.2.1-3)
    open_below / create_below    component by component from one open folder, following no link (R-8.3.2-1)
    list_below                   every file of a folder; anything that is neither file nor folder is an error

Rules: UTF-8 in NFC, `/` between components, relative, nothing that Windows, macOS or a shell would read differently,
and no two paths that a case-insensitive disk would put in one place.
"""

import contextlib
import errno
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from moestro.core.errors import UnsafePath
from moestro.core.files import cannot_write
from moestro.package.limits import MAX_COMPONENT_BYTES, MAX_PATH_BYTES

FORBIDDEN = re.compile(r"[\\:\x00-\x1f\x7f]")
DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
"""Names that Windows takes for devices, with any ending."""
MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def check_model_id(model_id: object, what: str = "model_id") -> str:
    """R-8.2.1-2: 1 to 128 of A-Z a-z 0-9 . _ -, beginning with a letter or digit; also a safe folder name."""
    if not isinstance(model_id, str) or not MODEL_ID.fullmatch(model_id):
        raise UnsafePath(
            f"{what} is {str(model_id)[:60]!r}; "
            "it must have 1 to 128 of A-Z a-z 0-9 . _ - and begin with a letter or digit"
        )
    check_path(model_id)
    return model_id


def check_path(path: object) -> str:
    """The path itself, or UnsafePath naming the rule it breaks."""
    if not isinstance(path, str):
        raise UnsafePath(f"a path is {type(path).__name__}, not text")
    problem = _problem(path)
    if problem:
        raise UnsafePath(f"path {path[:80]!r} {problem}; such a path is never written")
    return path


def _problem(path: str) -> str:
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    if not path or len(encoded) > MAX_PATH_BYTES:
        return f"has {len(encoded)} bytes; 1 to {MAX_PATH_BYTES} are allowed"
    if not unicodedata.is_normalized("NFC", path):
        return "is not in Unicode form NFC"
    if FORBIDDEN.search(path):
        return "holds a backslash, colon or control character"
    return next(filter(None, map(_component_problem, path.split("/"))), "")


def _component_problem(component: str) -> str:
    if component in ("", ".", ".."):
        return f"has the component {component!r}"
    if component[-1] in ". ":
        return "has a component that ends in a dot or space"
    if len(component.encode()) > MAX_COMPONENT_BYTES:
        return f"has a component of over {MAX_COMPONENT_BYTES} bytes"
    if DEVICES.fullmatch(component):
        return f"has the component {component!r}, a device on Windows"
    return ""


def check_paths(paths: Iterable[object]) -> list[str]:
    """All of them, and no two that fall together after case folding, nor one inside the other."""
    checked = [check_path(path) for path in paths]
    folded: dict[str, str] = {}
    for path in checked:
        other = folded.setdefault(_fold(path), path)
        if other is not path:
            raise UnsafePath(f"paths {other!r} and {path!r} are one file on a disk that ignores case")
    for path in checked:
        parent = _fold(path).rpartition("/")[0]
        while parent:
            if parent in folded:
                raise UnsafePath(f"path {folded[parent]!r} is both a file and the folder of {path!r}")
            parent = parent.rpartition("/")[0]
    return checked


def _fold(path: str) -> str:
    return unicodedata.normalize("NFC", path.casefold())


def open_folder(folder: Path) -> int:
    """A handle on a folder, for the functions below; the caller closes it."""
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UnsafePath(f"{folder} cannot be opened as a folder: {error.strerror}") from error


def open_below(folder: int, path: str) -> int:
    """Open a regular file for reading; links on the way or at the end are refused."""
    *parents, name = check_path(path).split("/")
    try:
        with _walk(folder, parents, create=False) as parent:
            handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent.handle)
    except OSError as error:
        raise _refused(path, error) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UnsafePath(f"{path} is not a regular file; a package holds only files and folders")
    return handle


def create_below(folder: int, path: str, mode: int = 0o644) -> int:
    """Create a new file for reading and writing, with its folders; an existing file or a link is refused."""
    *parents, name = check_path(path).split("/")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with _walk(folder, parents, create=True) as parent:
            return os.open(name, flags, mode, dir_fd=parent.handle)
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: str, error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return cannot_write(Path(path), error)
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return UnsafePath(f"{path} leads through a link or a file; a package holds only files and folders")
    return UnsafePath(f"{path} cannot be opened: {os.strerror(error.errno or 0)}")


class _walk:  # noqa: N801 (used as a function in `with`)
    """The handle of the innermost folder, opened step by step."""

    def __init__(self, folder: int, parents: list[str], create: bool) -> None:
        self.handle = os.dup(folder)
        try:
            for name in parents:
                self._step(name, create)
        except BaseException:
            os.close(self.handle)
            raise

    def _step(self, name: str, create: bool) -> None:
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=self.handle)
        inner = os.open(name, FOLDER_FLAGS, dir_fd=self.handle)
        os.close(self.handle)
        self.handle = inner

    def __enter__(self) -> "_walk":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.handle)


def list_below(folder: Path) -> list[str]:
    """Paths of all files, sorted; a link, device or pipe anywhere is an error."""
    return check_paths(sorted(_files(folder, "")))


def _files(folder: Path, prefix: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = prefix + entry.name
            if entry.is_symlink() or not (entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)):
                raise UnsafePath(f"{path} is a link or device; a package holds only files and folders")
            if entry.is_dir(follow_symlinks=False):
                yield from _files(folder / entry.name, path + "/")
            else:
                yield path
