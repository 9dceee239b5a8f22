"""Processes of bench_micro, forked from one that has imported what they need: dozens of them start in seconds."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from unittest.mock import patch

from benchmarks.serving_process import ChildError

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["benchmarks.micro_plane"])


class Peer:
    """One process, and a pipe to it. It must end when its end of the pipe does."""

    def __init__(self, name: str, target: Callable[..., None], *arguments: object) -> None:
        """target: takes the other end of the pipe, and the arguments."""
        self.name = name
        self._pipe, theirs = _CONTEXT.Pipe()
        self._process: BaseProcess = _CONTEXT.Process(target=target, args=(theirs, *arguments), name=name, daemon=True)
        # For the process that all others are forked from: what Ray gives a replica that books a fraction of a core.
        with patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
            self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def answer(self, *, timeout_s: float) -> object:
        """The next thing that it sends. Raises ChildError where it has ended, or takes too long."""
        try:
            if self._pipe.poll(timeout_s):
                return self._pipe.recv()
        except EOFError:
            raise ChildError(f"the process {self.name} has ended; what it said is above") from None
        raise ChildError(f"the process {self.name} did not answer within {timeout_s:.0f} s")

    def end(self) -> None:
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(5)


def until_closed(pipe: Connection) -> None:
    """Returns when the other end is gone."""
    try:
        pipe.recv()
    except EOFError:
        pass
