"""`core.native` builds a library once, finds it again, and says in words why it cannot."""

import shutil
from pathlib import Path

import pytest

from moestro.core.native import OFF, load_native

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moestro"


def source(tmp_path: Path, text: str) -> Path:
    (tmp_path / "sum.cpp").write_text(text)
    return tmp_path / "sum.cpp"


@needs_compiler
def test_a_library_is_built_once_per_source_and_flags(tmp_path: Path, own_cache: Path) -> None:
    file = source(tmp_path, 'extern "C" int two() { return 1 + PLUS; }')
    for plus, built in ((1, 1), (1, 1), (2, 2)):
        library, reason = load_native(file, ["-fPIC", f"-DPLUS={plus}"])
        assert library is not None, reason
        assert library.two() == 1 + plus
        assert len(list(own_cache.glob("sum-*.so"))) == built


@needs_compiler
def test_a_failed_build_leaves_nothing_and_says_what_failed(tmp_path: Path, own_cache: Path) -> None:
    library, reason = load_native(source(tmp_path, "int two( {"), ["-fPIC"])
    assert library is None
    assert "failed: " in reason
    assert list(own_cache.iterdir()) == []


def test_it_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OFF, "off")
    assert load_native(source(tmp_path, ""), []) == (None, f"{OFF} is off")


def test_without_a_compiler_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load_native(source(tmp_path, ""), [])[1] == "no C++ compiler found; install g++ to get them"
