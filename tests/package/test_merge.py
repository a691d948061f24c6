"""`package.merge`: several updates of one base become their weighted mean, or nothing at all (R-8.2.6-7)."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from package.samples import Tensors, contents, save_model, tensors

from moestro.core.errors import (
    BaseMismatch,
    ConfigError,
    ConversionError,
    FormatError,
    IntegrityError,
    PackageError,
    SignatureError,
)
from moestro.package import writer
from moestro.package.api import (
    Keys,
    Manifest,
    Options,
    Package,
    Release,
    Trust,
    diff,
    load_receiving,
    load_recipient,
    merge,
    new_key,
    pack,
    save_pair,
    sign_package,
    unpack,
    verify,
)
from moestro.package.merge import Mixture
from moestro.package.spans import pieces

OPTIONS = Options(release=Release(package_id="mean", sequence=7))


def packed(tmp_path: Path, name: str, weights: Tensors, text: str = "hello") -> Path:
    save_model(tmp_path / f"{name}-model", weights, text)
    pack(tmp_path / f"{name}-model", tmp_path / name, Options(release=Release(package_id="demo")))
    return tmp_path / name


def updated(tmp_path: Path, base: Path, name: str, weights: Tensors, bits: float | None = None) -> Path:
    """An update that leads from the base to these weights."""
    diff([base], packed(tmp_path, name, weights, text="other words"), tmp_path / f"{name}-update", bits=bits)
    return tmp_path / f"{name}-update"


def moved(seed: int) -> Tensors:
    """Weights near those of the base; `count`, `mask`, `empty` are the base's."""
    weights, rng = tensors(), np.random.default_rng(seed)
    for name in ("experts.w", "embed", "scale"):
        weights[name] = np.asarray(weights[name] + rng.normal(0, 0.01, weights[name].shape), weights[name].dtype)
    return weights


def arrays(folder: Path) -> Tensors:
    with Package.open(folder) as package:
        weights = package.weights()
        return {name: weights.array(name).copy() for name in weights.entries}


def same(left: Tensors, right: Tensors) -> bool:
    return {name: value.tobytes() for name, value in left.items()} == {n: v.tobytes() for n, v in right.items()}


def mean(old: np.ndarray, new: list[np.ndarray], shares: list[float]) -> np.ndarray:
    """NumPy's own."""
    wide = np.float64 if old.dtype == np.float64 else np.float32
    a = old.astype(wide)
    return (a + sum(wide(w) * (b.astype(wide) - a) for w, b in zip(shares, new, strict=True))).astype(old.dtype)


def test_r_8_2_6_7_one_update_of_weight_1_gives_the_targets_weights_bit_for_bit(tmp_path: Path) -> None:
    base, goal = packed(tmp_path, "a", tensors()), moved(1)
    goal["experts.w"].reshape(-1)[:6] = [np.nan, -np.nan, np.inf, -np.inf, -0.0, 1e-45]
    goal["count"] = goal["count"] + 1
    update, other = updated(tmp_path, base, "b", goal), updated(tmp_path, base, "c", moved(2))
    before = contents(base), contents(update)
    for name, updates, shares in (("x", [update], None), ("y", [update, other], [1.0, 0.0])):
        manifest = merge([base], updates, tmp_path / name, OPTIONS, weights=shares)
        assert same(arrays(tmp_path / name), goal)
        assert (
            manifest.models[0].weights_root
            == Manifest.parse((tmp_path / "b" / "Meta-info" / "manifest.json").read_bytes()).models[0].weights_root
        )
    assert (contents(base), contents(update)) == before
    assert (manifest.package_id, manifest.sequence, manifest.models[0].update) == ("mean", 7, None)
    assert verify(tmp_path / "x").unread == []
    unpack(tmp_path / "x", tmp_path / "out")
    files = contents(tmp_path / "out")
    assert files.pop("model.safetensors") == (tmp_path / "b-model" / "model.safetensors").read_bytes()
    assert files.items() <= contents(tmp_path / "a-model").items()


@pytest.mark.parametrize("shares", [None, [0.5, 0.5], [1.75, -0.75]])
@pytest.mark.parametrize("block", [writer.BATCH_BYTES, 1 << 20])
def test_r_8_2_6_7_two_updates_give_what_numpy_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: list[float] | None, block: int
) -> None:
    monkeypatch.setattr(writer, "BATCH_BYTES", block)
    old, goals = tensors(), [moved(1), moved(2)]
    for goal in goals:
        goal["embed"][3] = old["embed"][3]
    base = packed(tmp_path, "a", old)
    updates = [updated(tmp_path, base, name, goal) for name, goal in zip("bc", goals, strict=True)]
    for name, compact in (("x", False), ("y", True)):
        options = replace(OPTIONS, compact=compact, shard_bytes=1 << 20)
        merge([base], updates, tmp_path / name, options, weights=shares)
        found = arrays(tmp_path / name)
        for tensor, value in old.items():
            new = [goal[tensor] for goal in goals]
            wanted = mean(value, new, shares or [0.5, 0.5]) if value.dtype.kind == "f" else value
            wanted = np.where(new[0] == new[1], new[0], wanted)
            assert found[tensor].tobytes() == wanted.tobytes(), tensor
        assert found["embed"][3].tobytes() == old["embed"][3].tobytes()
        verify(tmp_path / name)


