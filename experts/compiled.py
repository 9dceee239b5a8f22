"""How the hot path's loops are compiled: without the GIL, and kept beside their source for the next start."""

import functools
from collections.abc import Callable

from numba import njit


@functools.cache
def compiled(function: Callable[..., object]) -> Callable[..., int]:
    """`function` as machine code, made when it is first called with arrays of some types.

    Where nothing can be written beside its source file, every process compiles for itself.
    """
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:
        return njit(nogil=True, error_model="numpy")(function)
