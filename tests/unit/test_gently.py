"""Work of low priority beside those who serve."""

import os
import subprocess
import sys
import threading

import pytest

from experts.gently import NICENESS, gently, let_others_finish


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_work_has_a_low_priority_and_who_waits_for_it_keeps_its_own() -> None:
    before = niceness()
    assert gently(niceness) == min(before + NICENESS, 19)
    assert niceness() == before


def test_what_the_work_raises_reaches_who_asked_for_it() -> None:
    def fail() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        gently(fail)


GIVES_WAY = """
import os, threading
from experts.gently import give_way

def niceness():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

def in_a_thread():
    go.wait()
    found.append(niceness())

before, go, found = niceness(), threading.Event(), []
early = threading.Thread(target=in_a_thread)
early.start()
give_way(before + 2)
give_way(0)
late = threading.Thread(target=in_a_thread)
late.start()
go.set()
early.join()
late.join()
assert found + [niceness()] == 3 * [min(before + 2, 19)], found
"""


def test_a_process_gives_way_with_all_its_threads_and_never_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", GIVES_WAY], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_one_thread_lets_others_finish_and_the_rest_of_its_process_does_not() -> None:
    found: list[int] = []

    def run() -> None:
        let_others_finish()
        found.append(os.sched_getscheduler(0))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [os.SCHED_BATCH]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
