"""Work that must not get in the way of those who serve: the start of a replica beside running streams."""

import os
import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")

NICENESS = 10  # about a tenth of the share of a thread that serves, where cores are short; all of them, where not


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
