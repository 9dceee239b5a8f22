"""OpenMP's helpers sleep while they are parked, and compute before and afterwards."""

import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from cluster.helper_threads import HelperThreads


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def busy_ticks() -> int:
    """CPU time of all threads but this one, in hundredths of a second."""
    own = threading.get_native_id()
    total = 0
    for thread in map(int, os.listdir("/proc/self/task")):
        if thread != own:
            with open(f"/proc/self/task/{thread}/stat") as stat:
                total += sum(map(int, stat.read().rpartition(")")[2].split()[11:13]))
    return total


def multiply_for_a_while(x: torch.Tensor) -> torch.Tensor:
    product, deadline_s = x @ x, time.monotonic() + 0.5
    while time.monotonic() < deadline_s:
        product = x @ x
    return product


def test_parked_helpers_use_no_core_and_the_caller_computes_alone() -> None:
    x = torch.randn(600, 600)
    expected = x @ x
    helpers = HelperThreads()
    with helpers.parked():
        before = busy_ticks()
        alone = multiply_for_a_while(x)
        used = busy_ticks() - before
    # Spinning, or helping, the two would have used up to a hundred; other threads of this process may use a little.
    assert used < 10
    torch.testing.assert_close(alone, expected)


def test_they_compute_again_afterwards_also_after_an_error() -> None:
    x = torch.randn(600, 600)
    expected = x @ x
    helpers = HelperThreads()
    for _ in range(200):
        with helpers.parked():
            pass
    with pytest.raises(ZeroDivisionError), helpers.parked():
        raise ZeroDivisionError
    before = busy_ticks()
    torch.testing.assert_close(multiply_for_a_while(x), expected)
    assert busy_ticks() - before > 10


def test_one_thread_has_none() -> None:
    torch.set_num_threads(1)
    with HelperThreads().parked():
        assert torch.ones(3).sum() == 3