def test_r_8_2_6_7_elements_that_all_agree_on_keep_their_bits(tmp_path: Path) -> None:
    odd = [np.inf, -np.inf, -0.0, 3e38]
    old = {"w": np.array([*odd, 1.0, 1.0, 3e38], np.float32), "mask": np.full(3, -np.inf, np.float16)}
    new = [{"w": np.array([*odd, x, y, 3.1e38], np.float32), "mask": old["mask"]} for x, y in ((2, 5), (4, np.nan))]
    base = packed(tmp_path, "a", old)
    updates = [updated(tmp_path, base, name, goal) for name, goal in zip("bc", new, strict=True)]
    merge([base], updates, tmp_path / "x", OPTIONS)
    wanted = np.array([*odd, 3.0, np.nan, 3.1e38], np.float32)
    assert same(arrays(tmp_path / "x"), {"w": wanted, "mask": old["mask"]})


def test_r_8_2_6_7_bfloat16_is_rounded_to_nearest_even(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def narrow(values: np.ndarray) -> np.ndarray:
        """float32 of which only what bfloat16 holds is left, to nearest even."""
        bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        low = bits & 0xFFFF
        up = (low > 0x8000) | ((low == 0x8000) & ((bits >> 16) % 2 == 1))
        return (((bits >> 16) + up) << 16).astype(np.uint32).view(np.float32)

    def half(name: str, values: np.ndarray) -> Path:
        data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        header = json.dumps({"w": {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [0, len(data)]}})
        (tmp_path / f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
        pack(tmp_path / f"{name}.safetensors", tmp_path / name, Options(release=Release(package_id="demo")))
        return tmp_path / name

    a, b, c = (narrow(rng.normal(0, 1, (70, 90))) for _ in range(3))
    base = half("a", a)
    for name, values in (("b", b), ("c", c)):
        diff([base], half(name, values), tmp_path / f"u{name}")
    merge([base], [tmp_path / "ub", tmp_path / "uc"], tmp_path / "x", OPTIONS, weights=[0.25, 0.75])
    wanted = narrow(mean(a, [b, c], [0.25, 0.75]))
    assert (arrays(tmp_path / "x")["w"] == wanted.view(np.uint32) >> 16).all()


def test_r_8_2_6_7_quantised_updates_and_updates_of_updates_are_merged(tmp_path: Path) -> None:
    base = packed(tmp_path, "a", tensors())
    first = updated(tmp_path, base, "b", moved(1))
    ends = []
    for name, seed in (("c", 2), ("d", 3)):
        diff([base, first], packed(tmp_path, name, moved(seed)), tmp_path / f"u{name}", bits=4.0)
        with (
            Package.open(base) as a,
            Package.open(first, base=a) as b,
            Package.open(tmp_path / f"u{name}", base=b) as u,
        ):
            ends.append(u.weights().array("experts.w").copy())
    merge([base, first], [tmp_path / "uc", tmp_path / "ud"], tmp_path / "x", OPTIONS)
    wanted = mean(moved(1)["experts.w"], ends, [0.5, 0.5])
    found = arrays(tmp_path / "x")["experts.w"]
    assert (found[ends[0] != ends[1]] == wanted[ends[0] != ends[1]]).all()
    with pytest.raises(BaseMismatch):
        merge([base], [tmp_path / "uc"], tmp_path / "y", OPTIONS)


def test_r_8_2_6_7_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    base, other = packed(tmp_path, "a", tensors()), packed(tmp_path, "o", tensors(9))
    good = updated(tmp_path, base, "b", moved(1))
    foreign = updated(tmp_path, other, "c", moved(2))
    changed = {name: moved(3) for name in ("shape", "type", "more", "less", "count")}
    changed["shape"]["embed"] = changed["shape"]["embed"][:-1].copy()
    changed["type"]["embed"] = changed["type"]["embed"].astype(np.float32)
    changed["more"]["new"] = np.ones(3, np.float32)
    del changed["less"]["mask"]
    changed["count"]["count"] = changed["count"]["count"] + 1
    odd = {name: updated(tmp_path, base, name, weights) for name, weights in changed.items()}
    there = set(tmp_path.iterdir())
    with pytest.raises(BaseMismatch, match="base here"):
        merge([base], [good, foreign], tmp_path / "x", OPTIONS)
    with pytest.raises(FormatError, match="no update"):
        merge([base], [good, tmp_path / "b"], tmp_path / "x", OPTIONS)
    for name, words in (
        ("shape", "keep types and shapes"),
        ("type", "keep types and shapes"),
        ("more", "adds tensor 'new'"),
        ("less", "removes tensor 'mask'"),
        ("count", "int64 and cannot be averaged"),
    ):
        with pytest.raises(ConversionError, match=words):
            merge([base], [good, odd[name]], tmp_path / "x", OPTIONS)
    assert set(tmp_path.iterdir()) == there
    with pytest.raises(ConfigError, match="leave_out"):
        merge([base], [good], tmp_path / "x", replace(OPTIONS, leave_out=["README.md"]))
    with pytest.raises(ConfigError, match="exists already"):
        merge([base], [good], other, OPTIONS)


@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.6], [np.nan, 1.0], [np.inf, -np.inf], [0.5, 0.4999], []])
def test_r_8_2_6_7_bad_weights_are_refused(tmp_path: Path, shares: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"weights are .* sum 1 within 1e-06: divide them"):
        merge([tmp_path / "a"], [tmp_path / "u"] * 2, tmp_path / "x", OPTIONS, weights=shares)
    with pytest.raises(ConfigError, match="at least 1"):
        merge([tmp_path / "a"], [], tmp_path / "x", OPTIONS)


