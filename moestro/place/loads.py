"""The load trace: how many tokens every expert of every layer got, step by step, on disk.

    LoadWriter.append(step, count_LE) ... -> loads.trace -> read_loads -> (step_N, count_NLE)

One JSON header line, then fixed records of uint32: the step, then the counts, layer after layer. A killed run leaves at
most one torn record, which reading drops; where a resumed run went back, its records replace the earlier ones.
No torch.

Dimension key:  N records   L sparse layers   E experts
"""

import json
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from moestro.core.errors import CheckpointError, DataError
from moestro.core.files import cannot_write

FORMAT = "moestro-loads-1"


class LoadWriter:
    """Appends records; creates the file with its header where there is none."""

    def __init__(self, path: Path, num_layers: int, num_experts: int) -> None:
        self.path, self.shape = path, (num_layers, num_experts)
        header = {"format": FORMAT, "layers": num_layers, "experts": num_experts}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_text(json.dumps(header) + "\n")
            elif (found := _read_header(path)[0]) != header:
                raise CheckpointError(f"{path} is a trace of another model ({found}); move it away")
            _cut_torn_record(path, num_layers * num_experts + 1)
            self._file: IO[bytes] = path.open("ab")
        except OSError as error:
            raise cannot_write(path, error) from error

    def append(self, step: int, count_LE: NDArray[np.integer]) -> None:
        """Add one step; raises StorageError when the disk is full."""
        assert count_LE.shape == self.shape
        try:
            self._file.write(np.concatenate([[step], count_LE.ravel()]).astype("<u4").tobytes())
            self._file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_loads(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """step_N in rising order and count_NLE; raises DataError for another kind of file."""
    try:
        header, offset = _read_header(path)
        body = np.frombuffer(path.read_bytes()[offset:], dtype=np.uint8)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not a load trace ({error})") from error
    layers, experts = int(header["layers"]), int(header["experts"])
    width = 4 * (layers * experts + 1)
    record_NW = body[: len(body) // width * width].view("<u4").reshape(-1, width // 4).astype(np.int64)
    kept = _without_replaced(record_NW[:, 0])
    return record_NW[kept, 0], record_NW[kept, 1:].reshape(-1, layers, experts)


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
