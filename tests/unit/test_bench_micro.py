"""What benchmarks/bench_micro.py makes of its measurements: floors, shares, growth, tables; and how it takes times."""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.micro_batches import batches_of, compute_work, gate_work, group_batch, plan_work, trip_work
from benchmarks.micro_cells import (
    PARTS,
    Cell,
    Floor,
    Result,
    Speeds,
    Work,
    as_json,
    cells_of,
    floor_of,
    growth,
    quantiles,
)
from benchmarks.micro_report import as_markdown, as_plain, headline, speeds_of
from benchmarks.micro_timing import Task, measure, time_batches
from benchmarks.progress import Progress, duration
from benchmarks.serving_machine import Machine

SPEEDS = Speeds(bytes_per_s=10e9, flops_per_s={"bfloat16": 50e9, "float32": 100e9}, hop_s=20e-6)
MACHINE = Machine(
    cpu="A CPU", cores=2, flags=(), memory_gib=24.0, system="Linux", versions={}, commit="abc", busy_share=0.0
)


FLOOR = Floor(50e-6, 25e-6, 0.0)


def a_result(cell: Cell, *took_us: float) -> Result:
    return Result(cell=cell, took_s=tuple(us / 1e6 for us in took_us), floors=(FLOOR,) * len(took_us))


