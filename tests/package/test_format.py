"""The rules of the container, its descriptor and its manifest, one forged file each (annex X.2; 0.3, 8.2.1, 8.2.2,
8.2.7, 8.4)."""

import copy
import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from package.samples import save_model

from moestro.core.errors import (
    ConversionError,
    FormatError,
    IntegrityError,
    LimitExceeded,
    PackageError,
    UnsafePath,
    UnsupportedVersion,
)
from moestro.package import canonical
from moestro.package.api import Options, Package, Release, pack, unpack
from moestro.package.build import EPOCH, Content, build
from moestro.package.codecs.registry import decoded
from moestro.package.describe import management_info, technical_info
from moestro.package.dtypes import DATA_TYPES
from moestro.package.hashing import root_of
from moestro.package.manifest import Manifest
from moestro.package.paths import check_model_id, check_path, check_paths
from moestro.package.reader import ModelFile
from moestro.package.spans import Bytes
from moestro.package.weights import Weights
from moestro.package.writer import ModelSource, SegmentSource, TensorSource, write_model_file

Table = dict[str, Any]


def write_small(path: Path) -> bytes:
    """The two tensors of annex Z.1."""
    b, w = np.array([1, 2]), np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors = [
        TensorSource("b", DATA_TYPES["int64"], (2,), Bytes(b.tobytes())),
        TensorSource("w", DATA_TYPES["float32"], (2, 3), Bytes(w.tobytes())),
    ]
    write_model_file(path, [ModelSource("demo-1", tensors)], align_log2=6)
    return path.read_bytes()


