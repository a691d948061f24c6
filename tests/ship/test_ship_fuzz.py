"""Hostile requests, answers and states meet only our error classes; benchmarks/fuzz.py runs millions of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from package.fuzzing import Target, fuzz
from ship.fuzzing import targets

from moestro.core.errors import Error, RefusalError, StorageError, TransferError
from moestro.package.keys import load_verifying

DEEP = b"[" * 100_000


@pytest.fixture(scope="module")
def parsers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    with targets(tmp_path_factory.mktemp("fuzz")) as found:
        yield {target.name: target for target in found}


def test_mutants_of_requests_answers_and_states_are_answered_or_refused(parsers: dict[str, Target]) -> None:
    found = fuzz(list(parsers.values()), 1500, seed=0)
    assert len(found.mutants) == 4
    assert set(found.refused) >= {"RefusalError", "FormatError", "TransferError", "StorageError"}
    assert found.slowest_s < 1


@pytest.mark.parametrize(
    "request_line",
    [
        "DELETE /v1/packages/demo/99999999999999999999",
        f"GET /v1/packages/demo/{'9' * 5000}/manifest",
        f"POST /v1/uploads\ncontent-length: {'9' * 5000}\n\n{{}}",
        f"GET /{'a' * 5000}",
    ],
)
def test_numbers_and_paths_of_any_length_are_refused_not_stumbled_over(
    parsers: dict[str, Target], request_line: str
) -> None:
    parsers["requests"].run(request_line.encode())  # raises for an answer of 500 or above


def test_a_query_of_bytes_that_are_no_text_is_refused(parsers: dict[str, Target]) -> None:
    parsers["requests"].run(b"GET /?root=\x80")


def test_json_of_any_depth_is_refused(parsers: dict[str, Target]) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(DEEP) + DEEP
    with pytest.raises(TransferError, match="nested deeper"):
        parsers["answers"].run(answer)
    with pytest.raises(RefusalError, match="404"):
        parsers["answers"].run(answer.replace(b"200 OK", b"404 No"))
    with pytest.raises(StorageError, match="nested deeper"):
        parsers["state"].run(DEEP)


def test_a_file_of_beginnings_of_keys_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_bytes(b"-----BEGIN A-----" * 4000)
    with pytest.raises(Error, match="holds no PEM key"):
        load_verifying(tmp_path / "key.pub")
