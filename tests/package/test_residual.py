"""`package.residual`: an update leads to the target's very bytes, fits only its base, and costs only what changed
(8.2.6)."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from package.samples import Tensors, contents, save_model, tensors

from moestro.core.errors import BaseMismatch, ConfigError, FormatError, IntegrityError, LimitExceeded, PackageError
from moestro.package import residual
from moestro.package.api import (
    Keys,
    Options,
    Package,
    Release,
    Trust,
    apply,
    diff,
    load_receiving,
    load_recipient,
    new_key,
    pack,
    save_pair,
    sign_package,
    unpack,
    verify,
)

HALF = np.dtype(np.float16)
Change = Callable[[Tensors, np.random.Generator], None]


def packed(tmp_path: Path, name: str, weights: Tensors, text: str = "hello", sequence: int = 1) -> Path:
    save_model(tmp_path / f"{name}-model", weights, text)
    pack(tmp_path / f"{name}-model", tmp_path / name, Options(release=Release(package_id="demo", sequence=sequence)))
    return tmp_path / name


def moved_a_little(weights: Tensors, rng: np.random.Generator) -> None:
    weights["experts.w"] += rng.normal(0, 1e-5, weights["experts.w"].shape).astype(np.float32)
    weights["count"] += 1


def low_rank(weights: Tensors, rng: np.random.Generator) -> None:
    weights["experts.w"] += (rng.normal(0, 0.02, (3, 300, 4)) @ rng.normal(0, 0.02, (3, 4, 500))).astype(np.float32)


def few_rows(weights: Tensors, rng: np.random.Generator) -> None:
    weights["experts.w"][1, 17] = rng.normal(0, 1, 500)
    weights["embed"][3] = -weights["embed"][3]


def odd_numbers(weights: Tensors, rng: np.random.Generator) -> None:
    weights["experts.w"].reshape(-1)[:7] = [np.nan, -np.nan, np.inf, -np.inf, -0.0, 1e-45, 3e38]
    weights["scale"] = np.array(-0.0)
    weights["mask"] = ~weights["mask"]


def other_tensors(weights: Tensors, rng: np.random.Generator) -> None:
    weights["new"] = rng.normal(0, 1, (40, 40)).astype(np.float32)
    weights["embed"] = rng.normal(0, 1, (65, 50)).astype(np.float16)
    weights["renamed"] = weights.pop("count")
    del weights["mask"]


def everything(weights: Tensors, rng: np.random.Generator) -> None:
    for name, value in tensors(5).items():
        weights[name] = value


@pytest.mark.parametrize("change", [moved_a_little, low_rank, few_rows, odd_numbers, other_tensors, everything])
def test_r_8_2_6_2_an_update_leads_to_the_target_bit_for_bit(tmp_path: Path, change: Change) -> None:
    weights = tensors()
    base = packed(tmp_path, "a", weights)
    change(weights, np.random.default_rng(1))
    target = packed(tmp_path, "b", weights, text="new words", sequence=2)
    report = diff([base], target, tmp_path / "u")
    assert verify(tmp_path / "u").unread == ["demo: an update, no base given"]
    assert verify(tmp_path / "u", base=[base]).unread == []
    apply([base], tmp_path / "u", tmp_path / "b2")
    assert contents(tmp_path / "b2") == contents(target)
    unpack(tmp_path / "u", tmp_path / "out", base=[base])
    assert contents(tmp_path / "out") == contents(tmp_path / "b-model")
    if change is not everything:
        assert report.update_bytes < 0.9 * report.full_bytes


def test_an_update_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    weights = tensors()
    base = packed(tmp_path, "a", weights)
    low_rank(weights, np.random.default_rng(1))
    target = packed(tmp_path, "b", weights)
    for name in "uv":
        diff([base], target, tmp_path / name)
    assert contents(tmp_path / "u") == contents(tmp_path / "v")


def test_a_merged_low_rank_update_is_found_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    old = rng.normal(0, 0.02, (2, 256, 384)).astype(HALF)
    change = rng.normal(0, 0.03, (2, 256, 4)) @ rng.normal(0, 0.03, (2, 4, 384))
    base = packed(tmp_path, "a", {"w": old})
    target = packed(tmp_path, "b", {"w": (old.astype(np.float32) + change).astype(HALF)})
    report = diff([base], target, tmp_path / "u")
    assert report.tensors == {"lowrank": 1}
    assert report.stored["lowrank"] < 0.12 * old.nbytes
    apply([base], tmp_path / "u", tmp_path / "b2")
    assert contents(tmp_path / "b2") == contents(target)


def test_experts_that_did_not_change_cost_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stack = rng.normal(0, 0.02, (64, 512, 512)).astype(HALF)
    alone = {f"expert.{i}": rng.normal(0, 0.02, (64, 64)).astype(HALF) for i in range(8)}
    base = packed(tmp_path, "a", {"stack": stack} | alone)
    stack = stack.copy()
    stack[5] = rng.normal(0, 0.02, (512, 512)).astype(HALF)
    alone["expert.3"] = rng.normal(0, 0.02, (64, 64)).astype(HALF)
    target = packed(tmp_path, "b", {"stack": stack} | alone)
    report = diff([base], target, tmp_path / "u")
    assert report.tensors["unchanged"] == 7
    changed_bytes = stack[5].nbytes + alone["expert.3"].nbytes
    assert report.stored.total() < changed_bytes + 8 * 64 + 8 * 64
    apply([base], tmp_path / "u", tmp_path / "b2")
    assert contents(tmp_path / "b2") == contents(target)


def test_r_8_2_6_4_any_other_base_is_refused(tmp_path: Path) -> None:
    weights = tensors()
    base = packed(tmp_path, "a", weights)
    other = packed(tmp_path, "o", tensors(9))
    moved_a_little(weights, np.random.default_rng(0))
    target = packed(tmp_path, "b", weights)
    diff([base], target, tmp_path / "u")
    for wrong in (other, target):
        before = contents(wrong)
        with pytest.raises(BaseMismatch, match="take the full package"):
            apply([wrong], tmp_path / "u", tmp_path / "x")
        assert contents(wrong) == before
    assert not (tmp_path / "x").exists()
    with pytest.raises(BaseMismatch, match="--base"), Package.open(tmp_path / "u") as package:
        package.weights()
    with pytest.raises(FormatError, match="no update"):
        apply([base], target, tmp_path / "x")


def test_r_8_2_6_5_updates_follow_one_another(tmp_path: Path) -> None:
    weights, rng = tensors(), np.random.default_rng(0)
    stack = [packed(tmp_path, "v0", weights)]
    for number in (1, 2, 3):
        moved_a_little(weights, rng)
        target = packed(tmp_path, f"v{number}", weights, sequence=number + 1)
        report = diff(stack, target, tmp_path / f"u{number}")
        assert report.chain == number
        stack.append(tmp_path / f"u{number}")
    verify(stack[-1], base=stack[:-1])
    apply(stack[:-1], stack[-1], tmp_path / "end")
    assert contents(tmp_path / "end") == contents(tmp_path / "v3")
    with pytest.raises(BaseMismatch):
        apply([stack[0], stack[2]], stack[3], tmp_path / "x")


def test_r_8_2_6_5_a_chain_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual, "MAX_CHAIN", 1)
    weights, rng = tensors(), np.random.default_rng(0)
    base = packed(tmp_path, "v0", weights)
    moved_a_little(weights, rng)
    diff([base], packed(tmp_path, "v1", weights), tmp_path / "u1")
    moved_a_little(weights, rng)
    with pytest.raises(LimitExceeded, match="ship it whole"):
        diff([base, tmp_path / "u1"], packed(tmp_path, "v2", weights), tmp_path / "u2")


def test_the_targets_signature_holds_for_what_an_update_makes(tmp_path: Path) -> None:
    public = save_pair(new_key("ed25519"), tmp_path / "key")
    weights = tensors()
    base = packed(tmp_path, "a", weights)
    moved_a_little(weights, np.random.default_rng(0))
    target = packed(tmp_path, "b", weights)
    sign_package(target, tmp_path / "key")
    diff([base], target, tmp_path / "u")
    sign_package(tmp_path / "u", tmp_path / "key")
    apply([base], tmp_path / "u", tmp_path / "b2", trust=Trust.load([public]))
    assert contents(tmp_path / "b2") == contents(target)
    assert verify(tmp_path / "b2", Trust.load([public])).signed_by


def test_an_encrypted_update_of_an_encrypted_base(tmp_path: Path) -> None:
    to = [load_recipient(save_pair(new_key("x25519"), tmp_path / "key"))]
    keys = Keys([load_receiving(tmp_path / "key")])
    weights = tensors()
    save_model(tmp_path / "m", weights)
    pack(tmp_path / "m", tmp_path / "a", Options(release=Release(package_id="demo"), to=to))
    moved_a_little(weights, np.random.default_rng(0))
    target = packed(tmp_path, "b", weights)
    diff([tmp_path / "a"], target, tmp_path / "u", to=to, keys=keys)
    with pytest.raises(FormatError, match="encrypted"):
        apply([tmp_path / "a"], tmp_path / "u", tmp_path / "x")
    apply([tmp_path / "a"], tmp_path / "u", tmp_path / "b2", keys=keys)
    assert contents(tmp_path / "b2") == contents(target)


@pytest.mark.parametrize("bits", [1.0, 1.6, 2.7])
def test_r_8_2_6_3_a_quantised_update_keeps_to_its_rate_and_states_its_loss(tmp_path: Path, bits: float) -> None:
    rng = np.random.default_rng(0)
    old = {f"w{i}": rng.normal(0, 0.02, (300, 400)).astype(HALF) for i in range(3)} | {"n": np.arange(9)}
    change = {name: rng.normal(0, 5e-4, value.shape) for name, value in old.items() if name != "n"}
    new = {name: (old[name].astype(np.float32) + change[name]).astype(HALF) for name in change} | {
        "n": np.arange(9) + 1
    }
    base, target = packed(tmp_path, "a", old), packed(tmp_path, "b", new)
    report = diff([base], target, tmp_path / "u", bits=bits)
    rate = 8 * report.stored["qres"] / 360_000
    assert rate == pytest.approx(bits, rel=0.12)
    assert any("too small for 1.07 bits" in line for line in report.lines()) == (bits == 1)
    assert bits == 1 or report.bits_a_weight <= bits
    # within 0.4 bits of the rate-distortion bound 2^(-2 bits) of a Gaussian source
    assert 2 ** (-2 * rate) < report.loss.relative < 2 ** (-2 * (rate - 0.4))
    with Package.open(base) as below, Package.open(tmp_path / "u", base=below) as package:
        out = {name: package.weights().array(name) for name in change}
        np.testing.assert_array_equal(package.weights().array("n"), new["n"])
    energy = sum(float(np.sum((new[n].astype(np.float64) - old[n].astype(np.float64)) ** 2)) for n in change)
    error = sum(float(np.sum((new[n].astype(np.float64) - out[n].astype(np.float64)) ** 2)) for n in change)
    assert error / energy == pytest.approx(report.loss.relative, abs=0.02)  # rounding comes on top


def test_the_matrix_that_changed_least_is_left_so_that_signs_fit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    old = {f"w{i:02}": rng.normal(0, 0.02, (250, 250)).astype(HALF) for i in range(12)}
    new = {n: (w + rng.normal(0, 5e-5 if n == "w05" else 1e-3, w.shape)).astype(HALF) for n, w in old.items()}
    base, target = packed(tmp_path, "a", old), packed(tmp_path, "b", new)
    report = diff([base], target, tmp_path / "u", bits=1.0)
    assert report.tensors == {"qres": 11, "left as it was": 1}
    assert report.update_bytes <= 0.067 * 2 * 750_000
    with Package.open(base) as below, Package.open(tmp_path / "u", base=below) as package:
        np.testing.assert_array_equal(package.weights().array("w05"), old["w05"])
        assert package.manifest.models[0].update
        assert package.manifest.models[0].update.mode == "qres"


def test_x_4_another_process_without_compiled_loops_gets_the_same_model(tmp_path: Path) -> None:
    weights = tensors()
    base = packed(tmp_path, "a", weights)
    moved_a_little(weights, np.random.default_rng(0))
    target = packed(tmp_path, "b", weights)
    diff([base], target, tmp_path / "u", bits=2.0)
    apply([base], tmp_path / "u", tmp_path / "here")
    code = (
        "import sys; from pathlib import Path; from moestro.package.api import apply;"
        "a, u, o = map(Path, sys.argv[1:]); apply([a], u, o)"
    )
    subprocess.run(
        [sys.executable, "-c", code, base, tmp_path / "u", tmp_path / "there"],
        check=True,
        env={"MOESTRO_CPU_KERNELS": "off", "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"},
    )
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


def test_numbers_that_are_not_finite_are_never_quantised(tmp_path: Path) -> None:
    weights = tensors()
    base = packed(tmp_path, "a", weights)
    odd_numbers(weights, np.random.default_rng(0))
    target = packed(tmp_path, "b", weights)
    report = diff([base], target, tmp_path / "u", bits=1.0)
    assert "qres" not in report.tensors
    apply([base], tmp_path / "u", tmp_path / "b2")
    assert contents(tmp_path / "b2") == contents(target)


@pytest.mark.parametrize("bits", [0.0, -1.0, 1.2, 9.0, float("nan")])
def test_rates_outside_the_bounds_are_refused(tmp_path: Path, bits: float) -> None:
    base = packed(tmp_path, "a", tensors())
    target = packed(tmp_path, "b", tensors(1))
    with pytest.raises(ConfigError, match=r"1\.5\.\.7"):
        diff([base], target, tmp_path / "u", bits=bits)


def test_models_that_share_nothing_are_not_diffed(tmp_path: Path) -> None:
    base = packed(tmp_path, "a", tensors())
    save_model(tmp_path / "m", tensors(1))
    pack({"x": tmp_path / "m", "y": tmp_path / "m"}, tmp_path / "b", Options(release=Release(package_id="q")))
    with pytest.raises(FormatError, match="share no model"):
        diff([base], tmp_path / "b", tmp_path / "u")


def test_every_changed_byte_of_an_update_is_found(tmp_path: Path) -> None:
    weights = tensors()
    base = packed(tmp_path, "a", weights)
    moved_a_little(weights, np.random.default_rng(0))
    diff([base], packed(tmp_path, "b", weights), tmp_path / "u")
    file = next((tmp_path / "u").rglob("*.ptm"))
    good = file.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(good), 40):
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(PackageError):
            apply([base], tmp_path / "u", tmp_path / "x")
        assert not (tmp_path / "x").exists()
    file.write_bytes(good)
    damaged = next((base).rglob("*.ptm"))  # a base that rotted keeps its recorded identity, and is found out
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(IntegrityError):
        apply([base], tmp_path / "u", tmp_path / "x")
