"""The load trace: how many tokens every expert of every layer got, step by step, on disk.

    LoadWriter.append(step, count_LE) ... -> loads.trace -> read_loads -> (step_N, count_NLE)

One JSON header line, then fixed records of uint32: the step, then the counts, layer after layer, by source rank where
the header says so, then pairs of experts chosen together where it says so. A killed run leaves at
most one torn record, which reading drops; where a resumed run went back, its records replace the earlier ones.
No torch.

Dimension key:  N records   L sparse layers   E experts   S source ranks   X pairs of experts   T tokens   K choices
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from moestro.core.errors import CheckpointError, DataError
from moestro.core.files import cannot_write

FORMAT = "moestro-loads-1"


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Loads over time."""

    step_N: NDArray[np.int64]
    count_NLE: NDArray[np.int64]
    source_NLSE: NDArray[np.int64] | None = None
    """The counts by the rank that the tokens come from."""
    pair_NLX: NDArray[np.int64] | None = None
    """How often two experts were chosen together, pairs in the order of `pair_index`."""


def pair_index(num_experts: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """first_X, second_X: the pairs of different experts, (0,1) (0,2) ... (1,2) ..."""
    first_X, second_X = np.triu_indices(num_experts, 1)
    return first_X.astype(np.int64), second_X.astype(np.int64)


def count_pairs(expert_TK: NDArray[np.integer], num_experts: int) -> NDArray[np.int64]:
    """pair_X of one layer's choices; -1 marks a slot that is not used."""
    together_EE = np.zeros((num_experts + 1, num_experts + 1), np.int64)
    for one in range(expert_TK.shape[1]):
        for other in range(one + 1, expert_TK.shape[1]):
            key_T = expert_TK[:, one].astype(np.int64) * (num_experts + 1) + expert_TK[:, other]
            used_T = (expert_TK[:, one] >= 0) & (expert_TK[:, other] >= 0)
            together_EE += np.bincount(key_T[used_T], minlength=together_EE.size).reshape(together_EE.shape)
    together_EE = together_EE[:num_experts, :num_experts]
    return np.asarray((together_EE + together_EE.T)[pair_index(num_experts)])


class LoadWriter:
    """Appends records; creates the file with its header where there is none.

    sources  record the counts of each of so many source ranks instead of their sum
    pairs    record how often two experts were chosen together
    """

    def __init__(self, path: Path, num_layers: int, num_experts: int, sources: int = 0, pairs: bool = False) -> None:
        self.path, self.shape = path, (num_layers, *([sources] if sources else []), num_experts)
        self.pairs = (num_layers, num_experts * (num_experts - 1) // 2) if pairs else (0, 0)
        extra = ({"sources": sources} if sources else {}) | ({"pairs": True} if pairs else {})
        header = {"format": FORMAT, "layers": num_layers, "experts": num_experts, **extra}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_text(json.dumps(header) + "\n")
            elif (found := _read_header(path)[0]) != header:
                raise CheckpointError(f"{path} is a trace of another model ({found}); move it away")
            _cut_torn_record(path, _numbers(header))
            self._file: IO[bytes] = path.open("ab")
        except OSError as error:
            raise cannot_write(path, error) from error

    def append(self, step: int, count: NDArray[np.integer], pair_LX: NDArray[np.integer] | None = None) -> None:
        """Add one step; raises StorageError when the disk is full.

        count  count_LE, or count_LSE in a trace with sources
        """
        assert count.shape == self.shape
        assert (pair_LX is not None) == bool(self.pairs[0])
        parts = [np.array([step]), count.ravel(), *([] if pair_LX is None else [pair_LX.ravel()])]
        try:
            self._file.write(np.concatenate(parts).astype("<u4").tobytes())
            self._file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_loads(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """step_N in rising order and count_NLE; raises DataError for another kind of file."""
    trace = read_trace(path)
    return trace.step_N, trace.count_NLE


def read_trace(path: Path) -> Trace:
    """Everything in a trace; raises DataError for another kind of file or one without a whole record."""
    try:
        header, offset = _read_header(path)
        body = np.frombuffer(path.read_bytes()[offset:], dtype=np.uint8)
        layers, experts = int(header["layers"]), int(header["experts"])
        sources = int(header.get("sources", 0))
        width = 4 * _numbers(header)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not a load trace ({error})") from error
    record_NW = body[: len(body) // width * width].view("<u4").reshape(-1, width // 4).astype(np.int64)
    record_NW = record_NW[_without_replaced(record_NW[:, 0])]
    size = layers * max(sources, 1) * experts
    count = record_NW[:, 1 : 1 + size].reshape(len(record_NW), layers, max(sources, 1), experts)
    return Trace(
        step_N=record_NW[:, 0],
        count_NLE=count.sum(axis=2),
        source_NLSE=count if sources else None,
        pair_NLX=record_NW[:, 1 + size :].reshape(len(record_NW), layers, -1) if header.get("pairs") else None,
    )


def _numbers(header: dict[str, Any]) -> int:
    """Numbers of one record."""
    layers, experts = int(header["layers"]), int(header["experts"])
    pairs = experts * (experts - 1) // 2 if header.get("pairs") else 0
    return 1 + layers * (experts * max(int(header.get("sources", 0)), 1) + pairs)


def _without_replaced(step_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True for records that no later record at the same or an earlier step replaces."""
    lowest_later_N = np.minimum.accumulate(np.append(step_N[1:], np.iinfo(np.int64).max)[::-1])[::-1]
    return np.asarray(step_N < lowest_later_N)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        line = file.readline(4096)
    header = json.loads(line)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"no {FORMAT} header")
    return header, len(line)


def _cut_torn_record(path: Path, numbers: int) -> None:
    offset = _read_header(path)[1]
    torn = (path.stat().st_size - offset) % (4 * numbers)
    if torn:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - torn)
