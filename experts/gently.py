"""Work that gives way on cores that are short: an engine's steps to gateways, the start of a replica to all others."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

_T = TypeVar("_T")

# Where cores are short: about a twentieth of the share of an engine or of experts (`niceness` of 5) and a seventieth of
# that of everybody else who serves. Where they are not: all of them.
NICENESS = 19


def gently(work: Callable[[], _T]) -> _T:
    """What `work` returns, or raises, when a thread of low priority has done it.

    A thread of its own, because a process without privileges may lower a thread's priority and never raise it again.
    Threads that `work` starts have the low priority for ever: imports and reading files start none.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        own = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + NICENESS)
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="gently")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def give_way(niceness: int) -> None:
    """From now on all threads of this process, and those that they start, run at this niceness at least.

    niceness: absolute, 0 to 19.
    """
    for thread in map(int, os.listdir("/proc/self/task")):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.setpriority(os.PRIO_PROCESS, thread, max(niceness, os.getpriority(os.PRIO_PROCESS, thread)))
