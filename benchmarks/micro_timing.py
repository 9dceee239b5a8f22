"""Interleaved rounds: in each the machine's speeds, then every cell once, so that disturbances fall on all alike."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.micro_cells import Cell, Floor, Result, Speeds, Work, floor_of
from benchmarks.progress import Progress

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """How a cell is measured."""

    cell: Cell
    work: Work
    call: Callable[[int], object]  # with the number of one of the batches
    num_batches: int


def measure(
    tasks: Sequence[Task], probe: Callable[[], Speeds], *, rounds: int, budget_s: float, say: Callable[[str], None]
) -> tuple[list[Result], list[Speeds]]:
    """One result per task, in their order, and the speeds of each round.

    budget_s: time for the calls of one cell in one round, exceeded where they are longer.
    """
    took_s: list[list[float]] = [[] for _ in tasks]
    floors: list[list[Floor]] = [[] for _ in tasks]
    speeds: list[Speeds] = []
    progress = Progress([task.cell.part for task in tasks] * rounds)
    for index in range(rounds):
        gc.collect()  # not in the middle of what is measured
        speeds.append(probe())
        # Every round begins elsewhere, so that no cell always follows the same one.
        first = index * len(tasks) // rounds
        for number in (*range(first, len(tasks)), *range(first)):
            task = tasks[number]
            took_s[number].append(time_batches(task.call, task.num_batches, budget_s))
            floors[number].append(floor_of(task.work, task.cell.dtype, speeds[-1]))
            progress.done(task.cell.part)
        say(f"round {index + 1}/{rounds}: {progress}")
    results = [
        Result(cell=task.cell, took_s=tuple(took), floors=tuple(floor))
        for task, took, floor in zip(tasks, took_s, floors)
    ]
    return results, speeds


def time_batches(
    call: Callable[[int], object], num_batches: int, budget_s: float, *, clock: Clock = time.perf_counter
) -> float:
    """Seconds of one call: the median for each batch, and the mean over the batches, since their work differs.

    All batches are called in turn until the budget is used up, at least once each after a turn that does not count.
    """
    for batch in range(num_batches):
        call(batch)
    times: list[list[float]] = [[] for _ in range(num_batches)]
    end_s = clock() + budget_s
    while not times[-1] or clock() < end_s:
        for batch in range(num_batches):
            began_s = clock()
            call(batch)
            times[batch].append(clock() - began_s)
    return statistics.fmean(statistics.median(many) for many in times)
