"""Hostile bytes for every parser of packages: mutants of good inputs must give a result or one of our errors, quickly.

    fuzz(targets(folder), mutants, seed) -> Findings        tamper(tries, seed), tamper_sealed(tries, seed) -> kinds

Mutations know the structure: bits and bytes change, ranges are cut, repeated, exchanged, integers become extreme, JSON
values are replaced; digests that guard what lies behind them are made to fit again in half of the mutants. The parsers
of servers and clients are in tests/ship/fuzzing.py; benchmarks/fuzz.py runs millions over both.
"""

import json
import os
import shutil
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from package.samples import contents, save_model, tensors

from moestro.core.errors import ConfigError, DecryptionError, Error, PackageError
from moestro.core.files import sha256_of
from moestro.package import canonical
from moestro.package.api import (
    Kek,
    Keys,
    Options,
    Package,
    Release,
    diff,
    new_key,
    pack,
    save_pair,
    sign_package,
    verify,
)
from moestro.package.build import EPOCH
from moestro.package.codecs.lowrank import LowRank
from moestro.package.codecs.lowrank_fit import fit
from moestro.package.codecs.quantised import Quantised
from moestro.package.codecs.registry import READERS, decoded
from moestro.package.describe import check_management, check_technical, dumps, management_info, technical_info
from moestro.package.descriptor import TensorEntry
from moestro.package.dtypes import DATA_TYPES
from moestro.package.encrypt import TAG_BYTES, Opened, Sealer, check_envelope
from moestro.package.hashing import digest
from moestro.package.keys import load_signing, load_verifying
from moestro.package.layout import FILE_HEADER, MODEL_HEADER
from moestro.package.limits import CHUNK_BYTES
from moestro.package.manifest import Manifest
from moestro.package.oci import BLOBS, from_oci, to_oci
from moestro.package.reader import ModelFile
from moestro.package.resume import Leftover
from moestro.package.safetensors import read_header
from moestro.package.sign import Trust
from moestro.package.sources import CHECKPOINT, gather
from moestro.package.spans import Bytes

NUMBERS = [0, 1, 2, 31, 63, 64, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53 - 1, 2**53, 2**63, 2**64 - 1]
VALUES = [None, True, -1, 0, 1, 64, 2**53, 2**53 - 1, "", "..", "\x00", "x" * 600, [], [[]], {}, "0" * 64, 1e9, "raw"]
SLOW_S = 1.0


@dataclass(frozen=True)
class Target:
    """One parser."""

    name: str
    seeds: list[bytes]
    run: Callable[[bytes], object]
    mend: Callable[[bytearray], None] | None = None
    """Makes guarding digests fit."""
    refuses: type[Error] = PackageError
    """What it may raise."""
    turns: int = 8
    """Mutants in a round over all parsers; slow ones get fewer."""


@dataclass(slots=True)
class Findings:
    """What became of mutants."""

    mutants: Counter[str] = field(default_factory=Counter)
    """By parser."""
    refused: Counter[str] = field(default_factory=Counter)
    """By error class."""
    slowest_s: float = 0.0
    """CPU seconds of the slowest mutant, so that a busy machine does not look like a hang."""
    cpu_s: float = 0.0


def below(random: Random, bound: int) -> int:
    """A whole number in 0..bound-1, near enough to evenly, in a fifth of the time of `randrange`."""
    return int(random.random() * bound)


def mutant(random: Random, seed: bytes) -> bytearray:
    """One to three changes; most mutants keep their length, so that they get past the checks of lengths."""
    data = bytearray(seed)
    has_json = b'{"' in seed
    kinds = KINDS[: 4 if random.random() < 0.6 else None]
    for _ in range(1 + below(random, 3)):
        if has_json and random.random() < 0.4:
            _mutate_json(random, data)
        elif data:
            at = below(random, len(data))
            length = 1 + below(random, min(64, len(data) - at))
            kinds[below(random, len(kinds))](random, data, at, length)
    return data


