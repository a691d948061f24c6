"""Speed and size of packages: python benchmarks/package.py [--gb 0.5] [--access-gb 10] [--apply-gb 2.5]
                                                       [--pairs FOLDER] [--out FILE]

    speed      pack, verify, encrypt, compress: GB of weights per CPU-second and per second of wall time, beside others
    access     one verified tensor of 8 MB out of a large package, CPU milliseconds
    memory     peak of `moestro apply` where every thirtieth weight changed
    updates    exact and quantised updates between real models (benchmarks/update_pairs.py makes them), beside others

GB are 10^9 bytes of decoded weights. CPU time is user and system time of this process, which runs one thread.
"""

import argparse
import gc
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors.torch import load_file, save_file

from moestro.package.api import MANIFEST, Kek, Options, Package, Release, Weights, apply, diff, pack, verify
from moestro.package.codecs.numbers import from_float32, to_float32
from moestro.package.codecs.registry import READERS, decoded
from moestro.package.descriptor import TensorEntry
from moestro.package.dtypes import DATA_TYPES
from moestro.package.encrypt import TAG_BYTES, Sealer
from moestro.package.hashing import leaf_hashes
from moestro.package.limits import PIECE_BYTES
from moestro.package.safetensors import read_header
from moestro.package.spans import Bytes

Row = dict[str, Any]
BF16 = DATA_TYPES["bfloat16"]
TENSOR_BYTES = 8 << 20
QUANTIZE_BITS = (2.8, 2.0, 1.0)
PEAK = """
import runpy, sys
try:
    runpy.run_module("moestro", run_name="__main__")
except SystemExit as end:
    assert not end.code
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""
"""The command in this process, then the most memory that it had."""


class Clock:
    """CPU and wall seconds of a call; the medians of several."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def __call__(self, work: Callable[[], object], undo: Callable[[], object] = lambda: None) -> tuple[float, float]:
        times = []
        for number in range(self.rounds):
            gc.collect()
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            times.append((time.process_time() - cpu, time.perf_counter() - wall))
            if number < self.rounds - 1:
                undo()
        return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def say(row: Row) -> Row:
    """One line of the table."""
    words = [f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()]
    print("  ".join(words), flush=True)
    return row