def forged(path: Path, change: Callable[[Table], object] = lambda table: None, **header: int) -> Path:
    """The small file with another descriptor or header, its descriptor digest made to fit."""
    data = write_small(path)
    length = struct.unpack_from("<I", data, 64 + 8)[0]
    table = canonical.loads(data[84 : 84 + length], 1 << 20, "t")
    change(table)
    text = canonical.dumps(table)
    fields = {"magic": 0x464D5450, "version": 2 << 16, "count": 1, "flags": 6}
    fields |= {"index": 0, "model_flags": 0, "length": len(text), "low": 88, "high": 0} | header
    file_header = struct.pack("<IIII", *(fields[name] for name in ("magic", "version", "count", "flags")))
    names = ("index", "model_flags", "length", "low", "high")
    model_header = struct.pack("<IIIII", *(fields[name] for name in names))
    head = file_header.ljust(64, b"\0") + model_header + text
    head += hashlib.sha256(file_header + model_header + text).digest()
    path.write_bytes(head.ljust(-(-len(head) // 64) * 64, b"\0") + data[-88:])
    return path


def test_z_1_the_smallest_file_lies_as_the_specification_draws_it(tmp_path: Path) -> None:
    data = write_small(tmp_path / "f.ptm")
    assert data[:16].hex() == "50544d460000020001000000" + "06000000"
    assert (len(data) - 88) % 64 == 0
    stored = data[-88:]
    assert stored[:16] == np.array([1, 2]).tobytes()
    assert stored[64:] == np.arange(6, dtype=np.float32).tobytes()
    with ModelFile.open(tmp_path / "f.ptm") as file:
        descriptor = file.models[0].descriptor
        assert [(t.name, t.offset, t.length) for t in descriptor.tensors] == [("b", 0, 16), ("w", 64, 24)]
        # data_root as in the annex; digests of tensors are trees since version 2
        assert descriptor.data_root == "98a9e1087b0deb3d8c2fd8ae49f87711be40c0c19254227a74fc05dd87748075"
        identity = canonical.dumps({"dtype": "int64", "name": "b", "shape": [2]})
        leaf = hashlib.sha256(b"\0" + stored[:16]).digest()
        assert descriptor.tensors[0].digest == hashlib.sha256(b"\0" + identity + b"\n" + leaf).hexdigest()
        leaves = [bytes.fromhex(tensor.digest) for tensor in descriptor.tensors]
        assert descriptor.weights_root == hashlib.sha256(b"\1" + leaves[0] + leaves[1]).hexdigest()


def test_a_forged_file_without_changes_is_good(tmp_path: Path) -> None:
    with ModelFile.open(forged(tmp_path / "f.ptm")) as file:
        file.check_gaps()


@pytest.mark.parametrize(
    ("header", "error"),
    [
        ({"magic": 1}, FormatError),
        ({"version": 3 << 16}, UnsupportedVersion),
        ({"count": 0}, LimitExceeded),
        ({"count": 4097}, LimitExceeded),
        ({"count": 2}, FormatError),
        ({"flags": 5}, FormatError),
        ({"flags": 22}, FormatError),
        ({"flags": 6 | 1 << 11}, FormatError),
        ({"flags": 6 | 1 << 8}, FormatError),
        ({"index": 1}, FormatError),
        ({"model_flags": 8}, FormatError),
        ({"model_flags": 1, "flags": 6 | 1 << 8}, FormatError),
        ({"model_flags": 4, "flags": 6 | 4 << 8}, FormatError),
        ({"length": 1}, LimitExceeded),
        ({"length": 67_108_865}, LimitExceeded),
        ({"length": 10_000}, FormatError),
        ({"low": 87}, PackageError),
        ({"low": 89}, FormatError),
        ({"high": 1}, FormatError),
        ({"high": 2**32 - 1}, FormatError),
    ],
)
def test_r_8_2_2_1_headers_that_lie_are_refused(
    tmp_path: Path, header: dict[str, int], error: type[PackageError]
) -> None:
    with pytest.raises(error):
        ModelFile.open(forged(tmp_path / "f.ptm", **header))


def test_r_8_2_2_3_an_unknown_minor_version_and_x_keys_are_readable(tmp_path: Path) -> None:
    with ModelFile.open(forged(tmp_path / "f.ptm", lambda t: t.update(x_mine=1), version=2 << 16 | 7)) as file:
        assert file.models[0].descriptor.extra == {"x_mine": 1}


def entry(number: int, **change: object) -> Callable[[Table], object]:
    """Change an entry of `tensors`."""
    return lambda table: table["tensors"][number].update(change)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t.update(surprise=1), FormatError),  # R-8.2.2-3
        (lambda t: t.pop("weights_root"), FormatError),
        (lambda t: t.update(weights_root="0" * 64), FormatError),
        (lambda t: t.update(data_root="0" * 63), FormatError),
        (lambda t: t.update(hash="md5"), FormatError),
        (lambda t: t.update(chunk_size=1000), FormatError),
        (lambda t: t.update(chunk_size=(1 << 20) + 1), FormatError),
        (lambda t: t.update(model_id="../x"), UnsafePath),
        (lambda t: t.update(base={"weights_root": "0" * 64, "model_id": "a", "chain": 65}), LimitExceeded),
        (lambda t: t.update(shard={"index": 2, "count": 1, "set": "0" * 64}), PackageError),
        (lambda t: t["tensors"].reverse(), FormatError),
        (lambda t: t["tensors"].pop(), FormatError),  # R-8.2.2-5: data without an owner
        (entry(0, offset=8), FormatError),
        (entry(1, offset=0), FormatError),
        (entry(1, offset=128), FormatError),
        (entry(1, length=25), FormatError),
        (entry(1, offset=2**53), FormatError),
        (entry(1, offset=-64), FormatError),
        (entry(1, offset=True), FormatError),
        (entry(1, name="b"), FormatError),  # R-8.2.2-6
        (entry(1, name=""), FormatError),
        (entry(1, name="a\x07"), FormatError),
        (entry(1, name="n" * 513), FormatError),
        (entry(1, dtype="float128"), FormatError),
        (entry(1, shape=[2, 4]), FormatError),
        (entry(1, shape=[2, -3]), FormatError),
        (entry(1, shape=[1] * 9), LimitExceeded),
        (entry(1, shape=[2**52, 2**52]), LimitExceeded),
        (entry(1, codec="gzip"), FormatError),
        (entry(1, codec="qres"), FormatError),  # needs a base
        (entry(1, cp={"rank": 1}), FormatError),
        (entry(1, digest="A" * 64), FormatError),
        (entry(1, extra=1), FormatError),
    ],
)
def test_r_8_2_2_5_and_6_descriptors_that_lie_are_refused(
    tmp_path: Path, change: Callable[[Table], object], error: type[PackageError]
) -> None:
    with pytest.raises(error):
        ModelFile.open(forged(tmp_path / "f.ptm", change))


