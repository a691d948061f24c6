"""`package.pack`: what goes into a package comes out bit for bit, the same input gives the same bytes, and any changed
byte is found (Annex X: 1, 3, 6, 7)."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from package.samples import contents, save_model, tensors
from safetensors.numpy import load_file

from moestro.core.errors import ConfigError, ConversionError, FormatError, IntegrityError, PackageError, UnsafePath
from moestro.package.api import Options, Package, Release, pack, unpack, verify


def options(**given: object) -> Options:
    return Options(release=Release(package_id="demo"), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("shard_bytes", [1 << 40, 100_000])
def test_r_8_3_2_what_goes_in_comes_out_bit_for_bit(
    model: Path, tmp_path: Path, compact: bool, shard_bytes: int
) -> None:
    packed = pack(model, tmp_path / "p", options(compact=compact, shard_bytes=shard_bytes))
    assert len(packed.manifest.models[0].files) == (1 if shard_bytes > 10**6 else 3)
    findings = verify(tmp_path / "p")
    assert findings.tensors == len(tensors())
    assert findings.unread == []
    unpack(tmp_path / "p", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(model)


@pytest.mark.parametrize("name", ["sha256", "blake3", "sm3"])
def test_any_known_hash_serves(model: Path, tmp_path: Path, name: str) -> None:
    pack(model, tmp_path / "p", Options(release=Release(package_id="demo", hash=name)))
    assert verify(tmp_path / "p").files == 4
    unpack(tmp_path / "p", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(model)


@pytest.mark.parametrize("compact", [False, True])
def test_x_3_the_same_model_gives_the_same_bytes(model: Path, tmp_path: Path, compact: bool) -> None:
    save_model(tmp_path / "elsewhere" / "again", tensors())
    pack(model, tmp_path / "a", options(compact=compact))
    pack(tmp_path / "elsewhere" / "again", tmp_path / "b", options(compact=compact))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_r_8_2_1_1_a_package_has_three_folders(model: Path, tmp_path: Path) -> None:
    program = tmp_path / "program"
    (program / "Scripts").mkdir(parents=True)
    (program / "Scripts" / "inference.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    pack(model, tmp_path / "p", options(program=program))
    assert sorted(os.listdir(tmp_path / "p")) == ["Meta-info", "Model", "Program"]
    verify(tmp_path / "p")
    unpack(tmp_path / "p", tmp_path / "out")
    assert not (tmp_path / "ran").exists()  # R-8.2.3-1


def test_r_8_2_1_2_one_package_holds_several_models(model: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", tensors(1))
    pack({"one": model, "two": other}, tmp_path / "p", options())
    verify(tmp_path / "p")
    unpack(tmp_path / "p", tmp_path / "out", "two")
    assert contents(tmp_path / "out") == contents(other)
    with pytest.raises(FormatError, match="one, two; name one"):
        unpack(tmp_path / "p", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_r_8_3_2_3_one_tensor_is_read_and_verified_alone(model: Path, tmp_path: Path) -> None:
    pack(model, tmp_path / "p", options())
    with Package.open(tmp_path / "p") as package:
        weights = package.weights()
        for name, value in load_file(model / "model.safetensors").items():
            np.testing.assert_array_equal(weights.array(name), value)
    file = next((tmp_path / "p").rglob("*.ptm"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1  # in experts.w or after it
    file.write_bytes(data)
    with Package.open(tmp_path / "p") as package:
        found = [name for name in package.weights().entries if not _reads(package, name)]
        assert len(found) == 1


def _reads(package: Package, name: str) -> bool:
    try:
        package.weights().read(name)
    except IntegrityError:
        return False
    return True


def test_the_headers_of_a_large_file_are_checked_without_reading_it(tmp_path: Path) -> None:
    big = {"w": np.zeros((9, 1 << 21), np.float32), "v": np.ones(7, np.float32)}
    pack(save_model(tmp_path / "m", big), tmp_path / "p", options())
    file = next((tmp_path / "p").rglob("*.ptm"))
    assert file.stat().st_size > (1 << 20)
    for at in (3, 80):
        data = bytearray(file.read_bytes())
        data[at] ^= 1
        file.write_bytes(data)
        with pytest.raises(PackageError), Package.open(tmp_path / "p") as package:
            package.weights()
        data[at] ^= 1
        file.write_bytes(data)
    verify(tmp_path / "p")


def test_x_6_every_changed_byte_of_every_file_is_found(tmp_path: Path) -> None:
    small = {"a": np.arange(40, dtype=np.float32), "b": np.arange(3)}
    pack(save_model(tmp_path / "m", small), tmp_path / "p", options())
    tried = 0
    for file in sorted(path for path in (tmp_path / "p").rglob("*") if path.is_file()):
        good = file.read_bytes()
        if file.name == "manifest.json":
            continue  # found by the signature, see test_sign.py
        for at in range(0, len(good), 1 + len(good) // 150):
            file.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
            with pytest.raises(PackageError):
                verify(tmp_path / "p")
            tried += 1
        for wrong in (good[:-1], good + b"\0", b""):
            file.write_bytes(wrong)
            with pytest.raises(PackageError):
                verify(tmp_path / "p")
        file.write_bytes(good)
    assert tried > 300
    verify(tmp_path / "p")


def test_r_8_2_7_1_files_too_many_and_too_few_are_found(model: Path, tmp_path: Path) -> None:
    pack(model, tmp_path / "p", options())
    stray = tmp_path / "p" / "Program" / "run.sh"
    stray.write_text("echo")
    with pytest.raises(IntegrityError, match=r"run\.sh.*not listed"):
        verify(tmp_path / "p")
    stray.unlink()
    (tmp_path / "p" / "Meta-info" / "demo" / "technicalinfo.json").unlink()
    with pytest.raises(IntegrityError, match=r"technicalinfo\.json.*missing"):
        verify(tmp_path / "p")


@pytest.mark.parametrize("kind", ["file", "folder", "dangling"])
def test_r_8_2_1_3_links_are_refused(model: Path, tmp_path: Path, kind: str) -> None:
    pack(model, tmp_path / "p", options())
    inner = tmp_path / "p" / ("Meta-info/demo" if kind == "folder" else "Meta-info/demo/managementinfo.json")
    inner.rename(tmp_path / "moved")
    inner.symlink_to(tmp_path / "moved" if kind != "dangling" else tmp_path / "nowhere")
    with pytest.raises(UnsafePath, match="link"):
        verify(tmp_path / "p")
    with pytest.raises(UnsafePath), Package.open(tmp_path / "p") as package:
        package.content("Meta-info/demo/managementinfo.json")


def test_nothing_is_overwritten_and_nothing_half_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        pack(model, tmp_path / "p", options())
    pack(model, tmp_path / "q", options())
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        unpack(tmp_path / "q", tmp_path / "out")
    file = next((tmp_path / "q").rglob("*.ptm"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError):
        unpack(tmp_path / "q", tmp_path / "elsewhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "p", "q"]


def test_pickled_weights_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem")
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin.*--leave-out"):
        pack(model, tmp_path / "p", options())
    packed = pack(model, tmp_path / "p", options(leave_out=["*.bin"]))
    assert packed.left_out == ["pytorch_model.bin"]


def test_8_2_4_the_descriptions_say_what_is_known(model: Path, tmp_path: Path) -> None:
    pack(model, tmp_path / "p", options(info={"authors": ["A"], "model_version": "2.0.0"}))
    management = json.loads((tmp_path / "p/Meta-info/demo/managementinfo.json").read_bytes())
    assert (management["license"], management["authors"], management["model_version"]) == ("mit", ["A"], "2.0.0")
    technical = json.loads((tmp_path / "p/Meta-info/demo/technicalinfo.json").read_bytes())
    assert technical["PTM_info"]["architecture"] == "llama"
    assert technical["PTM_info"]["hidden_size"] == 50
    assert technical["files"] == [{"path": "Model/demo/model.ptm", "shard": 1}]


@pytest.mark.parametrize("wrong", [b"", b"\0" * 7, b"\xff" * 40, (10).to_bytes(8, "little") + b"{}"])
def test_a_broken_safetensors_file_is_named(tmp_path: Path, wrong: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(wrong)
    with pytest.raises(ConversionError, match=r"m\.safetensors"):
        pack(tmp_path / "m.safetensors", tmp_path / "p")
