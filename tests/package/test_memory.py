"""Reading front to back takes the memory of a few blocks, however many tensors there are, however large they are and
however many updates they rest on (R-8.2.6-6)."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from package.samples import save_model

from moestro.package import folder, sink
from moestro.package.api import Options, Package, Release, apply, diff, pack
from moestro.package.codecs import long_blocks
from moestro.package.codecs.lowrank import Factors, LowRank
from moestro.package.codecs.quantised import Quantised
from moestro.package.codecs.registry import READERS, decoded
from moestro.package.descriptor import TensorEntry
from moestro.package.dtypes import DATA_TYPES
from moestro.package.limits import PIECE_BYTES
from moestro.package.spans import Bytes, Span, as_bytes, pieces

STATUS = Path("/proc/self/status")
BLOCK_BYTES = 1 << 17


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_blocks, "BLOCK_ELEMENTS", BLOCK_BYTES // 2)
    monkeypatch.setattr(long_blocks, "STACK_ELEMENTS", BLOCK_BYTES // 2)


def peak(work: Callable[[], object]) -> int:
    """The most bytes that Python and NumPy hold at once beyond what they held before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def read_through(span: Span) -> None:
    for _ in pieces(span, BLOCK_BYTES // 2):
        pass


def updated(root: Path, count: int, elements: int) -> tuple[Path, Path]:
    """A base of so many tensors, and an update that changes all of them."""
    rng = np.random.default_rng(0)
    weights = {f"w{i:02d}": rng.normal(0, 0.02, elements).astype(np.float16) for i in range(count)}
    for name in "ab":
        save_model(root / f"{name}-model", weights)
        pack(root / f"{name}-model", root / name, Options(release=Release(package_id="demo")))
        for weight in weights.values():
            weight[::50] += np.float16(1e-4)
    assert diff([root / "a"], root / "b", root / "u").tensors == {"odiff-ctx": count}
    return root / "a", root / "u"


def test_r_8_2_6_6_no_more_memory_for_more_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink, "STAGED_BYTES", 0)  # buffers are one chunk
    size, found = 1 << 18, []
    for count in (1, 4, 12):  # the first one also imports
        base, update = updated(tmp_path / str(count), count, size // 2)
        found.append(peak(lambda b=base, u=update: apply([b], u, u.parent / "out")))  # type: ignore[misc]
    assert found[2] < found[1] + size


def stored_as(codec: str, tensor: TensorEntry, base: Span, target: Span) -> tuple[TensorEntry, Span]:
    """A tensor whose factors or scales are as large as its numbers, coded."""
    rng, (rows, columns) = np.random.default_rng(1), tensor.shape
    coder, cp = READERS[codec], {}
    if codec == "lowrank":
        sides = [rng.normal(0, 0.03, (1, side, columns)).astype(np.float32) for side in (rows, columns)]
        factors = Factors(*sides, "float32")
        coder, cp = LowRank(factors), factors.cp()
    if codec == "qres":
        coder, cp = Quantised(np.full(rows * columns, 1e-4, np.float32)), {"bits": 2, "group": 1}
    entry = TensorEntry(tensor.name, tensor.dtype, tensor.shape, codec, cp=cp)
    return entry, Bytes(b"".join(coder.encode(entry, target, base)))


@pytest.mark.parametrize("codec", ["odiff-ctx", "sparse", "lowrank", "qres"])
def test_r_8_2_6_6_no_more_memory_for_a_larger_tensor(codec: str, small_blocks: None) -> None:
    found = []
    for rows in (1 << 15, 1 << 18):
        tensor = TensorEntry("w", DATA_TYPES["float16"], (rows, 8), "raw")
        old = np.random.default_rng(0).normal(0, 0.02, (rows, 8)).astype(np.float16)
        base, target = Bytes(as_bytes(old)), Bytes(as_bytes(old + (old > 0.03) * np.float16(1e-3)))
        entry, stored = stored_as(codec, tensor, base, target)
        found.append(peak(lambda e=entry, s=stored, b=base: read_through(decoded(e, s, b))))  # type: ignore[misc]
    assert found[1] < found[0] + PIECE_BYTES


def test_r_8_2_6_6_no_more_memory_for_a_longer_chain(small_blocks: None) -> None:
    tensor = TensorEntry("w", DATA_TYPES["int16"], (1, 1 << 20), "raw")
    old = np.arange(1 << 20, dtype=np.int16)
    base, target = Bytes(as_bytes(old)), Bytes(as_bytes(old ^ (old % 50 == 0)))
    coded = [stored_as(codec, tensor, base, target) for codec in ("sparse", "xor-bp-zstd")]

    def chain(length: int) -> Span:
        span: Span = base
        for number in range(length):
            entry, stored = coded[number % 2]
            span = decoded(entry, stored, span)
        return span

    few, many = (peak(lambda n=length: read_through(chain(n))) for length in (4, 32))  # type: ignore[misc]
    assert many < few + PIECE_BYTES


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc")
def test_r_8_2_6_6_mapped_pages_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "FORGET_BYTES", 1 << 20)
    base, update = updated(tmp_path, 16, 1 << 19)
    before, most = mapped_bytes(), 0

    def look(count: int) -> None:
        nonlocal most
        most = max(most, mapped_bytes() - before)

    apply([base], update, tmp_path / "out", progress=look)
    assert most < 8 << 20
    with Package.open(tmp_path / "out") as package:
        for name in package.weights().entries:
            package.weights().check(name)
        assert mapped_bytes() - before > 12 << 20, "the measure is blind"


def mapped_bytes() -> int:
    """Of files, in this process's memory."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssFile"))
    return 1024 * int(line.split()[1])
