"""Freed memory stays with an engine's process, so that the next step does not fault it in again."""

import subprocess
import sys
from pathlib import Path

# In a process of its own: what the heap of another test looks like is not known.
MEASURE = """
import resource
import torch
from cluster.engine_memory import keep_freed_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.zeros(2 << 20) for _ in range(12)]  # 8 MiB each
    del activations
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def most_faults():
    return max(faults_of_a_step() for _ in range(5))

faults_of_a_step()
before = most_faults()
keep_freed_memory()
faults_of_a_step()
print(before, most_faults())
"""


def test_the_second_step_faults_no_page_in_that_the_first_one_had() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    before, kept = map(int, done.stdout.split())
    assert kept < 100
    assert before > 10 * kept  # otherwise there is nothing to keep, and the module can go
