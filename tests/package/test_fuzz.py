"""Hostile bytes meet only our error classes, in bounded time (annex X.2); fuzzing.py runs the same with millions."""

import pytest
from package.fuzzing import SLOW_S, fuzz, tamper

REPORTED = {"FormatError", "IntegrityError", "DecryptionError", "SignatureError", "ConversionError", "LimitExceeded"}


def test_x_2_mutants_of_everything_are_read_or_refused() -> None:
    found = fuzz(8000, seed=0)
    assert set(found["refused"]) >= REPORTED  # type: ignore[call-overload]
    assert found["slowest_s"] < SLOW_S  # type: ignore[operator]


def test_x_6_tampering_with_a_signed_package_is_found() -> None:
    found = tamper(250, seed=0)["found"]
    assert set(found) >= {"changed", "truncated", "exchanged", "replayed"}  # type: ignore[call-overload]
    assert sum(found.values()) == 250  # type: ignore[attr-defined]


@pytest.mark.slow
def test_x_2_memory_does_not_grow() -> None:
    found = fuzz(200_000, seed=1)
    assert found["slowest_s"] < SLOW_S  # type: ignore[operator]
    assert found["grown_kib"] < 8 << 10  # type: ignore[operator]
