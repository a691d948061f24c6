"""Compile a function of numbers and NumPy arrays where numba is installed; run it as plain Python where it is not.

Both give the same answers (no fast-math, a random generator of our own); plain Python takes some hundred times longer,
so `solve` searches less there. Compiled code is kept beside the source or in the user's cache: the first call on a
machine takes seconds, later ones none.
"""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

try:
    import numba
except ImportError:
    numba = None

COMPILED = numba is not None
"""Whether numba is there."""


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a kernel."""
    if numba is None:
        return function
    made: Callable[P, R] = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    return made