def test_r_8_2_2_1_padding_gaps_and_ends_must_be_clean(tmp_path: Path) -> None:
    good = write_small(tmp_path / "f.ptm")
    for at in (20, len(good) - 89):  # before the model header, before the data
        data = bytearray(good)
        data[at] = 1
        (tmp_path / "f.ptm").write_bytes(data)
        with pytest.raises((FormatError, IntegrityError)):
            ModelFile.open(tmp_path / "f.ptm")
    data = bytearray(good)
    data[-30] = 1  # between b and w
    (tmp_path / "f.ptm").write_bytes(data)
    with pytest.raises(FormatError, match="not zero"), ModelFile.open(tmp_path / "f.ptm") as file:
        file.check_gaps()
    for length in range(len(good)):
        (tmp_path / "f.ptm").write_bytes(good[:length])
        with pytest.raises(PackageError):
            ModelFile.open(tmp_path / "f.ptm")
    (tmp_path / "f.ptm").write_bytes(good + b"\0")
    with pytest.raises(FormatError, match="the last model ends"):
        ModelFile.open(tmp_path / "f.ptm")


def test_several_models_follow_one_another(tmp_path: Path) -> None:
    one = [TensorSource("w", DATA_TYPES["uint8"], (100,), Bytes(bytes(100)))]
    models = [ModelSource("a", one), ModelSource("b", [*one, TensorSource("v", DATA_TYPES["int8"], (), Bytes(b"x"))])]
    write_model_file(tmp_path / "f.ptm", models)
    with ModelFile.open(tmp_path / "f.ptm") as file:
        assert [model.descriptor.model_id for model in file.models] == ["a", "b"]
        assert [len(model.descriptor.tensors) for model in file.models] == [1, 2]


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":1,"a":1}',
        b'{"b":1,"a":1}',
        b'{"a": 1}',
        b'{"a":1.0}',
        b'{"a":1e3}',
        b'{"a":01}',
        b'{"a":-0}',
        b'{"a":9007199254740992}',
        b'{"a":NaN}',
        b'{"a":"\\u0041"}',
        b'{"a":"\\/"}',
        b'{"a":1}\n',
        b'\xef\xbb\xbf{"a":1}',
        b'{"\xc3\xa9":1}',
        b'{"a":"\xff"}',
        b'{"a":"\\ud800"}',
        b"",
        b"[" * 100_000,
        b"[" * 40 + b"]" * 40,
    ],
)
def test_0_3_json_has_one_spelling(text: bytes) -> None:
    with pytest.raises((FormatError, LimitExceeded)):
        canonical.loads(text, 1 << 20, "t")


@pytest.mark.parametrize("model_id", ["", ".", "..", "-a", "a/b", "a" * 129, "a b", "ä", "a.", "con", 7])
def test_r_8_2_1_2_model_ids(model_id: object) -> None:
    with pytest.raises(UnsafePath):
        check_model_id(model_id)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/a",
        "a//b",
        "a/./b",
        "a/../b",
        "..",
        "a\\b",
        "c:a",
        "a\0b",
        "a\nb",
        "a.",
        "a ",
        "x" * 256,
        "/".join(["x" * 200] * 6),
        "e\u0301",
        "NUL",
        "com1.txt",
        "a/Aux/b",
        "\ud800",
    ],
)
def test_r_8_2_1_3_paths(path: str) -> None:
    with pytest.raises(UnsafePath):
        check_path(path)


@pytest.mark.parametrize("paths", [["a", "A"], ["straße", "STRASSE"], ["a", "a/b"], ["A/x", "a"]])
def test_r_8_2_1_3_paths_that_fall_together(paths: list[str]) -> None:
    with pytest.raises(UnsafePath):
        check_paths(paths)


