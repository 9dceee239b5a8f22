"""Work that gives way on cores that are short: an engine's steps to gateways, the start of a replica to all others.

Also work that lets others finish what they are about: an expert group that its router has just woken.
"""

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


def let_others_finish() -> None:
    """From now on this thread, when it is woken, waits until whoever runs on its core sleeps or has had its time.

    Without it, a group that gets its rows may take the core of the router, which is about to send others theirs: on two
    cores they began more than a millisecond later in every tenth trip. Threads that this one starts do the same.
    Where it is not allowed, nothing changes.
    """
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
