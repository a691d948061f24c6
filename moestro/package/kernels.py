"""The compiled hot loops of packaging: digests (`sha256.cpp`) and codecs (`codecs/codecs.cpp`).

Built at first use by `core.native`. Every caller has a plain way to the same bytes for machines where `codecs()` is
None or `has_sha256()` is false; setting MOESTRO_CPU_KERNELS=off takes that way everywhere.
"""

import ctypes
import functools
from pathlib import Path

import numpy as np

from moestro.core.native import load_native

FLAGS = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fPIC"]
"""No fused multiply-add: residuals are rebuilt bit for bit on machines that lack it."""
HERE = Path(__file__).parent
POINTER = ctypes.c_void_p
INTEGER = ctypes.c_int64


def pointer(data: bytes | bytearray | memoryview | np.ndarray) -> int:
    """Address of contiguous bytes; the caller keeps the object alive during the call."""
    return int(np.frombuffer(data, np.uint8).ctypes.data) if not isinstance(data, np.ndarray) else int(data.ctypes.data)


@functools.cache
def _digests() -> ctypes.CDLL | None:
    library, _ = load_native(HERE / "sha256.cpp", FLAGS)
    if library is None or not library.has_sha256():
        return None
    library.sha256_leaves.argtypes = [POINTER, INTEGER, INTEGER, POINTER]
    library.sha256_root.argtypes = [POINTER, INTEGER, POINTER]
    return library


def has_sha256() -> bool:
    """True where several SHA-256 run at once."""
    return _digests() is not None


def sha256_leaves(data: memoryview, piece: int) -> bytes:
    """Leaf hashes of consecutive pieces, joined."""
    library = _digests()
    assert library is not None
    out = np.empty((-(-len(data) // piece), 32), np.uint8)
    if len(data):
        library.sha256_leaves(pointer(data), len(data), piece, out.ctypes.data)
    return out.tobytes()


def sha256_root(leaves: bytes | bytearray | memoryview) -> bytes:
    """Root of the tree over one or more leaf hashes."""
    library = _digests()
    assert library is not None
    row, out = np.frombuffer(leaves, np.uint8).copy(), np.empty(32, np.uint8)
    library.sha256_root(row.ctypes.data, len(row) // 32, out.ctypes.data)
    return out.tobytes()


@functools.cache
def codecs() -> ctypes.CDLL | None:
    """The loops of the codecs, or None where they cannot be compiled."""
    library, _ = load_native(HERE / "codecs" / "codecs.cpp", FLAGS)
    if library is None:
        return None
    arguments = {
        "split_planes": "ppnwwp",
        "join_planes": "ppnwwp",
        "difference_symbols": "ppnwpp",
        "apply_symbols": "ppnwpnp",
        "exponents": "pnwwwp",
        "count_pairs": "ppnp",
        "rans_encode": "pppnnpppp",
        "rans_decode": "ppnppnnppp",
        "lowrank_predict": "pppnnnnnwpp",
        "dequantize": "pppnnnwp",
    }
    kinds = {"p": POINTER, "n": INTEGER, "w": ctypes.c_int}
    for name, letters in arguments.items():
        getattr(library, name).argtypes = [kinds[letter] for letter in letters]
    library.difference_symbols.restype = library.rans_encode.restype = INTEGER
    return library