@pytest.fixture
def manifest(tmp_path: Path) -> Table:
    weights = {"w": np.zeros((3 << 19,), np.float32), "v": np.ones(3, np.float32)}
    pack(save_model(tmp_path / "m", weights), tmp_path / "p", Options(release=Release(package_id="demo")))
    found: Table = canonical.loads((tmp_path / "p/Meta-info/manifest.json").read_bytes(), 1 << 20, "m")
    return found


def mended(table: Table) -> bytes:
    """With the package_root that its files give."""
    leaves = [hashlib.sha256(b"\0" + canonical.dumps(file)).digest() for file in table["files"]]
    while len(leaves) > 1:
        pairs = [hashlib.sha256(b"\1" + a + b).digest() for a, b in zip(leaves[::2], leaves[1::2], strict=False)]
        leaves = pairs + leaves[len(leaves) & ~1 :]
    table["package_root"] = leaves[0].hex()
    return canonical.dumps(table)


def test_8_2_7_the_package_root_is_the_tree_over_the_files(manifest: Table) -> None:
    right = manifest["package_root"]
    Manifest.parse(mended(copy.deepcopy(manifest)))
    assert Manifest.parse(canonical.dumps(manifest)).package_root == right
    with pytest.raises(FormatError, match="package_root"):
        Manifest.parse(canonical.dumps(manifest | {"package_root": "0" * 64}))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(schema="other"),
        lambda t: t.update(sequence=0),
        lambda t: t.update(sequence="1"),
        lambda t: t.update(created_at="yesterday"),
        lambda t: t.update(expires_at="2026-13-01T00:00:00Z"),
        lambda t: t.update(package_id=".."),
        lambda t: t.update(models=[]),
        lambda t: t.update(surprise=1),
        lambda t: t["files"].reverse(),
        lambda t: t["files"].append(t["files"][-1]),
        lambda t: t["files"].pop(),
        lambda t: t["files"].pop(0),
        lambda t: t["files"][0].update(path="../x"),
        lambda t: t["files"][0].update(size=-1),
        lambda t: t["files"][-1].update(chunks="Model/x"),
        lambda t: t["files"][-1].update(size=1),
        lambda t: t["files"].append({"path": "Meta-info/manifest.json", "size": 0, "root": "0" * 64}),
        lambda t: t["models"][0].update(files=[]),
        lambda t: t["models"][0].update(model_id="other"),
        lambda t: t["models"].append(t["models"][0]),
        lambda t: t["models"][0].update(update={"base": "0" * 64, "chain": 1, "mode": "fast"}),
        lambda t: t["models"][0].update(update={"base": "0" * 64, "chain": 65, "mode": "exact"}),
    ],
)
def test_8_2_7_manifests_that_lie_are_refused(manifest: Table, change: Callable[[Table], object]) -> None:
    change(manifest)
    with pytest.raises(PackageError):
        Manifest.parse(mended(manifest))


def from_parts(out: Path, segments: dict[str, bytes]) -> Path:
    """A package made without `pack`."""
    data = np.arange(4, dtype=np.float32).tobytes()
    tensors = [TensorSource("w", DATA_TYPES["float32"], (4,), Bytes(data))]
    model = ModelSource("demo", tensors, [SegmentSource(name, content) for name, content in segments.items()])
    technical = technical_info({}, 0, [])
    content = Content([model], management_info("demo", {"created_at": EPOCH}, 4, 16, b""), technical)
    build(out, [content], Release(package_id="demo"))
    return out


