"""zstd within our bounds: what we write depends on nothing but the bytes, what we read cannot grow beyond its promise.

The exponents of trained weights compress by how often each occurs, not by repetition: a tiny match table with long
matches lets Huffman coding do the work (ratio 0.6625 of bf16 instead of 0.680 at level 1 and 0.701 at level 3).
"""

import functools
import threading
from typing import Any

import numpy as np

from moestro.core.errors import FormatError, IntegrityError, UnsupportedVersion
from moestro.package.spans import Array

WINDOW_LOG = 20
SAMPLE_BYTES = 1 << 14
INCOMPRESSIBLE_BITS = 7.9
"""A plane whose sample has more bits per byte than this is stored as it is."""
_local = threading.local()


@functools.cache
def _library() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise UnsupportedVersion("codec zstd needs: pip install 'moestro[package]'") from error
    return zstandard


def _tool(kind: str) -> Any:
    """One compressor of a kind per thread: they keep state and are slow to make."""
    if not hasattr(_local, kind):
        zstd = _library()
        match kind:
            case "exponents":
                settings = zstd.ZstdCompressionParameters(
                    strategy=zstd.STRATEGY_FAST, min_match=7, hash_log=6, chain_log=6, window_log=19, target_length=0
                )
                tool = zstd.ZstdCompressor(compression_params=settings)
            case "decoder":
                tool = zstd.ZstdDecompressor(max_window_size=1 << WINDOW_LOG)
            case _:
                settings = zstd.ZstdCompressionParameters.from_level(int(kind), window_log=WINDOW_LOG)
                tool = zstd.ZstdCompressor(compression_params=settings)
        setattr(_local, kind, tool)
    return getattr(_local, kind)


def compress(data: bytes | memoryview, kind: str = "3") -> bytes:
    """One frame with its content size; `kind` is a level or `exponents`."""
    return bytes(_tool(kind).compress(data))


def decompress(data: memoryview, size: int, where: str) -> bytes:
    """Exactly `size` bytes from one frame; raises FormatError where the frame promises or gives anything else."""
    zstd = _library()
    try:
        promised = zstd.get_frame_parameters(data)
        if promised.content_size != size or promised.dict_id or promised.window_size > 1 << WINDOW_LOG:
            raise FormatError(f"{where}: a zstd frame of {promised.content_size} bytes stands for {size}")
        out = bytes(_tool("decoder").decompress(data, max_output_size=size, allow_extra_data=False))
    except zstd.ZstdError as error:
        raise IntegrityError(where, f"not decodable as zstd ({error})") from error
    if len(out) != size:
        raise FormatError(f"{where}: a zstd frame gives {len(out)} bytes instead of {size}")
    return out


def looks_random(plane: Array) -> bool:
    """True where compressing would be wasted time, judged by an evenly spread sample."""
    step = max(1, len(plane) // SAMPLE_BYTES)
    sample = plane[::step][:SAMPLE_BYTES]
    if len(sample) < 1024:
        return False
    count = np.bincount(sample, minlength=256)
    share = count[count > 0] / len(sample)
    return float(-(share * np.log2(share)).sum()) > INCOMPRESSIBLE_BITS
