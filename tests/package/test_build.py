"""`package.build`: programs come from another package only as its manifest lists them, or nothing is written at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from package.samples import Tensors, contents, save_model

from moestro.core.errors import IntegrityError, UnsafePath
from moestro.package.api import (
    Keys,
    Options,
    Release,
    apply,
    diff,
    encrypt,
    load_receiving,
    load_recipient,
    merge,
    new_key,
    pack,
    rewrap,
    save_pair,
    verify,
)

SCRIPT, LIBRARY = "Program/run.py", "Program/lib/large.bin"
LIBRARY_BYTES = (5 << 19) + 7
"""Two and a half chunks."""


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base `a`, a target `b`, the update `u` and an encrypted `x`, all with the same programs."""
    root = tmp_path_factory.mktemp("packages")
    program = root / "program"
    (program / "lib").mkdir(parents=True)
    (program / "run.py").write_text("print('hello')")
    (program / "lib" / "large.bin").write_bytes(np.random.default_rng(0).bytes(LIBRARY_BYTES))
    weights: Tensors = {"w": np.arange(4096, dtype=np.float32)}
    for sequence, name in enumerate("ab", 1):
        options = Options(release=Release(package_id="demo", sequence=sequence), program=program)
        pack(save_model(root / f"{name}-model", weights), root / name, options)
        weights["w"] = weights["w"] + 1
    diff([root / "a"], root / "b", root / "u")
    encrypt(root / "a", root / "x", [load_recipient(save_pair(new_key("x25519"), root / "key"))])
    return root


@pytest.fixture
def made(once: Path, tmp_path: Path) -> Path:
    """These, to be damaged."""
    return shutil.copytree(once, tmp_path / "made")


def merged(made: Path) -> None:
    release = Release(package_id="demo", sequence=3, hash="blake3")
    merge([made / "a"], [made / "u"], made / "out", Options(release=release))


def rewrapped(made: Path) -> None:
    recipient = load_recipient(made / "key.pub")
    rewrap(made / "x", made / "out", Keys([load_receiving(made / "key")]), [recipient])


WAYS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "apply": ("u", lambda made: apply([made / "a"], made / "u", made / "out")),
    "merge": ("a", merged),
    "diff": ("b", lambda made: diff([made / "a"], made / "b", made / "out")),
    "rewrap": ("x", rewrapped),
}
"""Where the programs come from, and what makes another package of it."""


@pytest.mark.parametrize("way", WAYS)
def test_programs_are_taken_over_as_the_manifest_lists_them(made: Path, way: str) -> None:
    source, work = WAYS[way]
    if way != "rewrap":
        (made / source / "Program" / "stray").write_text("not listed")
    work(made)
    found = contents(made / "out" / "Program")
    assert found == contents(made / "program")
    verify(made / "out")


@pytest.mark.parametrize("way", WAYS)
def test_a_program_with_a_flipped_byte_is_found_while_it_is_copied(made: Path, way: str) -> None:
    source, work = WAYS[way]
    file = made / source / LIBRARY
    data = bytearray(file.read_bytes())
    data[LIBRARY_BYTES - 1] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match=rf"^{LIBRARY}, chunk 2: its bytes are not those of the manifest; fetch"):
        work(made)
    assert not list(made.glob("out*"))


@pytest.mark.parametrize("size", [0, 5, 20])
def test_a_program_of_another_size_is_found(made: Path, size: int) -> None:
    (made / "u" / SCRIPT).write_bytes(b"#" * size)
    with pytest.raises(IntegrityError, match=f"it has {size} bytes, the manifest says 14"):
        apply([made / "a"], made / "u", made / "out")
    assert not list(made.glob("out*"))


def test_a_program_of_another_size_is_not_copied(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(made / "u" / LIBRARY, 3 * LIBRARY_BYTES)
    monkeypatch.setattr("moestro.package.build.Sink", None)
    with pytest.raises(IntegrityError, match=f"it has {3 * LIBRARY_BYTES} bytes, the manifest says {LIBRARY_BYTES}"):
        apply([made / "a"], made / "u", made / "out")


def test_a_link_in_place_of_a_program_is_not_followed(made: Path) -> None:
    (made / "u" / SCRIPT).unlink()
    (made / "u" / SCRIPT).symlink_to(made / "program" / "run.py")
    with pytest.raises(UnsafePath, match="leads through a link"):
        apply([made / "a"], made / "u", made / "out")
    assert not list(made.glob("out*"))