def _flip(random: Random, data: bytearray, at: int, length: int) -> None:
    data[at] ^= 1 << below(random, 8)


def _set(random: Random, data: bytearray, at: int, length: int) -> None:
    data[at] = below(random, 256)


def _number(random: Random, data: bytearray, at: int, length: int) -> None:
    width = min(2 << below(random, 3), len(data) - at)
    number = NUMBERS[below(random, len(NUMBERS))] % (1 << 8 * width)
    data[at : at + width] = number.to_bytes(width, "little")


def _exchange(random: Random, data: bytearray, at: int, length: int) -> None:
    other = below(random, len(data) - length + 1)
    data[at : at + length] = data[other : other + length]


def _cut(random: Random, data: bytearray, at: int, length: int) -> None:
    del data[at : at + length]


def _repeat(random: Random, data: bytearray, at: int, length: int) -> None:
    data[at:at] = data[at : at + length]


def _truncate(random: Random, data: bytearray, at: int, length: int) -> None:
    del data[at:]


KINDS = (_flip, _set, _number, _exchange, _cut, _repeat, _truncate)
"""The first four keep the length."""


def _mutate_json(random: Random, data: bytearray) -> None:
    """Replace, remove or double a value of a JSON object that the bytes hold."""
    start, end = data.find(b'{"'), data.rfind(b"}") + 1
    if start < 0 or end <= start:
        return
    try:
        table = json.loads(data[start:end])
    except (ValueError, RecursionError):
        return
    node, key = _place(random, table)
    if node is None:
        return
    match below(random, 3):
        case 0:
            node[key] = VALUES[below(random, len(VALUES))]
        case 1:
            del node[key]
        case 2 if isinstance(node, list):
            node.insert(key, node[key])
        case _:
            node["x_" + str(key)] = node[key] if isinstance(node, dict) else 0
    try:
        text = canonical.dumps(table)
    except (ValueError, RecursionError):
        return
    data[start:end] = text
    if data.startswith(b"PTMF") and start >= 36:  # the length that a model header has for its descriptor
        data[start - 12 : start - 8] = struct.pack("<I", len(text))


def _place(random: Random, table: object) -> tuple[object, object]:
    node: object = table
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))  # type: ignore[arg-type]
        if not keys:
            return None, None
        key = keys[below(random, len(keys))]
        inner = node[key]  # type: ignore[index]
        if not isinstance(inner, (dict, list)) or random.random() < 0.2 or (isinstance(node, list) and not inner):
            return (
                (node, key) if isinstance(node, dict) else (None, None) if not isinstance(node, list) else (node, key)
            )
        node = inner


def _mend_model_file(data: bytearray) -> None:
    """The digest of the first descriptor."""
    at = 64 + MODEL_HEADER.size
    if len(data) > at:
        length = struct.unpack_from("<I", data, 64 + 8)[0]
        if at + length + 32 <= len(data):
            head = bytes(data[: FILE_HEADER.size]), bytes(data[64:at]), bytes(data[at : at + length])
            data[at + length : at + length + 32] = digest("sha256", *head)


def _mend_manifest(data: bytearray) -> None:
    try:
        table = json.loads(data)
        found = Manifest.parse(canonical.dumps(table))
    except (ValueError, RecursionError, PackageError, KeyError, TypeError):
        return
    data[:] = found.dumps()


class Files:
    """Model files from memory."""

    def __init__(self, keys: Keys | None) -> None:
        self.handle, self.keys = os.memfd_create("fuzz"), keys

    def read(self, data: bytes) -> None:
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, data, 0)
        with ModelFile(os.dup(self.handle), "fuzz.ptm", self.keys) as file:
            file.check_gaps()
            for model in file.models:
                if model.is_open:
                    for segment in model.descriptor.segments:
                        model.segment(segment, b"")
                    for tensor in model.descriptor.tensors:
                        span = decoded(tensor, model.stored(tensor), Bytes(bytes(tensor.num_bytes)))
                        span.read(0, min(span.length, 1 << 16))

    def go_on(self, data: bytes) -> None:
        """As what a killed try left of an encrypted file; where the head lies, and far behind the end."""
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, data, 0)
        find = Leftover(self.handle, len(data), self.keys or Keys()).sealed(64, 12, "demo", 64)
        assert find(0, 1) is find(4 * CHUNK_BYTES, 1) is None


