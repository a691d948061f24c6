"""Compile a function of numbers and NumPy arrays where numba is installed; run it as plain Python where it is not.

Both give the same answers (no fast-math, a random generator of our own); plain Python takes some hundred times longer,
so `solve` searches less there. The first call on a machine compiles for some seconds. Compiled code is kept in the
user's cache in a folder named by a hash of all kernels' sources: numba itself only watches a function's own file, and
would keep a caller of one that changed. Where nothing can be written, every process compiles for itself.
"""

import functools
import hashlib
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from moestro.core.native import cache_folder

P = ParamSpec("P")
R = TypeVar("R")

numba: Any = import_module("numba") if find_spec("numba") else None

COMPILED = numba is not None
"""Whether numba is there."""
KERNELS = ("state.py", "anneal.py", "prepare.py", "bound.py")
"""Files with compiled functions."""


@functools.cache
def _cache_folder() -> str:
    sources = b"".join(Path(__file__).with_name(name).read_bytes() for name in KERNELS)
    return str(cache_folder() / f"place-{hashlib.sha256(sources).hexdigest()[:16]}")


def is_cold() -> bool:
    """True where the next search compiles first, for some 20 s of processor time."""
    return COMPILED and not any(Path(_cache_folder()).glob("**/*.nbc"))


def compiled(function: Callable[P, R], inline: bool = False) -> Callable[P, R]:
    """Decorate a kernel."""
    if numba is None:
        return function
    jit = functools.partial(numba.njit, nogil=True, error_model="numpy", forceinline=inline)
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = _cache_folder()
    try:
        made: Callable[P, R] = jit(cache=True)(function)
    except RuntimeError:  # neither the user's cache nor the package's folder can be written
        made = jit()(function)
    finally:
        numba.config.CACHE_DIR = before
    return made


def inlined(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate what a kernel's innermost loop calls: passing a search's thirty arrays costs more than using them."""
    return compiled(function, inline=True)
