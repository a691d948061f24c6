"""Digests and trees of digests: one pass over the bytes serves a tensor, its file and the package.

    leaf_hashes(name, data, piece) -> 32 bytes per piece        tree_root(name, leaves) -> 32 bytes

RFC 6962: leaf = H(0x00 | bytes), node = H(0x01 | left | right), split at the largest power of two below n, empty
tree = H(""). SHA-256 runs three pieces at once in `kernels.cpp`, 2.5 times as fast as one after another, where the
CPU has instructions for it; else, and for the other hashes, each piece goes through its library.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

from moestro.core.errors import FormatError, UnsupportedVersion
from moestro.package import kernels

HASHES = ("sha256", "blake3", "sm3")
SIZE = 32
"""Bytes of every digest."""
Buffer = bytes | bytearray | memoryview


def new_hash(name: str) -> Any:
    """A hash object with `update` and `digest`."""
    return _maker(name)()


def check_hash(name: object) -> str:
    """The name of a known hash that this machine has."""
    if not isinstance(name, str) or name not in HASHES:
        raise FormatError(f"hash is {str(name)[:40]!r}; known are {', '.join(HASHES)}")
    _maker(name)
    return name


@functools.cache
def _maker(name: str) -> Callable[[], Any]:
    match name:
        case "sha256":
            return hashlib.sha256
        case "blake3":
            try:
                from blake3 import blake3
            except ImportError as error:
                raise UnsupportedVersion("hash is blake3, which needs: pip install 'moestro[package]'") from error
            return blake3
        case "sm3" if "sm3" in hashlib.algorithms_available:
            return lambda: hashlib.new("sm3")
    raise UnsupportedVersion(f"hash is {name}, which this Python's OpenSSL lacks; use sha256")


def digest(name: str, *parts: Buffer) -> bytes:
    """H(parts joined)."""
    state = new_hash(name)
    for part in parts:
        state.update(part)
    return bytes(state.digest())


def leaf_hashes(name: str, data: Buffer, piece: int) -> bytes:
    """The leaf hashes of consecutive pieces, joined; no data has no leaves.

    piece   bytes under one leaf; the last may have fewer
    """
    view = memoryview(data).cast("B")
    if name == "sha256" and kernels.has_sha256():
        return kernels.sha256_leaves(view, piece)
    return b"".join(digest(name, b"\0", view[start : start + piece]) for start in range(0, len(view), piece))


def tree_root(name: str, leaves: Buffer) -> bytes:
    """The root over joined leaf hashes."""
    if not leaves:
        return digest(name)
    if name == "sha256" and kernels.has_sha256():
        return kernels.sha256_root(leaves)
    row = [bytes(leaves[start : start + SIZE]) for start in range(0, len(leaves), SIZE)]
    while len(row) > 1:  # pairing from the left and carrying an odd last node up is the split of RFC 6962
        paired = [digest(name, b"\1", row[i], row[i + 1]) for i in range(0, len(row) - 1, 2)]
        row = paired + row[len(row) & ~1 :]
    return row[0]


def root_of(name: str, data: Buffer, piece: int) -> bytes:
    """The tree root of data cut into pieces."""
    return tree_root(name, leaf_hashes(name, data, piece))
