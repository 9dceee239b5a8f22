"""OpenMP's helpers sleep while they are parked, and compute before and afterwards."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cluster.helper_threads import HelperThreads

# In a process of its own: other tests leave threads behind whose time would be counted, too.
MEASURE = """
import os, threading, time
import sentencepiece  # brings an OpenMP of its own, as in every engine that has loaded a tokenizer
import torch
from cluster.helper_threads import HelperThreads

def busy_ticks():
    own, total = threading.get_native_id(), 0
    for thread in map(int, os.listdir("/proc/self/task")):
        if thread != own:
            with open(f"/proc/self/task/{thread}/stat") as stat:
                total += sum(map(int, stat.read().rpartition(")")[2].split()[11:13]))
    return total

def multiply_for_a_while(x):
    before, deadline_s = busy_ticks(), time.monotonic() + 0.5
    while time.monotonic() < deadline_s:
        product = x @ x
    return busy_ticks() - before, product

torch.set_num_threads(3)
x = torch.randn(600, 600)
helpers = HelperThreads()
helped, expected = multiply_for_a_while(x)
with helpers.parked():
    alone, product = multiply_for_a_while(x)
torch.testing.assert_close(product, expected)
again, _ = multiply_for_a_while(x)
print(helped, alone, again)
"""


def test_parked_helpers_use_no_core_and_compute_again_afterwards() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    helped, alone, again = map(int, done.stdout.split())  # hundredths of a second of the two helpers
    assert alone < 5 < helped
    assert again > 5


def test_an_error_ends_the_parking() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        helpers, x = HelperThreads(), torch.ones(600, 600)
        for _ in range(200):
            with helpers.parked():
                pass
        with pytest.raises(ZeroDivisionError), helpers.parked():
            raise ZeroDivisionError
        assert (x @ x == 600).all()
    finally:
        torch.set_num_threads(before)


def test_one_thread_has_none() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with HelperThreads().parked():
        assert torch.ones(3).sum() == 3
    torch.set_num_threads(before)
