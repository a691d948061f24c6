"""`package.resume`: an apply that was killed goes on where it was, and ends in the same bytes whatever it finds there
(8.2.6)."""

import fcntl
import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict

import numpy as np
import pytest
from package.samples import Tensors, contents, save_model

from moestro.core.errors import ConfigError, IntegrityError
from moestro.package import resume, sink
from moestro.package.api import (
    Keys,
    Options,
    Release,
    apply,
    decrypt,
    diff,
    load_receiving,
    load_recipient,
    new_key,
    pack,
    save_pair,
    verify,
)
from moestro.package.dtypes import DATA_TYPES
from moestro.package.encrypt import Recipient, Sealer
from moestro.package.layout import MODEL_HEADER
from moestro.package.limits import MAX_DESCRIPTOR_BYTES
from moestro.package.reader import ModelFile
from moestro.package.resume import Former, Leftover, folder_resumed
from moestro.package.spans import Bytes
from moestro.package.writer import ModelSource, TensorSource, write_model_file

COUNT = 7
TENSOR_BYTES = 1 << 20
ALL_BYTES = COUNT * TENSOR_BYTES
LEFT = 5
"""Tensors that are whole in `leftover`."""


def weights(seed: int) -> Tensors:
    """Tensors of one chunk each; the first is the same for every seed."""
    rng = np.random.default_rng(0)
    found = {f"w{i}": rng.normal(0, 0.02, TENSOR_BYTES // 4).astype(np.float32) for i in range(COUNT)}
    for name in list(found)[1:]:
        found[name] += np.random.default_rng(seed).normal(0, 1e-5, TENSOR_BYTES // 4).astype(np.float32)
    return found


def packed(folder: Path, seed: int) -> Path:
    save_model(folder.with_name(folder.name + "-model"), weights(seed))
    pack(folder.with_name(folder.name + "-model"), folder, Options(release=Release(package_id="demo")))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base `a`, targets `b` and `c`, updates `u` and `v` to them."""
    root = tmp_path_factory.mktemp("packages")
    for seed, name in enumerate("abc"):
        packed(root / name, seed)
    diff([root / "a"], root / "b", root / "u")
    diff([root / "a"], root / "c", root / "v")
    return root


@pytest.fixture(autouse=True)
def small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk goes to the file at once."""
    monkeypatch.setattr(sink, "STAGED_BYTES", 0)


def in_a_child(work: Callable[[], object]) -> int:
    """Its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(7)
    return os.waitpid(child, 0)[1]


class Sealed(TypedDict, total=False):
    """How a result is encrypted."""

    to: Sequence[Recipient]
    keys: Keys


def killed(made: Path, update: str, out: Path, at_bytes: int, sealed: Sealed | None = None) -> None:
    """An apply that SIGKILL ends when so many bytes are to be decoded."""
    done = 0

    def kill(count: int) -> None:
        nonlocal done
        done += count
        if done >= at_bytes:
            os.kill(os.getpid(), signal.SIGKILL)

    status = in_a_child(lambda: apply([made / "a"], made / update, out, progress=kill, **(sealed or {})))
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not out.exists()


def decoded_bytes(made: Path, update: str, out: Path, sealed: Sealed | None = None) -> int:
    """Of an apply that ends well."""
    counts: list[int] = []
    apply([made / "a"], made / update, out, progress=counts.append, **(sealed or {}))
    assert not list(out.parent.glob("*.partial"))
    return sum(counts)


@pytest.mark.parametrize("finished", [0, 1, 3])
def test_r_8_2_6_6_a_restart_goes_on_at_the_first_tensor_that_is_not_there(
    made: Path, tmp_path: Path, finished: int
) -> None:
    killed(made, "u", tmp_path / "out", (finished + 2) * TENSOR_BYTES)  # of the last one, a part was on its way
    assert decoded_bytes(made, "u", tmp_path / "out") == ALL_BYTES - finished * TENSOR_BYTES
    assert contents(tmp_path / "out") == contents(made / "b")


def test_r_8_2_6_6_killed_again_and_again_it_ends(made: Path, tmp_path: Path) -> None:
    for _ in range(LEFT):
        killed(made, "u", tmp_path / "out", 3 * TENSOR_BYTES)  # one more tensor each time
    assert decoded_bytes(made, "u", tmp_path / "out") == ALL_BYTES - LEFT * TENSOR_BYTES
    assert contents(tmp_path / "out") == contents(made / "b")


def leftover(made: Path, out: Path) -> Path:
    """The model file that a kill at the last tensor left."""
    killed(made, "u", out, COUNT * TENSOR_BYTES)
    return next(out.with_name(out.name + ".partial").glob("Model/demo/*"))


@pytest.mark.parametrize("flipped", [0, 1, 2])
def test_r_8_2_6_6_damage_is_done_again_from_there(made: Path, tmp_path: Path, flipped: int) -> None:
    file = leftover(made, tmp_path / "out")
    data = bytearray(file.read_bytes())
    data[data.index(weights(1)[f"w{flipped}"].tobytes()) + 1000] ^= 1
    file.write_bytes(data)
    assert decoded_bytes(made, "u", tmp_path / "out") == ALL_BYTES - flipped * TENSOR_BYTES
    assert contents(tmp_path / "out") == contents(made / "b")


def test_r_8_2_6_6_what_lies_between_and_around_tensors_is_written_anew(made: Path, tmp_path: Path) -> None:
    file = leftover(made, tmp_path / "out")
    data = bytearray(file.read_bytes())
    before = data.index(weights(1)["w0"].tobytes())
    data[:before] = b"x" * before
    file.write_bytes(data + b"x" * 3 * TENSOR_BYTES)
    (file.parent / "strange").write_text("x")
    (file.parents[2] / "Program").joinpath("strange").symlink_to(tmp_path)
    assert decoded_bytes(made, "u", tmp_path / "out") == ALL_BYTES - LEFT * TENSOR_BYTES
    assert contents(tmp_path / "out") == contents(made / "b")
    verify(tmp_path / "out")


def test_r_8_2_6_6_the_leftover_of_another_update_ends_in_no_byte_of_it(made: Path, tmp_path: Path) -> None:
    leftover(made, tmp_path / "out")
    assert decoded_bytes(made, "v", tmp_path / "out") == ALL_BYTES - TENSOR_BYTES  # w0 is the same in both
    assert contents(tmp_path / "out") == contents(made / "c")


def test_a_link_in_place_of_the_leftover_is_not_followed(made: Path, tmp_path: Path) -> None:
    file = leftover(made, tmp_path / "out")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    assert decoded_bytes(made, "u", tmp_path / "out") == ALL_BYTES
    assert (tmp_path / "elsewhere").read_bytes() == before
    assert contents(tmp_path / "out") == contents(made / "b")


def test_the_leftover_of_another_user_is_not_gone_on_with(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftover(made, tmp_path / "out")
    held = os.open(tmp_path / "out.partial", os.O_RDONLY)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert decoded_bytes(made, "u", tmp_path / "out") == ALL_BYTES
    assert contents(tmp_path / "out") == contents(made / "b")
    assert not os.path.samestat(os.fstat(held), (tmp_path / "out").stat())
    os.close(held)


@pytest.mark.skipif(os.getuid() != 0, reason="gives a file away")
def test_a_file_of_another_user_in_a_leftover_is_not_kept(made: Path, tmp_path: Path) -> None:
    file = leftover(made, tmp_path / "out")
    os.chown(file, 12345, -1)
    assert decoded_bytes(made, "u", tmp_path / "out") == ALL_BYTES
    assert contents(tmp_path / "out") == contents(made / "b")


IN_REACH = 2
"""Of the tensors that are whole in a leftover, those that do not lie near the head, which is sealed last of all."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private key, and beside it the public one."""
    path = tmp_path_factory.mktemp("keys") / "edge"
    save_pair(new_key("x25519"), path)
    return path


def for_the(pair: Path) -> Sealed:
    """What apply needs to encrypt for the owner of a pair and to read it again."""
    return {"to": [load_recipient(pair.with_suffix(".pub"))], "keys": Keys([load_receiving(pair)])}


def model_files(folder: Path) -> list[bytes]:
    """Largest first."""
    return sorted((path.read_bytes() for path in folder.glob("Model/demo/*")), key=len, reverse=True)


def check_result(made: Path, pair: Path, out: Path, target: str) -> None:
    verify(out, keys=Keys([load_receiving(pair)]))
    decrypt(out, out.with_name("clear"), Keys([load_receiving(pair)]))
    assert (
        contents(out.with_name("clear"))["Meta-info/manifest.json"]
        == contents(made / target)["Meta-info/manifest.json"]
    )


def test_r_8_2_6_6_an_encrypted_result_is_gone_on_with_under_another_key(
    made: Path, tmp_path: Path, pair: Path
) -> None:
    sealed = for_the(pair)
    killed(made, "u", tmp_path / "out", COUNT * TENSOR_BYTES, sealed)
    (left,) = model_files(tmp_path / "out.partial")
    assert decoded_bytes(made, "u", tmp_path / "out", sealed) == ALL_BYTES - IN_REACH * TENSOR_BYTES
    check_result(made, pair, tmp_path / "out", "b")
    (file,) = model_files(tmp_path / "out")
    assert not {block for block in blocks(left) if any(block)} & set(blocks(file))  # no chunk under the old key


def blocks(data: bytes) -> list[bytes]:
    return [data[at : at + 64] for at in range(4096, len(data), 64)]


def test_r_8_2_6_6_killed_again_and_again_an_encrypted_result_loses_nothing(
    made: Path, tmp_path: Path, pair: Path
) -> None:
    sealed = for_the(pair)
    killed(made, "u", tmp_path / "out", COUNT * TENSOR_BYTES, sealed)
    for at_bytes in (1, 2 * TENSOR_BYTES):
        killed(made, "u", tmp_path / "out", at_bytes, sealed)
    assert decoded_bytes(made, "u", tmp_path / "out", sealed) == ALL_BYTES - IN_REACH * TENSOR_BYTES
    check_result(made, pair, tmp_path / "out", "b")


def test_an_encrypted_result_for_somebody_else_begins_anew(made: Path, tmp_path: Path, pair: Path) -> None:
    killed(made, "u", tmp_path / "out", COUNT * TENSOR_BYTES, for_the(pair))
    counts: list[int] = []

    def look(count: int) -> None:
        counts.append(count)
        assert not list(tmp_path.rglob("*.former"))

    apply([made / "a"], made / "u", tmp_path / "out", to=for_the(pair)["to"], progress=look)
    assert sum(counts) == ALL_BYTES
    check_result(made, pair, tmp_path / "out", "b")


@pytest.mark.parametrize("first", ["clear", "sealed"])
def test_what_was_in_clear_is_not_kept_for_an_encrypted_result_nor_the_other_way(
    made: Path, tmp_path: Path, pair: Path, first: str
) -> None:
    ways: list[Sealed] = [{}, for_the(pair)]
    before, after = ways if first == "clear" else reversed(ways)
    killed(made, "u", tmp_path / "out", COUNT * TENSOR_BYTES, before)
    assert decoded_bytes(made, "u", tmp_path / "out", after) == ALL_BYTES


def test_r_8_2_6_6_the_encrypted_leftover_of_another_update_ends_in_no_byte_of_it(
    made: Path, tmp_path: Path, pair: Path
) -> None:
    killed(made, "u", tmp_path / "out", COUNT * TENSOR_BYTES, for_the(pair))
    assert decoded_bytes(made, "v", tmp_path / "out", for_the(pair)) == ALL_BYTES
    check_result(made, pair, tmp_path / "out", "c")


def test_the_encrypted_leftover_of_a_shorter_model_is_no_obstacle(tmp_path: Path, pair: Path) -> None:
    sealed, path = for_the(pair), tmp_path / "f.ptm"
    for count in (2, COUNT):
        tensors = [
            TensorSource(f"w{i}", DATA_TYPES["uint8"], (TENSOR_BYTES,), Bytes(bytes(TENSOR_BYTES)), promised="00" * 32)
            for i in range(count)
        ]
        write_model_file(
            path, [ModelSource("demo", tensors)], partial(Sealer, list(sealed["to"])), resume=sealed["keys"]
        )
    with ModelFile.open(path, sealed["keys"]) as file:
        assert len(file.models[0].descriptor.tensors) == COUNT


def test_a_leftover_whose_header_promises_too_much_is_not_read(
    tmp_path: Path, pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = MODEL_HEADER.pack(0, 0, MAX_DESCRIPTOR_BYTES + 1, 0, 0)
    (tmp_path / "file").write_bytes(header)
    os.truncate(tmp_path / "file", 4 * MAX_DESCRIPTOR_BYTES)
    counts: list[int] = []
    monkeypatch.setattr(resume, "Former", partial(counted, counts))
    with (tmp_path / "file").open("rb") as file:
        left = Leftover(file.fileno(), 4 * MAX_DESCRIPTOR_BYTES, for_the(pair)["keys"])
        assert left.sealed(0, 12, "demo", 64)(0, 1) is None
    assert counts == [MODEL_HEADER.size]


def counted(counts: list[int], handle: int, start: int, length: int) -> Former:
    counts.append(length)
    return Former(handle, start, length)


@pytest.mark.parametrize("at", [64, 70, 90, 5000, -TENSOR_BYTES, -1])
def test_r_8_2_6_6_damage_in_an_encrypted_leftover_is_done_again(
    made: Path, tmp_path: Path, pair: Path, at: int
) -> None:
    killed(made, "u", tmp_path / "out", COUNT * TENSOR_BYTES, for_the(pair))
    file = next((tmp_path / "out.partial").glob("Model/demo/*"))
    data = bytearray(file.read_bytes())
    data[at] ^= 0xFF
    file.write_bytes(data)
    decoded_bytes(made, "u", tmp_path / "out", for_the(pair))
    check_result(made, pair, tmp_path / "out", "b")


def test_an_error_leaves_nothing_behind(made: Path, tmp_path: Path) -> None:
    def fail(count: int) -> None:
        raise IntegrityError("tensor w1", "made up")

    with pytest.raises(IntegrityError, match="made up"):
        apply([made / "a"], made / "u", tmp_path / "out", progress=fail)
    assert not list(tmp_path.iterdir())


def test_r_8_2_6_6_two_at_once_do_not_mix(made: Path, tmp_path: Path) -> None:
    refused = []

    def second(count: int) -> None:
        with pytest.raises(ConfigError, match="another process is writing"):
            apply([made / "a"], made / "v", tmp_path / "out")
        refused.append(count)

    apply([made / "a"], made / "u", tmp_path / "out", progress=second)
    assert refused
    assert contents(tmp_path / "out") == contents(made / "b")


def test_without_locks_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(95, "not supported")

    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "file").write_text("old")
    monkeypatch.setattr(fcntl, "flock", refuse)
    with folder_resumed(tmp_path / "out", ["file"]) as aside:
        assert not list(aside.iterdir())
    assert (tmp_path / "out").is_dir()