def _codec_target(name: str) -> Target:
    random = np.random.default_rng(0)
    old = random.normal(0, 0.02, 2400).astype(np.float16)
    new = (old + random.normal(0, 1e-3, 2400)).astype(np.float16)
    entry = TensorEntry("t", DATA_TYPES["float16"], (40, 60), name)
    base, target = Bytes(old.tobytes()), Bytes(new.tobytes())
    codec = READERS[name]
    if name == "lowrank":
        factors = fit(replace(entry, shape=(40, 60)), base, target, 3)
        entry, codec = replace(entry, cp=factors.cp()), LowRank(factors)
    if name == "qres":
        entry, codec = replace(entry, cp={"bits": 4, "group": 60}), Quantised(np.full(40, 1e-3, np.float32))
    against = None if name in ("zstd", "bp-zstd") else base
    seed = b"".join(bytes(part) for part in codec.encode(entry, target, against))

    def run(data: bytes) -> None:
        span = decoded(entry, Bytes(data), against)
        assert len(span.read(0, span.length)) == entry.num_bytes

    return Target(name, [seed], run)


def targets(folder: Path) -> list[Target]:
    """Every parser with good inputs."""
    weights = {name: value for name, value in tensors().items() if name != "experts.w"}
    save_model(folder / "m", weights)
    weights["embed"] = weights["embed"] + np.float16(0.01)
    save_model(folder / "n", weights)
    kek = bytes(32)
    keys = Keys(kek=lambda kid: kek)
    release = Release(package_id="demo")
    pack(folder / "m", folder / "raw", Options(release=release))
    pack(folder / "n", folder / "compact", Options(release=release, compact=True))
    pack(folder / "m", folder / "secret", Options(release=release, to=[Kek("k", kek)]))
    diff([folder / "raw"], folder / "compact", folder / "update")
    public = save_pair(new_key("ed25519"), folder / "key")
    sign_package(folder / "raw", folder / "key")
    trust = Trust.load([public])
    model_files = [next((folder / name).rglob("*.ptm")).read_bytes() for name in ("raw", "compact", "update", "secret")]
    manifest = (folder / "raw" / "Meta-info" / "manifest.json").read_bytes()
    signature = (folder / "raw" / "Meta-info" / "manifest.sig").read_bytes()
    here = folder / "raw" / "Meta-info" / "demo"
    with Package.open(folder / "secret") as package:
        encryption = package.stored()[0].descriptor.encryption
    return [
        Target("model file", model_files, Files(None).read, _mend_model_file),
        Target("encrypted model file", model_files[3:], Files(keys).read, _mend_model_file),
        Target("leftover", model_files[3:], Files(keys).go_on),
        Target("manifest", [manifest], Manifest.parse, _mend_manifest),
        Target("signature", [signature], partial(trust.check, manifest)),
        Target("managementinfo", [(here / "managementinfo.json").read_bytes()], lambda d: check_management(d, "demo")),
        Target("technicalinfo", [(here / "technicalinfo.json").read_bytes()], lambda d: check_technical(d, "demo")),
        Target(
            "envelope", [canonical.dumps(encryption)], lambda d: check_envelope(canonical.loads(d, 1 << 20, "e"), 9)
        ),
        Target(
            "safetensors", [(folder / "m/model.safetensors").read_bytes()], lambda d: read_header(memoryview(d), "f")
        ),
        Target(
            "public key", [public.read_bytes()], Written(folder / "k.pub", load_verifying).read, refuses=ConfigError
        ),
        Target(
            "private key",
            [(folder / "key").read_bytes()],
            Written(folder / "k", load_signing).read,
            refuses=ConfigError,
        ),
        *_folder_targets(folder),
        *_oci_targets(folder),
        *map(_codec_target, READERS),
    ]


