"""Work of low priority beside those who serve."""

import os
import threading

import pytest

from experts.gently import NICENESS, gently, give_way


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


def test_who_gives_way_does_so_with_the_threads_it_starts_and_never_goes_back() -> None:
    found: list[int] = []

    def engine() -> None:
        give_way(niceness() + 2)
        give_way(0)
        computes = threading.Thread(target=lambda: found.append(niceness()))
        computes.start()
        computes.join()

    before = niceness()
    thread = threading.Thread(target=engine)
    thread.start()
    thread.join()
    assert found == [min(before + 2, 19)] and niceness() == before
