"""The load trace: what every expert of every layer got from every source, step by step, on disk.

    LoadWriter.append(step, count_LSE, pair_LX) ... -> loads.trace -> read_trace -> Trace

One JSON header line, then records: four numbers of 32 bits (step, sources, flags, bytes of each further number), the
counts, layer after layer and source after source, and in some records how often two experts were chosen together.
Numbers take two bytes where all of a record fit. A record says itself how long it is, so a run may go on with other
sources: a source is a place in an expert group, that is the ranks whose tokens start there; one process is one source.
A killed run leaves at most one torn record, which reading drops and writing cuts off; where a resumed run went back,
its records replace the earlier ones. No torch.

Dimension key:  N records   L sparse layers   E experts   S sources   X pairs of experts   M, P some of the records
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from moestro.core.errors import CheckpointError, DataError, PlacementError
from moestro.core.files import cannot_write

FORMAT = "moestro-loads-2"
HEAD = 4
"""Numbers at the beginning of a record."""
PAIRS, MERGES = 1, 2
"""Flags: pairs follow the counts; tokens travel once to each host."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Loads over time."""

    step_N: NDArray[np.int64]
    count_NLE: NDArray[np.int64]
    source_MLSE: NDArray[np.int64]
    """The counts by where tokens come from, of the last records, all with as many sources as the very last."""
    pair_step_P: NDArray[np.int64]
    """Steps whose pairs were counted."""
    pair_PLX: NDArray[np.int64]
    """How often two experts were chosen together, pairs in the order of `pair_index`."""
    merges: bool
    """Whether the run's dispatch sent a token to a host once, whatever number of its experts was there."""