def _folder_targets(folder: Path) -> list[Target]:
    """What `pack` reads of a model's folder besides weights."""
    checkpoint = folder / "run" / "checkpoints" / "step-7"
    save_model(checkpoint, {"a": np.arange(9)})
    ours = {"num_layers": 1, "width": 16, "attention": {"num_heads": 2}, "moe": {"num_experts": 4}}
    (checkpoint / "config.json").write_text(json.dumps(ours))
    digests = {name: sha256_of(checkpoint / name) for name in contents(checkpoint)}
    table = {"format": CHECKPOINT, "step": 7, "sha256": digests}
    (checkpoint / "manifest.json").write_text(json.dumps(table))

    def described(model: Path) -> Callable[[Path], None]:
        def load(_: Path) -> None:
            source = gather(model)
            management = management_info(
                "demo", {"created_at": EPOCH}, 9, 9, source.segments.get("file/README.md", b"")
            )
            check_management(dumps(management), "demo")
            check_technical(dumps(technical_info(source.json("config"), 0, ["a"])), "demo")

        return load

    places = [("m", "config.json"), ("m", "README.md"), ("run", "checkpoints/step-7/manifest.json")]
    places.append(("run", "checkpoints/step-7/config.json"))
    return [
        Target(
            f"{name} of {Path(file).name}", [(folder / name / file).read_bytes()],
            Written(folder / name / file, described(folder / name)).read, turns=1,
        )
        for name, file in places
    ]  # fmt: skip


