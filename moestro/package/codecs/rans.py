"""PTM-rANS: entropy coding with static tables, one table per context (specification, annex W).

    encode(symbols, contexts, tables) -> bytes        decode(bytes, contexts, tables) -> symbols

Precision 14 bits, 32-bit states, 16-bit words, L lanes that NumPy can run side by side and C++ one after another, with
the same bytes. Decoding proves its end: every lane must come back to 2^16 and no word may be left.
"""

from dataclasses import dataclass

import numpy as np

from moestro.core.errors import FormatError, IntegrityError
from moestro.package.kernels import codecs, pointer
from moestro.package.spans import Array

PRECISION = 14
TOTAL = 1 << PRECISION
START = 1 << 16
MAX_LANES = 512
"""Each lane costs about 2 bytes a block beyond the entropy; the specification's 4096 cost 3 % of a small update."""
FAILURES = {
    -1: "a context has no table",
    -2: "the words end too soon",
    -3: "words are left over",
    -4: "a lane ends wrong",
}


def num_lanes(count: int) -> int:
    """Largest power of two up to count / 2048, between 1 and 512."""
    return 1 << (min(MAX_LANES, max(1, count // 2048)).bit_length() - 1)


@dataclass(frozen=True, slots=True)
class Tables:
    """Frequencies of symbols per context."""

    row_of: np.ndarray
    """int32 [256]: the table of each context, -1 where there is none."""
    freq: np.ndarray
    """uint16 [rows, 256]; each row sums to 2^14."""
    cum: np.ndarray
    """uint16 [rows, 256]: sum of the frequencies before."""

    @classmethod
    def of_freq(cls, contexts: list[int], freq: np.ndarray) -> "Tables":
        """From checked frequencies."""
        row_of = np.full(256, -1, np.int32)
        row_of[contexts] = np.arange(len(contexts))
        cum = np.cumsum(freq, axis=1, dtype=np.uint32) - freq
        return cls(row_of, np.ascontiguousarray(freq, np.uint16), np.ascontiguousarray(cum, np.uint16))

    def slots(self) -> Array:
        """uint8 [rows, 2^14]: the symbol at each slot."""
        symbols = np.tile(np.arange(256, dtype=np.uint8), len(self.freq))
        return np.repeat(symbols, self.freq.reshape(-1)).reshape(len(self.freq), TOTAL)

    def pairs(self) -> np.ndarray:
        """uint32 [rows, 256]: frequency, and above it the sum of those before."""
        return self.freq | self.cum.astype(np.uint32) << 16


def quantised(count: np.ndarray) -> np.ndarray:
    """Frequencies of one context that sum to 2^14, at least 1 for every symbol that occurs."""
    total = int(count.sum())
    used = count > 0
    freq = np.where(used, np.maximum(1, count.astype(np.int64) * TOTAL // total), 0)
    missing = TOTAL - int(freq.sum())
    falling = np.argsort(-count, kind="stable")
    if missing > 0:
        freq[falling[0]] += missing
    for symbol in falling:
        if missing >= 0:
            break
        taken = min(-missing, int(freq[symbol]) - 1) if used[symbol] else 0
        freq[symbol] -= taken
        missing += taken
    return freq


def encode(symbols: Array, contexts: Array, tables: Tables) -> bytes:
    """L final states, then the words in the order of decoding."""
    lanes = num_lanes(len(symbols))
    states = np.full(lanes, START, np.uint32)
    words = np.empty(len(symbols), np.uint16)
    library = codecs()
    if library is None:
        words = _encode_rows(symbols, contexts, tables, states)
    else:
        pushed = library.rans_encode(
            symbols.ctypes.data,
            contexts.ctypes.data,
            tables.row_of.ctypes.data,
            len(symbols),
            lanes,
            tables.freq.ctypes.data,
            tables.cum.ctypes.data,
            states.ctypes.data,
            words.ctypes.data,
        )
        words = words[:pushed]
    return states.astype("<u4").tobytes() + words[::-1].astype("<u2").tobytes()


def _encode_rows(symbols: Array, contexts: Array, tables: Tables, states: np.ndarray) -> np.ndarray:
    """One step of all lanes at a time, last step first; within a step the last lane pushes first."""
    lanes, pushed = len(states), []
    for start in reversed(range(0, len(symbols), lanes)):
        here = slice(start, start + lanes)
        row, symbol = tables.row_of[contexts[here]], symbols[here]
        freq, cum = tables.freq[row, symbol].astype(np.uint64), tables.cum[row, symbol].astype(np.uint64)
        x = states[: len(freq)].astype(np.uint64)
        full = x >= freq << 18
        pushed.append((x[full] & 0xFFFF)[::-1])
        x = np.where(full, x >> 16, x)
        states[: len(freq)] = (x // freq << PRECISION) + x % freq + cum
    return np.concatenate(pushed).astype(np.uint16) if pushed else np.empty(0, np.uint16)


def decode(stream: memoryview, contexts: Array, tables: Tables, where: str) -> Array:
    """As many symbols as there are contexts."""
    lanes = num_lanes(len(contexts))
    if len(stream) < 4 * lanes or len(stream) % 2:
        raise FormatError(f"an entropy-coded stream has {len(stream)} bytes", where=where)
    states = np.frombuffer(stream[: 4 * lanes], "<u4").astype(np.uint32)
    words = np.frombuffer(stream[4 * lanes :], "<u2").astype(np.uint16)
    symbols, slots, pairs = np.empty(len(contexts), np.uint8), tables.slots(), tables.pairs()
    library = codecs()
    if library is None:
        status = _decode_rows(states, words, contexts, tables, symbols)
    else:
        status = library.rans_decode(
            states.ctypes.data,
            pointer(words) if len(words) else None,
            len(words),
            contexts.ctypes.data,
            tables.row_of.ctypes.data,
            len(contexts),
            lanes,
            pairs.ctypes.data,
            slots.ctypes.data,
            symbols.ctypes.data,
        )
    if status:
        raise IntegrityError(where, f"entropy-coded stream is wrong ({FAILURES[status]})")
    return symbols


def _decode_rows(states: np.ndarray, words: np.ndarray, contexts: Array, tables: Tables, symbols: Array) -> int:
    lanes, place, slots = len(states), 0, tables.slots()
    for start in range(0, len(contexts), lanes):
        row = tables.row_of[contexts[start : start + lanes]]
        if (row < 0).any():
            return -1
        x = states[: len(row)]
        low = x & (TOTAL - 1)
        symbol = slots[row, low]
        x = tables.freq[row, symbol] * (x >> PRECISION) + low - tables.cum[row, symbol]
        empty = np.flatnonzero(x < START)
        if place + len(empty) > len(words):
            return -2
        x[empty] = x[empty] << 16 | words[place : place + len(empty)]
        place += len(empty)
        states[: len(row)] = x
        symbols[start : start + lanes] = symbol
    if place != len(words):
        return -3
    return 0 if (states == START).all() else -4