class PlayedClock:
    """Moves on only when somebody waits."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def waits(self, *seconds: float) -> Callable[[int], None]:
        """A call that takes `seconds[batch]`."""

        def call(batch: int) -> None:
            self.now_s += seconds[batch]

        return call


# Floors.


def test_a_floor_is_memory_or_products_whichever_takes_longer_and_then_the_hops():
    floor = floor_of(Work(num_bytes=1e6, flops=20e6, hops=4), "float32", SPEEDS)
    assert floor.memory_s == pytest.approx(100e-6)
    assert floor.matmul_s == pytest.approx(200e-6)
    assert floor.hops_s == pytest.approx(80e-6)
    assert floor.total_s == pytest.approx(280e-6)


def test_the_matmul_rate_is_that_of_the_cells_own_type():
    work = Work(num_bytes=0, flops=50e6)
    assert floor_of(work, "bfloat16", SPEEDS).matmul_s == pytest.approx(1e-3)
    assert floor_of(work, "float32", SPEEDS).matmul_s == pytest.approx(0.5e-3)


def test_work_without_products_needs_no_matmul_rate():
    bare = replace(SPEEDS, flops_per_s={})
    assert floor_of(Work(num_bytes=10.0), "bfloat16", bare).total_s == pytest.approx(1e-9)


def test_the_work_of_several_batches_is_their_mean():
    assert Work.mean([Work(num_bytes=1, flops=10, hops=4), Work(num_bytes=3, flops=30, hops=4)]) == Work(
        num_bytes=2, flops=20, hops=4
    )


def test_a_share_is_taken_round_by_round():
    # A machine that was half as fast in one round has half the bandwidth in that round.
    cell = Cell(part="compute", tokens=1)
    fast, slow = Floor(50e-6, 20e-6, 0.0), Floor(100e-6, 40e-6, 0.0)
    result = Result(cell=cell, took_s=(100e-6, 200e-6, 100e-6), floors=(fast, slow, fast))
    assert result.memory_share == pytest.approx((0.5, 0.5, 0.5))
    assert result.matmul_share.median == pytest.approx(0.2)
    assert result.us.median == pytest.approx(100)
    assert result.floor_us == pytest.approx(50)


def test_quantiles_are_the_median_with_the_10th_and_the_90th_percentile():
    assert quantiles([float(n) for n in range(11)]) == pytest.approx((5.0, 1.0, 9.0))


# What one call must do at least.


def test_the_bytes_of_compute_are_those_of_the_experts_in_use():
    cell = Cell(part="compute", tokens=4, dtype="float32")
    batch = group_batch(cell, batches_of(cell)[0], 0)
    work = compute_work(cell, batch)
    used = len(set(batch.pairs.expert.tolist()))
    assert work.num_bytes == used * 3 * 1024 * 192 * 4
    assert work.flops == batch.pairs.num_pairs * 2 * 3 * 1024 * 192


def test_every_token_has_its_experts_in_the_groups_together_and_local_ids_within_one():
    cell = Cell(part="compute", tokens=8)
    batch = batches_of(cell)[0]
    assert batch.num_pairs == 8 * 6
    for number, rows in enumerate(batch.plan):
        found = group_batch(cell, batch, number)
        assert found.x.shape == (len(rows.tokens), 1024)
        assert torch.equal(found.x, batch.x[torch.from_numpy(rows.tokens)])
        found.pairs.check_experts(16)
        first = rows.group * 16
        assert np.array_equal(found.pairs.expert.numpy() + first, rows.pairs[1])
        assert found.pairs.weight.min() > 0


def test_batches_are_the_same_in_every_run_and_fewer_where_they_are_large():
    cell = Cell(part="gate", tokens=2)
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(batches_of(cell), batches_of(cell)))
    assert (len(batches_of(cell)), len(batches_of(replace(cell, tokens=1024)))) == (8, 2)


def test_a_trip_moves_question_rows_partial_sums_and_answer():
    cell = Cell(part="trip", tokens=1, groups=2, hidden=512)
    batch = batches_of(cell)[0]
    groups = len(batch.plan)
    question, answer = 64 + 512 * 2 + 64 * 2, 64 + 512 * 2
    rows, partials = groups * (64 + 512 * 2) + 6 * 12, groups * (64 + 512 * 4)
    assert trip_work(cell, batch) == Work(num_bytes=question + rows + partials + answer, hops=4)
    assert gate_work(cell, batch).num_bytes == 64 * 2 + 6 * 8
    assert plan_work(cell, batch).num_bytes == 6 * 8 + groups * 8 + 6 * 12


# Times.


def test_the_time_of_a_call_is_the_mean_over_batches_of_each_ones_median():
    clock = PlayedClock()
    assert time_batches(clock.waits(1.0, 3.0), 2, 20.0, clock=clock) == pytest.approx(2.0)
    assert clock.now_s == 4 + 20  # one turn that does not count, and then five


def test_every_batch_is_called_at_least_once_however_long_it_takes():
    clock = PlayedClock()
    assert time_batches(clock.waits(5.0, 7.0), 2, 0.0, clock=clock) == pytest.approx(6.0)


def test_every_round_has_its_own_speeds_and_begins_with_another_cell():
    called: list[str] = []
    tasks = [
        Task(
            cell=Cell(part="gate", tokens=tokens),
            work=Work(num_bytes=1000),
            call=lambda batch, tokens=tokens: called.append(f"{tokens}"),
            num_batches=1,
        )
        for tokens in (1, 8)
    ]
    rates = iter((1e9, 2e9))
    said: list[str] = []
    results, speeds = measure(
        tasks, lambda: replace(SPEEDS, bytes_per_s=next(rates)), rounds=2, budget_s=0.0, say=said.append
    )
    assert called == ["1", "1", "8", "8", "8", "8", "1", "1"]  # each once more than counts
    assert [result.cell.tokens for result in results] == [1, 8]
    assert [floor.memory_s for floor in results[0].floors] == pytest.approx([1e-6, 0.5e-6])
    assert len(speeds) == len(said) == 2


# Which cells.


@pytest.mark.parametrize("part", PARTS)
def test_one_thing_is_varied_at_a_time(part: str):
    base = (4, 1024, 64)
    for cell in cells_of(part):  # type: ignore[arg-type]
        assert sum(a != b for a, b in zip(cell.setting[:3], base)) <= 1
        cell.shape.check_num_groups(cell.groups)


def test_a_quick_run_has_every_cell_that_a_goal_is_read_from():
    quick = [cell for part in PARTS for cell in cells_of(part, quick=True)]
    full = [cell for part in PARTS for cell in cells_of(part)]
    assert set(quick) < set(full)
    assert set(headline([a_result(cell, 1.0) for cell in quick])) == set(
        headline([a_result(cell, 1.0) for cell in full])
    )


# What is read from it.


def test_growth_is_paired_and_none_where_a_cell_is_missing():
    small, large = Cell(part="trip", tokens=1, groups=2), Cell(part="trip", tokens=1, groups=8)
    results = [a_result(small, 100, 200), a_result(large, 150, 300)]
    assert growth(results, small, large) == pytest.approx((1.5, 1.5, 1.5))
    assert growth(results[:1], small, large) is None


def test_the_headline_has_the_goals_figures_and_the_worst_share_of_few_tokens():
    compute = [
        a_result(Cell(part="compute", tokens=tokens), took_us) for tokens, took_us in ((1, 100), (32, 200), (1024, 50))
    ]
    trips = [a_result(Cell(part="trip", tokens=1, groups=groups), 100.0 * groups) for groups in (2, 4, 8)]
    found = headline([*compute, *trips])
    assert found == pytest.approx(
        {
            "trip_us_1": 400.0,
            "trip_growth_1": 4.0,
            "compute_memory_share_bfloat16": 0.25,  # of 32 tokens
            "compute_matmul_share_bfloat16": 0.5,  # of 1024
        }
    )


def test_the_tables_have_a_row_for_each_setting_and_a_column_for_each_number_of_tokens():
    cells = [Cell(part="trip", tokens=tokens, groups=groups) for groups in (4, 8) for tokens in (1, 32)]
    results = [a_result(cell, 100.0 * cell.groups + cell.tokens) for cell in cells]
    text = as_markdown(results, [SPEEDS], MACHINE, {"command": "`this`"})
    assert text.startswith("## Microbenchmarks\n")
    assert "memory bandwidth: 10.0 (10.0 to 10.0) GB/s" in text
    lines = [line for line in text.splitlines() if line.startswith("| 8 | 1024   | 64      | bfloat16 |")]
    assert "801 (801 to 801)" in lines[0] and "832 (832 to 832)" in lines[0]
    assert "50.0, 0.062" in lines[1]
    assert "one trip, D=4, hidden 1024, microseconds, tokens 32" in text


def test_compute_is_shown_with_both_of_its_shares():
    text = as_markdown([a_result(Cell(part="compute", tokens=8), 100)], [SPEEDS], MACHINE, {})
    assert "0.500" in text.split("Share of the memory bandwidth")[1]
    assert "0.250" in text.split("Share of the matmul rate")[1]


def test_speeds_are_named_only_where_they_were_measured():
    assert len(speeds_of([SPEEDS])) == 4
    assert list(speeds_of([Speeds(bytes_per_s=1e9, flops_per_s={})])) == ["memory bandwidth"]


def test_the_plain_values_survive_json():
    result = a_result(Cell(part="trip", tokens=1), 100, 120)
    plain = as_plain([result], [SPEEDS], MACHINE, {})
    again = json.loads(json.dumps(plain))
    assert again["headline"]["trip_us_1"] == pytest.approx(110)
    assert again["cells"] == json.loads(json.dumps(as_json([result])))
    assert again["cells"][0]["us"]["median"] == pytest.approx(110)


# Time that is left.


def test_what_is_left_is_told_from_what_each_kind_has_taken():
    clock = PlayedClock()
    progress = Progress(["short", "long", "short", "long"], clock=clock)
    assert progress.left_s is None
    clock.now_s = 1.0
    progress.done("short")
    clock.now_s = 11.0
    progress.done("long")
    assert progress.left_s == pytest.approx(11.0)
    assert str(progress) == "2 of 4, about 11 s left"


def test_a_kind_that_was_not_seen_yet_counts_as_the_mean():
    clock = PlayedClock()
    progress = Progress(["a", "b"], clock=clock)
    clock.now_s = 4.0
    progress.done("a")
    assert progress.left_s == pytest.approx(4.0)


@pytest.mark.parametrize(("seconds", "shown"), [(3.2, "3 s"), (89, "89 s"), (300, "5 min"), (4800, "1 h 20 min")])
def test_durations_are_for_people(seconds: float, shown: str):
    assert duration(seconds) == shown
