"""OpenMP's helper threads of a CPU engine: asleep while a layer's experts are computed elsewhere.

Behind each parallel region helpers spin for milliseconds, so that the next one begins at once; vLLM's small operations
would take twice as long otherwise. But while the engine waits for its experts, their cores are wanted by those who
compute them. Helpers that wait inside a region do not spin: so the engine opens a region whose helpers wait for a
semaphore, does its waiting as the region's first thread, and posts the semaphore when the answer is there.
"""

import ctypes
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

log = logging.getLogger(__name__)

_SEMAPHORE_BYTES = 32  # sizeof(sem_t) on 64-bit Linux


class HelperThreads:
    """Those of the thread that calls `parked`, which must always be the same one."""

    def __init__(self) -> None:
        self._openmp = _find_openmp()
        self._libc = ctypes.CDLL(None)
        self._semaphore = ctypes.create_string_buffer(_SEMAPHORE_BYTES)
        self._address = ctypes.c_void_p(ctypes.addressof(self._semaphore))
        self._wait = ctypes.cast(self._libc.sem_wait, ctypes.c_void_p)
        self._libc.sem_init(self._address, 0, 0)

    @contextmanager
    def parked(self) -> Iterator[None]:
        """Helpers sleep; what the caller computes meanwhile runs on its own thread alone.

        Without effect where torch computes with one thread, or with another OpenMP than GNU's.
        """
        num_threads = torch.get_num_threads()
        if self._openmp is None or num_threads == 1:
            yield
            return
        self._openmp.GOMP_parallel_start(self._wait, self._address, num_threads)
        try:
            yield
        finally:
            for _ in range(self._openmp.omp_get_num_threads() - 1):
                self._libc.sem_post(self._address)
            self._openmp.GOMP_parallel_end()


class _SymbolInfo(ctypes.Structure):
    """What dladdr says of an address: Dl_info of dlfcn.h."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _find_openmp() -> ctypes.CDLL | None:
    """The OpenMP that torch computes with, if it is GNU's and has what is called here.

    A process may have loaded others, too: the wheel of sentencepiece brings one. What torch calls is found in the
    libraries that its own is linked with.
    """
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if line.rstrip().endswith("/libtorch_cpu.so")}
    if len(paths) != 1:
        log.warning("helper threads are not parked", extra={"torch": sorted(paths)})
        return None
    library = ctypes.CDLL(paths.pop())
    if not all(hasattr(library, name) for name in ("GOMP_parallel_start", "GOMP_parallel_end", "omp_get_num_threads")):
        log.warning("helper threads are not parked", extra={"openmp": "has no GOMP_parallel_start"})
        return None
    info = _SymbolInfo()
    ctypes.CDLL(None).dladdr(ctypes.cast(library.GOMP_parallel_start, ctypes.c_void_p), ctypes.byref(info))
    if b"libgomp" not in os.path.basename(info.file or b""):
        log.warning("helper threads are not parked", extra={"openmp": os.fsdecode(info.file or b"")})
        return None
    return library