def pair_index(num_experts: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """first_X, second_X: the pairs of different experts, (0,1) (0,2) ... (1,2) ..."""
    first_X, second_X = np.triu_indices(num_experts, 1)
    return first_X.astype(np.int64), second_X.astype(np.int64)


def spread_sources(count_LSE: NDArray[np.float64], devices: int) -> NDArray[np.float64]:
    """count_LGE: each source is as many neighbouring devices as there are for it, all alike.

    raises  PlacementError where the devices do not cover the sources evenly
    """
    sources = count_LSE.shape[1]
    if devices % sources:
        raise PlacementError(
            f"the trace was recorded on {sources} ranks, the cluster has {devices} devices; "
            "give the cluster they ran on, or leave sources out with --even-sources"
        )
    return np.asarray(np.repeat(count_LSE, devices // sources, axis=1) / (devices // sources))


def as_one_source(trace: Trace) -> Trace:
    """The same counts, not knowing where tokens come from."""
    return replace(trace, source_MLSE=trace.count_NLE[:, :, None])


class LoadWriter:
    """Appends records; creates the file with its header where there is none.

    merges   dispatch sends a token to a host once
    """

    def __init__(self, path: Path, num_layers: int, num_experts: int, merges: bool = False) -> None:
        self.path, self.layers, self.experts, self.merges = path, num_layers, num_experts, merges
        header = {"format": FORMAT, "layers": num_layers, "experts": num_experts}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_text(json.dumps(header) + "\n")
            elif (found := _read_header(path)[0]) != header:
                raise CheckpointError(f"{path} is a trace of another model ({found}); move it away")
            _cut_torn_record(path)
            self._file: IO[bytes] = path.open("ab")
        except ValueError as error:
            raise CheckpointError(f"{path} is not a load trace ({error}); move it away") from error
        except OSError as error:
            raise cannot_write(path, error) from error

    def append(self, step: int, count_LSE: NDArray[np.integer], pair_LX: NDArray[np.integer] | None = None) -> None:
        """Add one step; raises StorageError when the disk is full."""
        assert (count_LSE.shape[0], count_LSE.shape[2]) == (self.layers, self.experts)
        parts = [count_LSE.ravel(), *([] if pair_LX is None else [pair_LX.ravel()])]
        wide = any(part.max(initial=0) >= 1 << 16 for part in parts)
        flags = PAIRS * (pair_LX is not None) | MERGES * self.merges
        head = np.array([step, count_LSE.shape[1], flags, 4 if wide else 2], "<u4")
        body = [part.astype("<u4" if wide else "<u2").tobytes() for part in parts]
        try:
            self._file.write(b"".join([head.tobytes(), *body]))
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
    """Everything in a trace; raises DataError for another kind of file."""
    try:
        header, offset = _read_header(path)
        layers, experts = int(header["layers"]), int(header["experts"])
        body = path.read_bytes()
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not a load trace ({error})") from error
    records = _records(memoryview(body), offset, layers, experts)
    step_N = np.array([record.step for record in records], np.int64)
    records = [record for record, kept in zip(records, _without_replaced(step_N), strict=True) if kept]
    count_NLSE = [record.counts(body, layers, experts) for record in records]
    sources = records[-1].sources if records else 1
    alike = next((n for n, record in enumerate(reversed(records)) if record.sources != sources), len(records))
    paired = [record for record in records if record.flags & PAIRS]
    pairs = experts * (experts - 1) // 2
    return Trace(
        step_N=np.array([record.step for record in records], np.int64),
        count_NLE=np.array([count_LSE.sum(axis=1) for count_LSE in count_NLSE], np.int64).reshape(-1, layers, experts),
        source_MLSE=np.array(count_NLSE[len(records) - alike :]).reshape(-1, layers, sources, experts),
        pair_step_P=np.array([record.step for record in paired], np.int64),
        pair_PLX=np.array([record.pairs(body, layers, experts) for record in paired]).reshape(-1, layers, pairs),
        merges=bool(records and records[-1].flags & MERGES),
    )


@dataclass(frozen=True, slots=True)
class _Record:
    """Where a record's numbers lie."""

    step: int
    sources: int
    flags: int
    width: int
    start: int
    """Of the counts, in bytes of the file."""

    def _numbers(self, body: bytes, skip: int, number: int) -> NDArray[np.int64]:
        return np.frombuffer(body, f"<u{self.width}", number, self.start + skip * self.width).astype(np.int64)

    def counts(self, body: bytes, layers: int, experts: int) -> NDArray[np.int64]:
        """count_LSE."""
        return self._numbers(body, 0, layers * self.sources * experts).reshape(layers, self.sources, experts)

    def pairs(self, body: bytes, layers: int, experts: int) -> NDArray[np.int64]:
        """pair_LX, where the flags say that there are any."""
        number = layers * (experts * (experts - 1) // 2)
        return self._numbers(body, layers * self.sources * experts, number).reshape(layers, -1)

    def end(self, layers: int, experts: int) -> int:
        """Where the next record begins."""
        pairs = experts * (experts - 1) // 2 if self.flags & PAIRS else 0
        return self.start + self.width * layers * (self.sources * experts + pairs)


def _records(body: "memoryview | np.memmap[Any, Any]", offset: int, layers: int, experts: int) -> list[_Record]:
    """All whole records after the header."""
    found: list[_Record] = []
    while offset + 4 * HEAD <= len(body):
        step, sources, flags, width = np.frombuffer(body[offset : offset + 4 * HEAD], "<u4").tolist()
        record = _Record(step, sources, flags, width, offset + 4 * HEAD)
        if width not in (2, 4) or not sources or flags > PAIRS | MERGES:
            break  # what a machine leaves that lost its power
        offset = record.end(layers, experts)
        if offset > len(body):
            break
        found.append(record)
    return found


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


def _cut_torn_record(path: Path) -> None:
    header, offset = _read_header(path)
    layers, experts = int(header["layers"]), int(header["experts"])
    records = _records(np.memmap(path, np.uint8, "r"), offset, layers, experts)
    whole = records[-1].end(layers, experts) if records else offset
    if whole < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(whole)
