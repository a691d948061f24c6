"""`package.hashing`: trees as RFC 6962 draws them, and the same digests whichever way they are computed (0.3)."""

import hashlib
import os

import pytest

from moestro.core.errors import FormatError
from moestro.package import kernels
from moestro.package.hashing import check_hash, digest, leaf_hashes, root_of, tree_root


def root_by_definition(leaves: list[bytes]) -> bytes:
    """RFC 6962, 2.1, word for word."""
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return hashlib.sha256(b"\1" + root_by_definition(leaves[:split]) + root_by_definition(leaves[split:])).digest()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 33])
def test_roots_follow_rfc_6962(count: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(kernels, "has_sha256", lambda: False)
    pieces = [os.urandom(100) for _ in range(count)]
    assert root_of("sha256", b"".join(pieces), 100) == root_by_definition(pieces)


def test_the_published_roots_of_rfc_6962_hold() -> None:
    """Inputs and roots of the Certificate Transparency reference tests (google/certificate-transparency)."""
    inputs = [
        b"",
        b"\0",
        b"\x10",
        b"\x20\x21",
        b"\x30\x31",
        b"\x40\x41\x42\x43",
        bytes(range(0x50, 0x58)),
        bytes(range(0x60, 0x70)),
    ]
    leaves = b"".join(digest("sha256", b"\0", data) for data in inputs)
    assert tree_root("sha256", leaves[:32]).hex().startswith("6e340b9cffb37a98")
    assert tree_root("sha256", leaves).hex() == "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"


@pytest.mark.skipif(not kernels.has_sha256(), reason="no SHA instructions here")
@pytest.mark.parametrize("length", [*range(0, 200), 64 * 50 - 1, 64 * 50, 64 * 50 + 1, 12345])
def test_pieces_hashed_together_equal_pieces_hashed_alone(length: int) -> None:
    data = os.urandom(length)
    for piece in (max(1, length), 64, 63, 65, 119, 120, 1000):
        alone = b"".join(hashlib.sha256(b"\0" + data[i : i + piece]).digest() for i in range(0, length, piece))
        assert leaf_hashes("sha256", data, piece) == alone


def test_blake3_and_sm3_make_trees_too() -> None:
    for name in ("blake3", "sm3"):
        pieces = [b"ab", b"cd", b"e"]
        leaves = [digest(name, b"\0", piece) for piece in pieces]
        pair = digest(name, b"\1", leaves[0], leaves[1])
        assert root_of(name, b"abcde", 2) == digest(name, b"\1", pair, leaves[2])


def test_an_unknown_hash_is_named() -> None:
    with pytest.raises(FormatError, match="hash is 'md5'; known are sha256, blake3, sm3"):
        check_hash("md5")
