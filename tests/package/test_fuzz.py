"""Hostile bytes meet only our error classes, in bounded time (annex X.2); benchmarks/fuzz.py runs millions of them."""

from pathlib import Path

from package.fuzzing import fuzz, tamper, tamper_sealed, targets

REPORTED = {"FormatError", "IntegrityError", "DecryptionError", "SignatureError", "ConversionError", "ConfigError"}
SLOW_S = 1.0


def test_x_2_mutants_of_everything_are_read_or_refused(tmp_path: Path) -> None:
    parsers = targets(tmp_path)
    found = fuzz(parsers, 8000, seed=0)
    assert set(found.mutants) == {parser.name for parser in parsers}
    assert set(found.refused) >= REPORTED
    assert found.slowest_s < SLOW_S


def test_x_6_tampering_with_a_signed_package_is_found() -> None:
    found = tamper(250, seed=0)
    assert set(found) >= {"changed", "truncated", "exchanged", "replayed"}
    assert found.total() == 250


def test_x_6_tampering_with_chunks_of_ciphertext_is_found_without_digests() -> None:
    found = tamper_sealed(100, seed=0)
    assert set(found) >= {"chunks exchanged", "chunk repeated", "chunk replayed", "ciphertext truncated"}
    assert found.total() == 100
