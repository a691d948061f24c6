"""Kernels compile, with a cache or without."""

from pathlib import Path
from typing import Any

import pytest

from moestro.place import compiled


def twice(number: int) -> int:
    return 2 * number


@pytest.mark.skipif(not compiled.COMPILED, reason="numba is not installed")
def test_a_cache_that_cannot_be_written_costs_only_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(compiled, "_cache_folder", lambda: str(tmp_path / "file" / "cache"))
    njit = compiled.numba.njit

    def nowhere_else_either(*, cache: bool = False, **settings: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**settings)

    assert compiled.compiled(twice)(2) == 4  # beside the source
    monkeypatch.setattr(compiled.numba, "njit", nowhere_else_either)
    assert compiled.compiled(twice)(3) == 6


@pytest.mark.skipif(not compiled.COMPILED, reason="numba is not installed")
def test_only_the_first_search_on_a_machine_is_cold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiled, "_cache_folder", lambda: str(tmp_path))
    doubled = compiled.compiled(twice)
    assert compiled.is_cold()
    assert doubled(2) == 4
    assert not compiled.is_cold()
