"""Where tensors lie in a model's data: large ones at multiples of a chunk, small ones in the gaps before them.

A tensor that begins at a chunk has its pieces hashed once for itself and for its file, and keeps the same chunks in
another version of the model, which then need no transfer. A pure function of lengths.
"""

from collections import deque
from collections.abc import Sequence

from moestro.package.layout import round_up
from moestro.package.limits import ALIGNMENT

WASTE_SHARE = 64
"""A gap may be at most 1/64 of the tensor after it, or before the first one of all tensors; else the tensor begins at
the next multiple of 64."""


def place(lengths: Sequence[int], start: int, chunk: int) -> list[int]:
    """Offsets of items in the given order of preference.

    start    first free byte
    returns  one offset per item, 0 for empty ones; gaps are under 64 bytes or end at a multiple of `chunk`
    """
    offsets = [0] * len(lengths)
    worth = sum(lengths)
    small = deque(index for index, length in enumerate(lengths) if 0 < length < chunk)
    end = start

    def put(index: int, offset: int) -> None:
        nonlocal end
        offsets[index] = offset
        end = offset + lengths[index]

    for index in (index for index, length in enumerate(lengths) if length >= chunk):
        boundary = round_up(end, chunk)
        while small and round_up(end, ALIGNMENT) + lengths[small[0]] <= boundary:
            put(small[0], round_up(end, ALIGNMENT))
            small.popleft()
        boundary = round_up(end, chunk)
        near = boundary - end <= max(lengths[index], worth if end < chunk else 0) // WASTE_SHARE
        put(index, boundary if near else round_up(end, ALIGNMENT))
    for index in small:
        put(index, round_up(end, ALIGNMENT))
    return offsets