def write_model(path: Path, gb: float, shape: tuple[int, int] = (2048, 2048)) -> int:
    """A safetensors file of bfloat16 matrices like those of trained models; returns bytes of weights."""
    tensor_bytes = 2 * shape[0] * shape[1]
    random = np.random.default_rng(0)
    pool = from_float32(random.normal(0, 0.02, 1 << 25).astype(np.float32), BF16)
    count = max(int(gb * 1e9) // tensor_bytes, 1)
    names = [f"layers.{i:04d}.w" for i in range(count)]
    header = {name: {"dtype": "BF16", "shape": shape, "data_offsets": [i * tensor_bytes, (i + 1) * tensor_bytes]}
              for i, name in enumerate(names)}  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for written in range(0, count * tensor_bytes, min(TENSOR_BYTES, tensor_bytes)):
            size = min(TENSOR_BYTES, tensor_bytes, count * tensor_bytes - written)
            start = int(random.integers(len(pool) - size // 2))
            file.write(pool[start : start + size // 2].data)
        file.flush()
        os.fsync(file.fileno())  # else the kernel writes it out while packing is measured
    return count * tensor_bytes


def speed(folder: Path, gb: float, clock: Clock) -> list[Row]:
    """Pack and verify in all ways."""
    model, out = folder / "m.safetensors", folder / "p"
    size = write_model(model, gb)
    rows = []

    def rate(what: str, work: Callable[[], object], undo: Callable[[], object] = lambda: None, **more: Any) -> None:
        cpu, wall = clock(work, undo)
        rows.append(say({"what": what, "GB/CPU-s": size / cpu / 1e9, "GB/s": size / wall / 1e9, **more}))

    def packed(**given: Any) -> Callable[[], object]:
        hash_name = given.pop("hash", "sha256")
        return lambda: pack(model, out, Options(release=Release(package_id="bench", hash=hash_name), **given))

    def removed() -> None:
        shutil.rmtree(out)

    for name in ("sha256", "blake3"):
        rate(f"pack + {name}", packed(hash=name), removed)
        rate(f"open + verify all, {name}", lambda: verify(out))
        removed()
    rate("pack + encrypt (A256GCM, sha256)", packed(to=[Kek("k", bytes(32))]), removed)
    removed()
    rate("pack --compact", packed(compact=True), removed)
    stored = sum(path.stat().st_size for path in out.rglob("*.ptm"))
    rate("open + verify all, compact", lambda: verify(out), ratio=stored / size)
    removed()
    loaded = load_file(model)
    rate("safetensors save_file, no digests", lambda: save_file(loaded, folder / "s.safetensors"))
    rate(
        "safetensors load_file and read, no digests",
        lambda: [t.view(torch.int64).sum() for t in load_file(model).values()],
    )
    for path in (model, folder / "s.safetensors"):
        path.unlink()
    return rows


def ceilings(clock: Clock) -> list[Row]:
    """What the primitives alone reach here and now, over 96 MiB in memory: no package is faster than its digests."""
    data = np.random.default_rng(0).integers(0, 256, 96 << 20, np.uint8)
    view, into = data.data, np.zeros_like(data)
    sealer = Sealer([Kek("k", bytes(32))], "bench")
    out = memoryview(bytearray(PIECE_BYTES + TAG_BYTES))

    def sealed() -> None:
        for index, start in enumerate(range(0, len(view), PIECE_BYTES)):
            sealer.seal(index, view[start : start + PIECE_BYTES], False, out)

    work: dict[str, Callable[[], object]] = {
        "copy": lambda: np.copyto(into, data),
        "sha256": lambda: leaf_hashes("sha256", view, PIECE_BYTES),
        "blake3": lambda: leaf_hashes("blake3", view, PIECE_BYTES),
        "A256GCM": sealed,
    }
    return [say({"what": f"{name} alone", "GB/CPU-s": len(view) / clock(do)[0] / 1e9}) for name, do in work.items()]


def lossless(weights: Iterable[tuple[str, bytes]], what: str, clock: Clock) -> list[Row]:
    """Codec bp-zstd on bfloat16 weights, and others on the same bytes; all in memory."""
    data = b"".join(content for _, content in weights)
    tensor = TensorEntry("t", BF16, (len(data) // 2,), "bp-zstd")
    codec, span = READERS["bp-zstd"], Bytes(data)
    stored = b"".join(bytes(part) for part in codec.encode(tensor, span, None))

    def out() -> None:
        found = decoded(tensor, Bytes(stored), None)
        for start in range(0, found.length, 1 << 20):
            found.read(start, min(1 << 20, found.length - start))

    def into() -> None:
        for _ in codec.encode(tensor, span, None):
            pass

    ways: dict[str, tuple[Callable[[], object], Callable[[], object], int]] = {
        "bp-zstd": (into, out, len(stored)),
        "zstd -3": _zstd(data),
    }
    if importlib.util.find_spec("zipnn"):
        ways["zipnn"] = _zipnn(data)
    rows = []
    for name, (pack_it, unpack_it, size) in ways.items():
        encode, decode = clock(pack_it)[0], clock(unpack_it)[0]
        gb = len(data) / 1e9
        rows.append(say({"what": f"lossless {what}, {name}", "ratio": size / len(data), "in GB/CPU-s": gb / encode, "out GB/CPU-s": gb / decode}))  # fmt: skip # noqa: E501
    return rows


def _zstd(data: bytes) -> tuple[Callable[[], object], Callable[[], object], int]:
    frame = zstandard.compress(data, 3)
    return lambda: zstandard.compress(data, 3), lambda: zstandard.decompress(frame), len(frame)


def _zipnn(data: bytes) -> tuple[Callable[[], object], Callable[[], object], int]:
    from zipnn import ZipNN

    tool = ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=1)
    frame = bytes(tool.compress(bytearray(data)))
    return lambda: tool.compress(bytearray(data)), lambda: tool.decompress(bytearray(frame)), len(frame)


def access(folder: Path, gb: float) -> list[Row]:
    """One tensor of 8 MB."""
    model, out = folder / "m.safetensors", folder / f"access-{gb:g}"
    if not out.exists():
        write_model(model, gb)
        pack(model, out, Options(release=Release(package_id="bench")))
        model.unlink()
    evict(next(out.rglob("*.ptm")))
    size = int(gb * 1e9) // TENSOR_BYTES * TENSOR_BYTES
    start = time.process_time()
    with Package.open(out) as package:
        weights = package.weights()
        opened = time.process_time() - start
        names = [f"layers.{number * 7 % (size // TENSOR_BYTES):04d}.w" for number in range(9)]
        from_disk, again = (statistics.median(_read_s(weights, name) for name in names) for _ in range(2))
    row = {"what": "one verified 8 MB tensor", "package GB": size / 1e9, "tensors": size // TENSOR_BYTES}
    row |= {"open CPU ms": 1e3 * opened, "from disk CPU ms": 1e3 * from_disk, "from cache CPU ms": 1e3 * again}
    return [say(row)]


def evict(path: Path) -> None:
    """Take a file out of the page cache."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def _read_s(weights: Weights, name: str) -> float:
    start = time.process_time()
    weights.read(name)
    return time.process_time() - start


def memory(folder: Path, gb: float) -> list[Row]:
    """Of a process that applies an update, for usual, small and a single tensor."""
    rows = []
    for shape in ((2048, 2048), (128, 256), (int(gb * 1e9) // 2 // 65536, 65536)):
        model, base, target, update, out = (folder / name for name in ("m.safetensors", "a", "b", "u", "o"))
        size = write_model(model, gb, shape)
        pack(model, base, Options(release=Release(package_id="bench")))
        weights = np.memmap(model, np.uint16, "r+", model.stat().st_size - size)
        weights[::30] += 1
        weights.flush()
        pack(model, target, Options(release=Release(package_id="bench")))
        diff([base], target, update)
        peak, idle = _peak_mib("apply", base, update, out), _peak_mib("inspect", base)
        assert (out / MANIFEST).read_bytes() == (target / MANIFEST).read_bytes(), "not the target"
        rows.append(say({"what": "memory of apply", "GB": size / 1e9, "tensors": size // 2 // (shape[0] * shape[1]),
                         "peak MiB": peak, "MiB of `inspect`": idle}))  # fmt: skip
        model.unlink()
        for made in (base, target, update, out):
            shutil.rmtree(made)
    return rows


def _peak_mib(*words: object) -> float:
    command = [sys.executable, "-c", PEAK, *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return int(done.stderr.split()[-2]) / 1024


def bf16_tensors(folder: Path) -> dict[str, bytes]:
    """The bfloat16 tensors of a model folder."""
    view = memoryview((folder / "model.safetensors").read_bytes())
    header = read_header(view, folder.name)
    found = {}
    for tensor in header.tensors:
        start = header.data_start + tensor.start
        found[tensor.name] = bytes(view[start : start + tensor.length])
    return found


def updates(folder: Path, pairs: Path, clock: Clock) -> list[Row]:
    """Exact updates between the models of benchmarks/update_pairs.py."""
    rows = []
    _packed(pairs / "base", folder / "base")
    old = bf16_tensors(pairs / "base")
    size = sum(map(len, old.values()))
    for name in found(pairs, "rl", "lora", "full"):
        _packed(pairs / name, folder / name)
        new = bf16_tensors(pairs / name)
        update, result = folder / f"{name}-update", folder / f"{name}-result"
        encode = clock(lambda n=name, u=update: diff([folder / "base"], folder / n, u), lambda u=update: shutil.rmtree(u))  # type: ignore[misc] # fmt: skip # noqa: E501
        apply_s = clock(lambda u=update, r=result: apply([folder / "base"], u, r), lambda r=result: shutil.rmtree(r))  # type: ignore[misc] # fmt: skip
        same = (folder / name / "Meta-info/manifest.json").read_bytes() == (result / "Meta-info/manifest.json").read_bytes()  # fmt: skip # noqa: E501
        assert same, "the update does not lead to the target"
        stored = sum(path.stat().st_size for path in update.rglob("*") if path.is_file())
        changed = sum(np.count_nonzero(_bits(old[n]) != _bits(new[n])) for n in old) / (size / 2)
        xor = sum(len(_xor_zstd(old[n], new[n])) for n in old)
        rows.append(say({"what": f"exact update, {name}", "MB": size / 1e6, "changed %": 100 * changed,
                         "% of bf16": 100 * stored / size, "xor + zstd -3 %": 100 * xor / size,
                         "diff MB/CPU-s": size / encode[0] / 1e6, "apply MB/CPU-s": size / apply_s[0] / 1e6}))  # fmt: skip # noqa: E501
        shutil.rmtree(update)
        shutil.rmtree(result)
    return rows


def found(pairs: Path, *names: str) -> list[str]:
    """Which of these successors were made."""
    return [name for name in names if (pairs / name).exists()]


def _packed(model: Path, out: Path) -> None:
    if not out.exists():
        pack(model, out, Options(release=Release(package_id="pair")))


def _bits(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint16)


def _xor_zstd(old: bytes, new: bytes) -> bytes:
    """XOR, byte planes, zstd: the usual way."""
    planes = np.ascontiguousarray((_bits(old) ^ _bits(new)).view(np.uint8).reshape(-1, 2).T)
    return zstandard.compress(planes.tobytes(), 3)


def quantised(folder: Path, pairs: Path) -> list[Row]:
    """Quantised updates: bytes, and the share of the fine-tune's gain on held-out text that is lost."""
    import update_pairs as made

    small = json.loads((pairs / "facts.json").read_text())["scale"] > 1
    spec = made.spec(small)
    _, task = made.tasks(pairs, spec)
    old = bf16_tensors(pairs / "base")
    size = sum(map(len, old.values()))

    def loss_of(weights: dict[str, np.ndarray]) -> float:
        model = made.Decoder(spec)
        own = model.state_dict()
        model.load_state_dict({n: torch.from_numpy(w.reshape(own[n].shape).copy()) for n, w in weights.items()})
        return float(task.loss(model.train()))

    def floats(tensors: dict[str, bytes]) -> dict[str, np.ndarray]:
        return {name: to_float32(memoryview(data), BF16) for name, data in tensors.items()}

    base = floats(old)
    base_loss = loss_of(base)
    rows = []
    for name in found(pairs, "full", "lora"):
        target = floats(bf16_tensors(pairs / name))
        gain = base_loss - loss_of(target)
        signs = {n: base[n] + np.float32(np.abs(d := target[n] - base[n]).mean()) * np.where(d < 0, -1, 1).astype(np.float32) for n in base}  # fmt: skip # noqa: E501
        ways = [("BitDelta: sign x scale per tensor", 100 / 16, loss_of(signs))]
        for bits in QUANTIZE_BITS:
            update = folder / f"{name}-{bits}"
            report = diff([folder / "base"], folder / name, update, bits=bits)
            with Package.open(folder / "base") as below, Package.open(update, base=below) as package:
                weights = package.weights()
                result = floats({n: bytes(weights.read(n)) for n in base})
            ways.append((f"--quantize {bits}", 100 * report.update_bytes / size, loss_of(result)))
            shutil.rmtree(update)
        for what, percent, loss in ways:
            lost = 100 * (loss - (base_loss - gain)) / gain
            rows.append(say({"what": f"quantised update, {name}, {what}", "% of bf16": percent, "gain nats": gain, "% of gain lost": lost}))  # fmt: skip # noqa: E501
    return rows


def machine() -> Row:
    """What it ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {"cpu": cpu, "python": platform.python_version(), "date": datetime.now(UTC).date().isoformat()}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.5)
    parser.add_argument("--access-gb", type=float, default=0.0)
    parser.add_argument("--apply-gb", type=float, default=0.0)
    parser.add_argument("--pairs", type=Path, help="made by benchmarks/update_pairs.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help="where packages are made; a large one stays there for another run")
    arguments = parser.parse_args()
    clock, rows = Clock(arguments.rounds), []
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.gb:
            rows += ceilings(clock)
            rows += speed(folder, arguments.gb, clock)
        if arguments.access_gb:
            rows += access(folder, arguments.access_gb)
        if arguments.apply_gb:
            rows += memory(folder, arguments.apply_gb)
        if arguments.pairs:
            rows += lossless(bf16_tensors(arguments.pairs / "base").items(), "trained", clock)
            rows += updates(folder, arguments.pairs, clock)
            rows += quantised(folder, arguments.pairs)
    result = {"bench": "package", "command": sys.argv[1:], **machine(), "rows": rows}
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
