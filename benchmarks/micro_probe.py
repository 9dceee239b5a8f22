"""How fast this machine is at best, measured anew in every round: the floors of bench_micro."""

import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from benchmarks.micro_cells import Speeds

READ_BYTES = 256 << 20  # several times the last cache
MATMUL = 1024  # rows, columns and depth
PINGS = 1000
_MESSAGE = b"." * 64  # a frame without a payload


class Probe:
    """Call it for the speeds of now. A context manager: it has a process to exchange messages with."""

    def __init__(self, *, dtypes: Sequence[str], hops: bool) -> None:
        """dtypes: whose matmul rate is wanted; hops: whether a message's time is."""
        self._dtypes = dtypes
        self._hops = hops
        self._block = torch.ones(READ_BYTES // 4)
        self._vector = torch.ones(MATMUL)
        self._factors = {name: torch.randn(MATMUL, MATMUL).to(getattr(torch, name)) for name in dtypes}
        self._stack = ExitStack()
        self._peer: socket.socket | None = None

    def __enter__(self) -> Self:
        if self._hops:
            self._peer = self._start_peer()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __call__(self) -> Speeds:
        return Speeds(
            bytes_per_s=self.bytes_per_s(),
            flops_per_s={name: self.flops_per_s(name) for name in self._dtypes},
            hop_s=0.0 if self._peer is None else _ping_s(self._peer) / 2,
        )

    def bytes_per_s(self) -> float:
        """Reading memory, the best of a few: a matrix-vector product is the fastest reader that torch has."""
        matrix = self._block.view(-1, MATMUL)
        readers: tuple[Callable[[], object], ...] = (lambda: matrix @ self._vector, self._block.sum)
        return READ_BYTES / min(_elapsed_s(reader) for reader in readers * 3)

    def flops_per_s(self, dtype: str) -> float:
        """Multiplying two square matrices with torch, the best of a few."""
        factor = self._factors[dtype]
        # The first one in a round pays for what others left in the caches.
        return 2 * MATMUL**3 / min(_elapsed_s(lambda: factor @ factor) for _ in range(4))

    def _start_peer(self) -> socket.socket:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="em-"))
        address = str(Path(folder) / "ping.sock")
        listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(address)
        listener.listen(1)
        listener.settimeout(60)
        peer = multiprocessing.get_context("forkserver").Process(target=_echo, args=(address,), daemon=True)
        peer.start()
        sock, _ = listener.accept()
        self._stack.callback(peer.join, 10)
        return self._stack.enter_context(sock)  # closed first: that is what ends the peer


def _ping_s(peer: socket.socket) -> float:
    times = []
    for _ in range(PINGS):
        began_s = time.perf_counter()
        peer.sendall(_MESSAGE)
        peer.recv(len(_MESSAGE))
        times.append(time.perf_counter() - began_s)
    return statistics.median(times)


def _echo(address: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(address)
        while message := sock.recv(len(_MESSAGE)):
            sock.sendall(message)
    os._exit(0)


def _elapsed_s(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s
