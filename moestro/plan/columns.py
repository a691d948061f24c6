"""One formula for one layout, for a hundred thousand, or for sixty settings of sixty rows at once.

Every formula of `plan` is written on numbers that may be columns (numpy arrays that broadcast together). So a single
prediction, the search over a whole layout space and the Jacobian of a fit run the same code.

    larger(a, b)        a smooth maximum          stacked([spec, spec])   one spec whose fields are columns
    above_zero(a)       a smooth max(a, 0)        at(columns, place)      one entry, or a slice, back out
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Number = float | Array
"""A number, or a column of them."""
Spec = TypeVar("Spec")


def larger(a: Number, b: Number, power: float = 4.0) -> Number:
    """(a^p + b^p)^(1/p): above the maximum by at most 2^(1/p), smooth where both are near; a and b at least 0."""
    if power == 2:
        return np.sqrt(a * a + b * b)
    if power == 4:
        a2, b2 = a * a, b * b
        return np.sqrt(np.sqrt(a2 * a2 + b2 * b2))
    return (np.maximum(a, TINY) ** power + np.maximum(b, TINY) ** power) ** (1 / power)


TINY = 1e-30


def above_zero(a: Number, softness: Number) -> Number:
    """max(a, 0) rounded off over a range of `softness` around 0: half the softness at a = 0."""
    return 0.5 * (a + np.sqrt(a * a + softness * softness))


def stacked(specs: Sequence[Spec]) -> Spec:
    """One spec with a column per number; text fields are joined by their common value or left empty."""
    first = specs[0]
    assert dataclasses.is_dataclass(first)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(first):
        entries = [getattr(spec, field.name) for spec in specs]
        if isinstance(entries[0], str):
            values[field.name] = entries[0] if len(set(entries)) == 1 else ""
        elif dataclasses.is_dataclass(entries[0]):
            values[field.name] = stacked(entries)
        elif isinstance(entries[0], tuple):
            values[field.name] = tuple(stacked(parts) for parts in zip(*entries, strict=True))
        else:
            values[field.name] = np.array(entries, dtype=np.float64)
    made: Any = type(first)
    return cast(Spec, made(**values))


def at(columns: Spec, place: Any) -> Spec:
    """The entry, slice or selection `place` of every column; plain numbers stay."""
    assert dataclasses.is_dataclass(columns)
    values = {field.name: _at(getattr(columns, field.name), place) for field in dataclasses.fields(columns)}
    made: Any = type(columns)
    return cast(Spec, made(**values))


def _at(value: Any, place: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value[place] if value.ndim else value
    if isinstance(value, tuple):
        return tuple(_at(part, place) for part in value)
    return at(value, place) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
