"""Memory for the arrays of one piece of work after the other, which is kept: fresh memory costs more than the work.

Large arrays that are given back leave the process, and the next ones are new pages, which the kernel (and, in a virtual
machine, its host) has to find and clear: 6 us for each 4 KiB were measured, ten times what adding its numbers takes.
"""

import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Number = TypeVar("Number", bound=np.generic)

_ALIGNMENT_BYTES = 64  # a cache line


class Room:
    """Gives arrays until `clear`, then the same memory again. Grows to the largest piece of work so far."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._end = 0

    def clear(self) -> None:
        """What was given until now means nothing any more."""
        if self._end > len(self._memory):
            self._memory = np.empty(self._end, np.uint8)
        self._end = 0

    def take(self, shape: tuple[int, ...], dtype: type[Number] | np.dtype[Number]) -> NDArray[Number]:
        """An array with whatever was there before."""
        begin, size_bytes = self._end, math.prod(shape) * np.dtype(dtype).itemsize
        self._end += -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if self._end > len(self._memory):
            return np.empty(shape, dtype)  # there is room for it after the next clear
        return self._memory[begin : begin + size_bytes].view(dtype).reshape(shape)