def test_r_8_2_6_7_damage_found_while_mixing_leaves_nothing(tmp_path: Path) -> None:
    """The data of a large file is read only when it is mixed."""
    old = {"w": np.random.default_rng(0).normal(0, 1, (1024, 1024)).astype(np.float32), "v": np.ones(4, np.float32)}
    base = packed(tmp_path, "a", old)
    update = updated(tmp_path, base, "b", old | {"v": np.zeros(4, np.float32)})
    file = base / "Model" / "demo" / "model.ptm"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    there = set(tmp_path.iterdir())
    with pytest.raises(IntegrityError):
        merge([base], [update], tmp_path / "x", OPTIONS)
    assert set(tmp_path.iterdir()) == there


def test_r_8_2_6_7_encrypted_and_signed_updates_are_merged_for_their_readers(tmp_path: Path) -> None:
    reader, ours = save_pair(new_key("x25519"), tmp_path / "reader"), save_pair(new_key("ed25519"), tmp_path / "ours")
    to, keys, trust = [load_recipient(reader)], Keys([load_receiving(tmp_path / "reader")]), Trust.load([ours])
    base = packed(tmp_path, "a", tensors())
    updates = []
    for name, seed in (("b", 1), ("c", 2)):
        updates.append(tmp_path / f"u{name}")
        diff([base], packed(tmp_path, name, moved(seed)), updates[-1], to=to)
    sign_package(updates[0], tmp_path / "ours")
    with pytest.raises(SignatureError):
        merge([base], updates, tmp_path / "x", OPTIONS, trust=trust, keys=keys)
    sign_package(updates[1], tmp_path / "ours")
    with pytest.raises(PackageError, match="encrypted"):
        merge([base], updates, tmp_path / "x", OPTIONS, trust=trust)
    options = replace(OPTIONS, to=to, info={"model_version": "2.0.0"})
    merge([base], updates, tmp_path / "x", options, trust=trust, keys=keys)
    with Package.open(tmp_path / "x", keys=keys) as package:
        wanted = mean(tensors()["embed"], [moved(1)["embed"], moved(2)["embed"]], [0.5, 0.5])
        close = package.weights().array("embed")
        assert package.is_encrypted()
        assert np.abs(close.astype(np.float32) - wanted).max() < 1e-3
        assert json.loads(package.content("Meta-info/demo/managementinfo.json"))["model_version"] == "2.0.0"


def test_any_bytes_of_a_mixture_can_be_read(tmp_path: Path) -> None:
    base = packed(tmp_path, "a", tensors())
    update, other = updated(tmp_path, base, "b", moved(1)), updated(tmp_path, base, "c", moved(2))
    with Package.open(base) as a, Package.open(update, base=a) as b, Package.open(other, base=a) as c:
        mixture = Mixture("embed", [(b.weights(), 0.5), (c.weights(), 0.5)], a.weights())
        whole = bytes(mixture.read(0, mixture.length))
        assert b"".join(bytes(piece) for piece in pieces(mixture, 7)) == whole
        assert bytes(mixture.read(5, 4)) == whole[5:9]
