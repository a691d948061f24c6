"""Every codec gives back the same bits, compiled or in NumPy, and both write the same bytes (annex X, 1 and 4)."""

import contextlib
import math
import struct
from collections.abc import Callable

import numpy as np
import pytest

from moestro.core.errors import FormatError, IntegrityError, PackageError
from moestro.package import kernels
from moestro.package.codecs import long_blocks, rans
from moestro.package.codecs.lowrank import Factors, LowRank, matrices
from moestro.package.codecs.numbers import from_float32, to_float32
from moestro.package.codecs.planes import Mode, join, split
from moestro.package.codecs.quantised import Quantised
from moestro.package.codecs.registry import READERS, Codec, decoded
from moestro.package.codecs.sparse import from_leb128, leb128
from moestro.package.codecs.symbols import apply_symbols, difference_symbols
from moestro.package.descriptor import TensorEntry
from moestro.package.dtypes import DATA_TYPES
from moestro.package.spans import Bytes

ON_BASE = ["xor-bp-zstd", "odiff-bp-zstd", "odiff-ctx", "sparse"]
compiled = pytest.mark.skipif(kernels.codecs() is None, reason="no compiler here")


@pytest.fixture
def numpy_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to take the plain way from now on."""

    def switch() -> None:
        for module in ("planes", "rans", "contextual", "symbols", "numbers"):
            monkeypatch.setattr(f"moestro.package.codecs.{module}.codecs", lambda: None)

    return switch


def tensor(dtype: str, shape: tuple[int, ...], codec: str, **cp: int | str) -> TensorEntry:
    return TensorEntry("t", DATA_TYPES[dtype], shape, codec, cp=cp)


def trained(elements: int, dtype: str, seed: int = 0) -> np.ndarray:
    """Bit patterns like those of trained weights, with the values that break careless code among them."""
    values = np.random.default_rng(seed).normal(0, 0.02, elements).astype(np.float32)
    odd = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, 3e38, 65504.0], np.float32)[:elements]
    values[: len(odd)] = odd
    with np.errstate(over="ignore"):
        return from_float32(values, DATA_TYPES[dtype])


def stored(codec: Codec, entry: TensorEntry, target: bytes, base: bytes | None) -> bytes:
    parts = codec.encode(entry, Bytes(target), None if base is None else Bytes(base))
    return b"".join(bytes(part) for part in parts)


def restored(entry: TensorEntry, data: bytes, base: bytes | None) -> bytes:
    span = decoded(entry, Bytes(data), None if base is None else Bytes(base))
    assert span.length == entry.num_bytes
    return bytes(span.read(0, span.length))


@pytest.mark.parametrize("dtype", sorted(DATA_TYPES))
@pytest.mark.parametrize("codec", ["zstd", "bp-zstd", "xor-bp-zstd", "odiff-bp-zstd", "sparse"])
def test_every_type_comes_back_bit_for_bit(dtype: str, codec: str) -> None:
    rng = np.random.default_rng(1)
    for shape in ((), (0,), (1,), (7, 13), (3, 1 << 19)):
        entry = tensor(dtype, shape, codec)
        target = rng.bytes(entry.num_bytes)
        base = bytearray(target)
        base[::97] = rng.bytes(len(base[::97]))
        against = None if codec in ("zstd", "bp-zstd") else bytes(base)
        assert restored(entry, stored(READERS[codec], entry, target, against), against) == target


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("codec", ON_BASE)
@pytest.mark.parametrize("step", [0.0, 1e-6, 1e-3, 10.0])
def test_updates_of_any_size_come_back_bit_for_bit(dtype: str, codec: str, step: float) -> None:
    base = trained(50_000, dtype)
    moved = to_float32(memoryview(base).cast("B"), DATA_TYPES[dtype])
    moved = moved + np.float32(step) * np.random.default_rng(2).normal(0, 1, len(moved)).astype(np.float32)
    with np.errstate(over="ignore"):
        target = from_float32(moved, DATA_TYPES[dtype])
    entry = tensor(dtype, (50, 1000), codec)
    assert (
        restored(entry, stored(READERS[codec], entry, target.tobytes(), base.tobytes()), base.tobytes())
        == target.tobytes()
    )


@compiled
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_compiled_and_plain_write_the_same_bytes(dtype: str, numpy_only: Callable[[], None]) -> None:
    base, target = trained(30_000, dtype), trained(30_000, dtype, seed=3)
    near = np.where(np.arange(30_000) % 3, base, target)
    entries = [tensor(dtype, (30, 1000), codec) for codec in READERS if codec not in ("lowrank", "qres")]
    coded = [
        stored(READERS[e.codec], e, near.tobytes(), None if e.codec in ("zstd", "bp-zstd") else base.tobytes())
        for e in entries
    ]
    numpy_only()
    for entry, data in zip(entries, coded, strict=True):
        against = None if entry.codec in ("zstd", "bp-zstd") else base.tobytes()
        assert stored(READERS[entry.codec], entry, near.tobytes(), against) == data, entry.codec
        assert restored(entry, data, against) == near.tobytes(), entry.codec


def test_differences_of_the_specifications_example() -> None:
    """Annex Z.2: xor, ordered difference and zig-zag of four floats."""
    a = np.array([1.0, -2.0, 0.0, 0.5], np.float32)
    b = np.array([1.0000001, -2.0000002, -0.0, 0.75], np.float32)
    expected = {Mode.XOR: [1, 1, 0x80000000, 0x400000], Mode.FLOAT_DIFFERENCE: [2, 1, 1, 8388608]}
    for mode, numbers in expected.items():
        planes = split(memoryview(b).cast("B"), memoryview(a).cast("B"), 4, mode)
        assert [int.from_bytes(planes[:, i].tobytes(), "big") for i in range(4)] == numbers
        back = join([memoryview(plane) for plane in planes], memoryview(a).cast("B"), 4, mode)
        assert bytes(back) == b.tobytes()


def test_the_quantised_residual_of_the_specifications_example() -> None:
    """Annex Z.2, qres: A = 1, -2, ... in bfloat16, 4 bits, one scale."""
    a = np.array([16128, 48768, 15872, 16256], np.uint16)
    b = np.array([16131, 48773, 15862, 16260], np.uint16)
    scale = np.array([0x3B924925], np.uint32).view(np.float32)
    entry = tensor("bfloat16", (4,), "qres", bits=4, group=4)
    data = stored(Quantised(scale), entry, b.tobytes(), a.tobytes())
    assert np.frombuffer(restored(entry, data, a.tobytes()), np.uint16).tolist() == [16131, 48773, 15863, 16260]


def test_the_known_answer_of_the_entropy_coder() -> None:
    """Annex W: ten symbols, one context, stream f1 c3 04 c8."""
    symbols = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0], np.uint8)
    freq = rans.quantised(np.bincount(symbols, minlength=256))
    assert freq[:3].tolist() == [6554, 4915, 4915]
    tables = rans.Tables.of_freq([0], freq[None])
    stream = rans.encode(symbols, np.zeros(10, np.uint8), tables)
    assert stream.hex() == "f1c304c8"
    assert rans.decode(memoryview(stream), np.zeros(10, np.uint8), tables, "t").tolist() == symbols.tolist()


@pytest.mark.parametrize("plain", [False, True])
def test_the_entropy_coder_comes_within_a_hundredth_of_the_entropy(plain: bool, numpy_only: Callable[[], None]) -> None:
    if plain:
        numpy_only()
    rng = np.random.default_rng(0)
    symbols = np.minimum(rng.geometric(0.4, 200_000), 200).astype(np.uint8)
    share = np.bincount(symbols) / len(symbols)
    entropy_bits = -sum(p * math.log2(p) for p in share if p)
    tables = rans.Tables.of_freq([0], rans.quantised(np.bincount(symbols, minlength=256))[None])
    stream = rans.encode(symbols, np.zeros(len(symbols), np.uint8), tables)
    assert 8 * len(stream) / len(symbols) == pytest.approx(entropy_bits, rel=0.01)
    assert (rans.decode(memoryview(stream), np.zeros(len(symbols), np.uint8), tables, "t") == symbols).all()


@pytest.mark.parametrize("plain", [False, True])
def test_a_changed_stream_is_found_by_its_end(plain: bool, numpy_only: Callable[[], None]) -> None:
    if plain:
        numpy_only()
    symbols = np.random.default_rng(0).integers(0, 3, 5000).astype(np.uint8)
    contexts = np.zeros(5000, np.uint8)
    tables = rans.Tables.of_freq([0], rans.quantised(np.bincount(symbols, minlength=256))[None])
    stream = rans.encode(symbols, contexts, tables)
    for wrong in (stream[:-2], stream + b"\0\0", stream[:8] + bytes([stream[8] ^ 1]) + stream[9:]):
        with pytest.raises(IntegrityError):
            rans.decode(memoryview(wrong), contexts, tables, "t")
    with pytest.raises(IntegrityError, match="a context has no table"):
        rans.decode(memoryview(stream), contexts + 1, tables, "t")


def test_frequencies_add_up_whatever_is_counted() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = (rng.pareto(0.3, 256) * rng.integers(0, 2, 256)).astype(np.int64) % 10**7
        count[rng.integers(256)] += 1
        freq = rans.quantised(count)
        assert freq.sum() == rans.TOTAL
        assert ((freq > 0) == (count > 0)).all()


@pytest.mark.parametrize("width", [2, 4])
def test_symbols_reach_from_the_smallest_to_the_largest_difference(width: int) -> None:
    kind = np.dtype(f"<u{width}")
    edges = np.array(
        [0, 1, 15, 16, 17, 31, 32, 63, 64, 1000, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1)], np.uint64
    )
    target = np.concatenate([edges, (1 << 8 * width) - edges[1:]]).astype(kind)
    base = np.full(len(target), 1 << (8 * width - 1), kind)
    symbols, extra = difference_symbols(memoryview(base).cast("B"), memoryview(target).cast("B"), width)
    assert bytes(apply_symbols(memoryview(base).cast("B"), symbols, memoryview(extra), width, "t")) == target.tobytes()


def test_gaps_are_leb128() -> None:
    numbers = np.array([0, 1, 127, 128, 300, 16383, 16384, 4194303])
    assert leb128(np.array([300])).hex() == "ac02"
    assert from_leb128(leb128(numbers), len(numbers), "t").tolist() == numbers.tolist()
    for wrong in (b"\x80", b"\x80\x80\x80\x80\x01", b"\x01\x01"):
        with pytest.raises(FormatError):
            from_leb128(wrong, 1, "t")


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_low_rank_updates_are_exact(dtype: str, plain: bool, numpy_only: Callable[[], None]) -> None:
    rng = np.random.default_rng(0)
    base = trained(2 * 60 * 50, dtype)
    p, q = rng.normal(0, 0.05, (2, 60, 3)).astype(np.float32), rng.normal(0, 0.05, (2, 3, 50)).astype(np.float32)
    values = to_float32(memoryview(base).cast("B"), DATA_TYPES[dtype]).reshape(2, 60, 50) + p @ q
    with np.errstate(over="ignore"):
        target = from_float32(values.reshape(-1), DATA_TYPES[dtype])
    factors = Factors(p, q, "float32")
    entry = tensor(dtype, (2, 60, 50), "lowrank", **factors.cp())
    data = stored(LowRank(factors), entry, target.tobytes(), base.tobytes())
    if plain:
        numpy_only()
        assert stored(LowRank(factors), entry, target.tobytes(), base.tobytes()) == data
    assert restored(entry, data, base.tobytes()) == target.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_quantised_residual_is_the_same_on_every_machine(
    dtype: str, bits: int, numpy_only: Callable[[], None]
) -> None:
    rng = np.random.default_rng(0)
    kind = DATA_TYPES[dtype]
    a = rng.normal(0, 0.02, 6000).astype(np.float32)
    base = from_float32(a, kind)
    target = from_float32(a + rng.normal(0, 1e-3, 6000).astype(np.float32), kind)
    scales = rng.uniform(1e-4, 2e-3, 12).astype(np.float32)
    entry = tensor(dtype, (12, 500), "qres", bits=bits, group=500)
    data = stored(Quantised(scales), entry, target.tobytes(), base.tobytes())
    compiled_result = restored(entry, data, base.tobytes())
    numpy_only()
    assert restored(entry, data, base.tobytes()) == compiled_result
    # by definition, one element at a time
    delta = to_float32(memoryview(target).cast("B"), kind) - to_float32(memoryview(base).cast("B"), kind)
    scale = np.repeat(scales, 500)
    most = (1 << (bits - 1)) - 1
    codes = np.where(delta < 0, -1, 1) if bits == 1 else np.clip(np.rint(delta / scale), -most, most)
    expected = to_float32(memoryview(base).cast("B"), kind) + scale * codes.astype(np.float32)
    assert compiled_result == from_float32(expected, kind).tobytes()


@pytest.mark.parametrize("block", [1, 4, 7, 15, 16])
@pytest.mark.parametrize("shape", [(3, 5), (1, 15), (5, 1, 3), (2, 3, 5)])
def test_any_block_finds_its_factors_and_scales(
    shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_blocks, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(long_blocks, "STACK_ELEMENTS", block)
    rng, (batch, rows, columns) = np.random.default_rng(0), matrices(shape)
    old = rng.normal(0, 0.02, (batch, rows, columns)).astype(np.float32)
    p, q = (rng.normal(0, 1, side).astype(np.float32) for side in ((batch, rows, 1), (batch, 1, columns)))
    factors, scales = Factors(p, q, "float32"), rng.uniform(1, 2, -(-old.size // 4)).astype(np.float32)
    of_rank = tensor("float32", shape, "lowrank", **factors.cp())
    scaled = tensor("float32", shape, "qres", bits=1, group=4)
    steps = {"lowrank": p * q, "qres": np.repeat(scales, 4)[: old.size].reshape(old.shape)}
    for entry, coder in ((of_rank, LowRank(factors)), (scaled, Quantised(scales))):
        new = (old + steps[entry.codec]).tobytes()
        span = decoded(entry, Bytes(stored(coder, entry, new, old.tobytes())), Bytes(old.tobytes()))
        at = [*range(0, len(new), 12)]
        assert b"".join(bytes(span.read(start, min(12, len(new) - start))) for start in at) == new
        assert all(bytes(span.read(start, len(new) - start)) == new[start:] for start in reversed(at))


def test_rounding_to_bfloat16_is_to_nearest_even() -> None:
    halfway = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0xFF800000, 0x7F800001], np.uint32).view(
        np.float32
    )
    assert from_float32(halfway, DATA_TYPES["bfloat16"]).tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0xFF80, 0x7FC0]


@pytest.mark.parametrize("codec", ["zstd", "bp-zstd", *ON_BASE])
def test_damaged_stored_forms_raise_only_our_errors(codec: str) -> None:
    base = trained(3000, "bfloat16").tobytes()
    target = trained(3000, "bfloat16", seed=1).tobytes()
    entry = tensor("bfloat16", (3000,), codec)
    against = None if codec in ("zstd", "bp-zstd") else base
    good = stored(READERS[codec], entry, target, against)
    rng = np.random.default_rng(0)
    for _ in range(400):
        bad = bytearray(good)
        match rng.integers(3):
            case 0:
                bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
            case 1:
                del bad[rng.integers(len(bad)) :]
            case 2:
                at = rng.integers(len(bad) - 4)
                bad[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 30, len(bad)]))
        with contextlib.suppress(PackageError):
            restored(entry, bytes(bad), against)
