"""Find the factors of a low-rank update from nothing but the rounded weights before and after it.

    looks_lowrank(base, target) -> rank or 0        fit(tensor, base, target, rank) -> Factors

B = round(A + P Q) gives for each element an interval in which A + P Q lies. Starting from a randomised singular value
decomposition of B - A, the product is moved in turn into those intervals and back to its rank (alternating
projections); a few rounds bring most elements to round to exactly B, so that hardly a correction is left to store.
"""

import numpy as np

from moestro.package.codecs.lowrank import Factors, matrices
from moestro.package.codecs.numbers import to_float32
from moestro.package.descriptor import TensorEntry
from moestro.package.dtypes import DataType
from moestro.package.spans import Span, same_bytes

PROBE_ROWS, PROBE_COLUMNS = 128, 256
"""Size of the corner in which the rank is looked for."""
MIN_SIDE = 32
ROUNDS = 4
MANTISSA_BITS = {"bfloat16": 7, "float16": 10, "float32": 23}
NOISE_EDGE = 1.15
"""A singular value counts when it is above this multiple of what rounding noise alone would reach."""


def half_step(values: np.ndarray, dtype: DataType) -> np.ndarray:
    """Half the distance to the next number of the type: how far rounding can have moved each value."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32) & np.uint32(0x7F800000)
    lowest = np.float32(2.0**-14 if dtype.name == "float16" else 2.0**-126)
    return np.maximum(bits.view(np.float32), lowest) * np.float32(2.0 ** -(MANTISSA_BITS[dtype.name] + 1))


def looks_lowrank(tensor: TensorEntry, base: Span, target: Span) -> int:
    """The rank that a corner of a changed matrix shows above the noise of rounding; 0 for none or too many."""
    batch, rows, columns = matrices(tensor.shape)
    if min(rows, columns) < MIN_SIDE:
        return 0
    size = rows * columns * tensor.dtype.item_bytes
    found = 0
    for index in sorted({0, batch // 2, batch - 1}):
        a, b = (_matrix(span, index * size, rows, columns, tensor.dtype) for span in (base, target))
        corner = b - a
        if not np.isfinite(corner).all() or not corner.any():
            continue
        noise = float(np.mean(half_step(b, tensor.dtype) ** 2) / 3)
        edge = noise * (np.sqrt(corner.shape[0]) + np.sqrt(corner.shape[1])) ** 2 * NOISE_EDGE**2
        found = max(found, int((np.linalg.eigvalsh(corner @ corner.T) > edge).sum()))
    return found if found <= min(PROBE_ROWS, rows, columns) // 2 else 0


def _matrix(span: Span, start: int, rows: int, columns: int, dtype: DataType) -> np.ndarray:
    """The first rows and columns of a matrix."""
    rows = min(rows, PROBE_ROWS)
    data = span.read(start, rows * columns * dtype.item_bytes)
    return to_float32(data, dtype).reshape(rows, columns)[:, :PROBE_COLUMNS]


def fit(tensor: TensorEntry, base: Span, target: Span, rank: int) -> Factors:
    """Factors for every matrix of the batch, as float16."""
    batch, rows, columns = matrices(tensor.shape)
    size = rows * columns * tensor.dtype.item_bytes
    p_BMR = np.zeros((batch, rows, rank), np.float32)
    q_BRN = np.zeros((batch, rank, columns), np.float32)
    random = np.random.default_rng(0)
    for index in range(batch):
        old, new = base.read(index * size, size), target.read(index * size, size)
        if not same_bytes(old, new):
            a, b = (to_float32(data, tensor.dtype).reshape(rows, columns) for data in (old, new))
            p_BMR[index], q_BRN[index] = _fit_matrix(a, b, rank, tensor.dtype, random)
    return Factors(_halved(p_BMR), _halved(q_BRN), "float16")


def _halved(factor: np.ndarray) -> np.ndarray:
    """As the file will hold it."""
    with np.errstate(over="ignore"):
        return np.nan_to_num(factor.astype(np.float16).astype(np.float32))


def _fit_matrix(
    a: np.ndarray, b: np.ndarray, rank: int, dtype: DataType, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    delta, half = b - a, half_step(b, dtype)
    sketch = delta @ random.standard_normal((delta.shape[1], rank)).astype(np.float32)
    p = np.linalg.qr(delta @ (delta.T @ sketch))[0]
    q = p.T @ delta
    for _ in range(ROUNDS):
        wanted = p @ q
        wanted -= delta
        np.clip(wanted, -half, half, out=wanted)
        wanted += delta
        p = np.linalg.qr(wanted @ q.T)[0]
        q = p.T @ wanted
    scale = np.sqrt(np.maximum(np.abs(q).max(axis=1), 1e-30))
    return p * scale, q / scale[:, None]