def _oci_targets(folder: Path) -> list[Target]:
    """The two tables of an OCI layout; what they refuse, they refuse before any layer is read, mostly."""
    save_model(folder / "small", {"a": np.arange(9)})
    pack(folder / "small", folder / "one", Options(release=Release(package_id="one")))
    to_oci(folder / "one", folder / "oci")
    out, index = folder / "from-oci", folder / "oci" / "index.json"
    good = index.read_bytes()
    listed = json.loads(good)["manifests"][0]
    image = (folder / "oci" / BLOBS / listed["digest"].removeprefix("sha256:")).read_bytes()

    def convert(_: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        from_oci(folder / "oci", out)

    def with_image(data: bytes) -> None:
        name = digest("sha256", data).hex()
        blob = folder / "oci" / BLOBS / name
        blob.write_bytes(data)
        index.write_bytes(json.dumps({"manifests": [{"digest": f"sha256:{name}", "size": len(data)}]}).encode())
        try:
            convert(index)
        finally:
            if data != image:
                blob.unlink()

    return [
        Target("OCI index", [good], Written(index, convert).read, turns=1),
        Target("OCI manifest", [image], with_image, turns=1),
    ]


class Written:
    """What is read from a path."""

    def __init__(self, path: Path, load: Callable[[Path], object]) -> None:
        self.path, self.load = path, load

    def read(self, data: bytes) -> None:
        self.path.write_bytes(data)
        self.load(self.path)


def fuzz(parsers: list[Target], count: int, seed: int | list[int]) -> Findings:
    """Try so many mutants, in turns over the parsers; raises what a parser should not have raised."""
    random, found, start = Random(str(seed)), Findings(), time.process_time()
    turns = [parser for parser in parsers for _ in range(parser.turns)]
    for number in range(count):
        target = turns[number % len(turns)]
        data = mutant(random, target.seeds[below(random, len(target.seeds))])
        if target.mend is not None and random.random() < 0.5:
            target.mend(data)
        given, began = bytes(data), time.process_time()
        try:
            target.run(given)
        except target.refuses as error:
            found.refused[type(error).__name__] += 1
        except BaseException:
            Path(f"fuzz-{target.name.replace(' ', '-')}.bin").write_bytes(data)
            raise
        found.slowest_s = max(found.slowest_s, time.process_time() - began)
        found.mutants[target.name] += 1
    found.cpu_s = time.process_time() - start
    return found


def tamper_sealed(count: int, seed: int | list[int]) -> Counter[str]:
    """Change ciphertext of three chunks in so many ways; reading must fail by the encryption alone, without digests."""
    random, found, chunk = Random(str(seed)), Counter[str](), CHUNK_BYTES + TAG_BYTES
    plain = random.randbytes(2 * CHUNK_BYTES + 999)
    texts, cuts = [], range(0, len(plain), CHUNK_BYTES)
    for _ in range(2):  # two releases under the same data key
        sealer = Sealer([Kek("k", bytes(32))], "demo", dek=bytes(range(32)))
        sealed = [bytes(sealer.seal(at >> 20, plain[at : at + CHUNK_BYTES], at == cuts[-1])) for at in cuts]
        texts.append((sealer.envelope(len(plain)), b"".join(sealed)))
    (envelope, good), (_, former) = texts
    keys = Keys(kek=lambda kid: bytes(32))
    for _ in range(count):
        bad, kind = _tampered_chunks(random, good, former, chunk)
        if bad == good:
            bad, kind = good + b"\0", "extended"
        try:
            opened = Opened.of(Bytes(bad), envelope, "demo", keys)
            for start in random.sample(cuts, 3):
                opened.read(start, min(CHUNK_BYTES, len(plain) - start))
        except DecryptionError:
            found[kind] += 1
        else:
            raise AssertionError(f"ciphertext was {kind}, and nothing noticed")
    return found


def _tampered_chunks(random: Random, good: bytes, former: bytes, chunk: int) -> tuple[bytes, str]:
    """Whole chunks exchanged, repeated or from another release, and what `_tampered` does to bytes."""
    pieces, others = ([text[at : at + chunk] for at in range(0, len(text), chunk)] for text in (good, former))
    first, second = random.sample(range(3), 2)
    match random.randrange(4):
        case 0:
            pieces[first], pieces[second] = pieces[second], pieces[first]
            return b"".join(pieces), "chunks exchanged"
        case 1:
            pieces[first] = pieces[second]
            return b"".join(pieces), "chunk repeated"
        case 2:
            pieces[first] = others[first]
            return b"".join(pieces), "chunk replayed"
    bad, kind = _tampered(random, good, former)
    return bad, f"ciphertext {kind}"


def tamper(count: int, seed: int | list[int]) -> Counter[str]:
    """Change a signed package in so many ways; every one must be found by `verify` with the key that signed."""
    random, found = Random(str(seed)), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "m", {"a": np.arange(50, dtype=np.float32), "b": np.arange(9)})
        public = save_pair(new_key("ed25519"), folder / "key")
        for sequence in (1, 2):
            package = folder / f"p{sequence}"
            pack(folder / "m", package, Options(release=Release(package_id="demo", sequence=sequence), compact=True))
            sign_package(package, folder / "key")
        trust = Trust.load([public])
        paths = sorted(path for path in package.rglob("*") if path.is_file())
        former = [(folder / "p1" / path.relative_to(package)).read_bytes() for path in paths]
        good = [path.read_bytes() for path in paths]
        verify(package, trust)
        for number in range(count):
            index = number % len(paths)
            bad, kind = _tampered(random, good[index], former[index])
            if bad == good[index]:
                bad, kind = good[index] + b"\0", "extended"
            paths[index].write_bytes(bad)
            try:
                verify(package, trust)
            except PackageError:
                found[kind] += 1
            else:
                raise AssertionError(f"{kind} of {paths[index]} was not found")
            paths[index].write_bytes(good[index])
        verify(package, trust)
    return found


def _tampered(random: Random, good: bytes, former: bytes) -> tuple[bytes, str]:
    at, length = random.randrange(len(good)), random.randrange(1, 1 + len(good) // 3)
    match random.randrange(5):
        case 0 | 1:
            return good[:at] + bytes([good[at] ^ 1 << random.randrange(8)]) + good[at + 1 :], "changed"
        case 2:
            return good[:at], "truncated"
        case 3:
            return good[length : 2 * length] + good[:length] + good[2 * length :], "exchanged"
    return former, "replayed"