def test_a_package_without_source_unpacks_to_one_safetensors_file(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    unpack(from_parts(tmp_path / "p", {"file/notes.txt": b"hi"}), tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors")["w"].tolist() == [0, 1, 2, 3]
    assert (tmp_path / "out/notes.txt").read_bytes() == b"hi"


def source(*files: Table) -> bytes:
    return canonical.dumps({"schema": "moestro/source/1", "kind": "huggingface", "files": list(files)})


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ([{"path": "../up", "segment": "config"}], UnsafePath),
        ([{"path": "/etc/x", "segment": "config"}], UnsafePath),
        ([{"path": "a", "segment": "config"}, {"path": "A", "segment": "config"}], UnsafePath),
        ([{"path": "a", "segment": "config"}, {"path": "a/b", "segment": "config"}], UnsafePath),
        ([{"path": "a", "segment": "nothing"}], ConversionError),
        ([{"path": "a", "header": "config"}], ConversionError),
        ([{"path": "a", "segment": "config"}], ConversionError),  # leaves the tensor out
        ([{"path": "a", "segment": "config", "run": "x"}], FormatError),
    ],
)
def test_r_8_3_2_1_nothing_is_written_outside(tmp_path: Path, files: list[Table], error: type[PackageError]) -> None:
    package = from_parts(tmp_path / "p", {"source": source(*files), "config": b"{}"})
    with pytest.raises(error):
        unpack(package, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep" / "out").exists()
    assert not (tmp_path / "deep" / "up").exists()
    assert not (tmp_path / "up").exists()


def test_r_8_2_2_2_a_promise_of_terabytes_allocates_nothing(tmp_path: Path) -> None:
    def huge(table: Table) -> None:
        table["tensors"][1] |= {"shape": [2**40], "codec": "bp-zstd"}

    path = forged(tmp_path / "f.ptm", huge, model_flags=1, flags=6 | 1 << 8)
    with pytest.raises(PackageError):
        _decode_second(path)


def _decode_second(path: Path) -> None:
    with ModelFile.open(path) as file:
        model = file.models[0]
        decoded(model.descriptor.tensors[1], model.stored(model.descriptor.tensors[1]), None)


@pytest.mark.slow
def test_x_1_a_tensor_above_4_gib_from_a_sparse_file(tmp_path: Path) -> None:
    size = (4 << 30) + (1 << 20) + 7
    sparse = tmp_path / "zeros"
    with sparse.open("wb") as file:
        file.truncate(size)
    import mmap

    with sparse.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        span = Bytes(memoryview(mapped))
        model = ModelSource("demo", [TensorSource("w", DATA_TYPES["uint8"], (size,), span)])
        write_model_file(tmp_path / "f.ptm", [model])
        del span, model
    with ModelFile.open(tmp_path / "f.ptm") as opened:
        assert opened.models[0].descriptor.tensors[0].length == size
    os.unlink(tmp_path / "f.ptm")


@pytest.mark.slow
def test_x_1_a_hundred_thousand_tensors(tmp_path: Path) -> None:
    tensors = [TensorSource(f"t{i}", DATA_TYPES["uint8"], (3,), Bytes(b"abc")) for i in range(100_000)]
    write_model_file(tmp_path / "f.ptm", [ModelSource("demo", tensors)])
    with ModelFile.open(tmp_path / "f.ptm") as file:
        assert len(file.models[0].descriptor.tensors) == 100_000


@pytest.mark.parametrize("codec", ["zstd", "bp-zstd"])
def test_what_is_stored_of_an_empty_tensor_is_checked_too(tmp_path: Path, codec: str) -> None:
    source = TensorSource("w", DATA_TYPES["float32"], (0, 3), Bytes(b""), codec, lambda: iter([b"strange"]))
    write_model_file(tmp_path / "f.ptm", [ModelSource("demo", [source])])
    with ModelFile.open(tmp_path / "f.ptm") as file:
        entry = file.models[0].descriptor.tensors[0]
        with pytest.raises(FormatError, match="the number of blocks is not 0"):
            Weights("sha256", {"w": entry}, {"w": file.models[0]}).check("w")


def test_segments_are_verified(tmp_path: Path) -> None:
    package = from_parts(tmp_path / "p", {"graph": b"{}" * 100})
    with Package.open(package) as opened:
        found = opened.stored()[0].descriptor.segments[0]
        assert (found.name, found.size, found.digest) == ("graph", 200, root_of("sha256", b"{}" * 100, 1 << 20).hex())
        assert opened.segments() == {"graph": b"{}" * 100}


def test_half_a_character_is_refused_in_descriptions_too() -> None:
    with pytest.raises(FormatError, match="lone surrogate"):
        canonical.loads_loosely(rb'{"a":"\ud800"}', 100, "x")
    assert canonical.loads_loosely(rb'{"a":"\ud83d\ude00"}', 100, "x") == {"a": "\N{GRINNING FACE}"}
