"""How busy a replica says it is: a share of the time, an average that forgets, and one sum however many share it."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.load import LoadMeter, ReplicaLoad, pair_flops

CHECKED = settings(deadline=None, derandomize=True, max_examples=80)


def meter(*, window_s: float = 10.0, flops_per_pair: float = 1.0) -> LoadMeter:
    return LoadMeter(flops_per_pair=flops_per_pair, window_s=window_s, now_s=0.0)


def worked(share: float, *, until_s: float, step_s: float = 0.1, pairs_per_step: int = 0) -> LoadMeter:
    """A meter of a replica that works for `share` of each step, at the step's begin."""
    made = meter()
    for step in range(round(until_s / step_s)):
        made.add(step * step_s, (step + share) * step_s, pairs_per_step)
    return made


def test_a_replica_that_never_rests_is_fully_busy() -> None:
    assert worked(1.0, until_s=100).read(100.0).busy_share == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.7])
def test_busy_share_is_the_share_of_the_time(share: float) -> None:
    assert worked(share, until_s=100).read(100.0).busy_share == pytest.approx(share, abs=0.005)


def test_what_was_a_window_ago_counts_for_1_over_e() -> None:
    made = meter(window_s=10.0)
    made.add(0.0, 10.0, 0)
    assert made.read(10.0).busy_share == pytest.approx(1 - math.exp(-1))
    assert made.read(20.0).busy_share == pytest.approx((1 - math.exp(-1)) * math.exp(-1))


def test_without_work_the_load_falls_to_nothing_and_reading_changes_nothing() -> None:
    made = worked(0.8, until_s=100, pairs_per_step=7)
    before = made.read(100.0)
    assert made.read(1000.0).busy_share < 1e-30
    assert made.read(1000.0).flops_per_s < 1e-30
    assert made.read(100.0) == before


def test_a_read_with_an_earlier_time_than_the_last_work_is_the_newest_load() -> None:
    made = worked(0.5, until_s=100)
    assert made.read(50.0) == made.read(99.95)


def test_cost_is_pairs_times_the_flops_of_one_pair_per_second() -> None:
    made = LoadMeter(flops_per_pair=pair_flops(hidden_size=256, moe_intermediate_size=96), window_s=5.0, now_s=0.0)
    for step in range(1000):
        made.add(step * 0.1, step * 0.1 + 0.01, 20)
    assert made.read(100.0).flops_per_s == pytest.approx(200 * 6 * 256 * 96, rel=0.02)


def test_a_copy_that_takes_over_half_of_the_work_leaves_the_groups_sum_as_it_was() -> None:
    old, new = worked(0.8, until_s=100), LoadMeter(flops_per_pair=1.0, window_s=10.0, now_s=100.0)
    for step in range(1000, 1400):
        old.add(step * 0.1, (step + 0.4) * 0.1, 0)
        new.add(step * 0.1, (step + 0.4) * 0.1, 0)
        now_s = (step + 1) * 0.1
        assert old.read(now_s).busy_share + new.read(now_s).busy_share == pytest.approx(0.8, abs=0.01)
    assert new.read(140.0).busy_share == pytest.approx(0.4, abs=0.01)


def test_a_window_has_a_length() -> None:
    with pytest.raises(ValueError, match=r"window_s=0\.0 must be above 0"):
        meter(window_s=0.0)


def test_serve_is_told_plain_numbers() -> None:
    assert ReplicaLoad(busy_share=0.5, flops_per_s=2e9).stats() == {"busy_share": 0.5, "flops_per_s": 2e9}
    assert {type(value) for value in meter().read(1.0).stats().values()} == {float}


times = st.floats(0, 1000)


@CHECKED
@given(intervals=st.lists(st.tuples(times, times, st.integers(0, 10**6)), max_size=30), read_s=times)
def test_a_share_stays_between_0_and_1_whatever_the_clock_does(
    intervals: list[tuple[float, float, int]], read_s: float
) -> None:
    made = meter()
    for begin_s, end_s, num_pairs in intervals:
        made.add(begin_s, end_s, num_pairs)
    load = made.read(read_s)
    assert 0 <= load.busy_share <= 1 and load.flops_per_s >= 0


@CHECKED
@given(cuts=st.lists(st.floats(0, 50), min_size=1, max_size=10))
def test_an_interval_counts_the_same_in_one_piece_or_in_many(cuts: list[float]) -> None:
    whole, pieces = meter(), meter()
    whole.add(0.0, 50.0, 0)
    edges = [0.0, *sorted(cuts), 50.0]
    for begin_s, end_s in pairwise(edges):
        pieces.add(begin_s, end_s, 0)
    assert pieces.read(60.0).busy_share == pytest.approx(whole.read(60.0).busy_share)


@CHECKED
@given(shares=st.lists(st.floats(0, 1), min_size=1, max_size=30), more=st.integers(0, 29))
def test_more_work_is_never_less_load(shares: list[float], more: int) -> None:
    little, much = meter(), meter()
    for step, share in enumerate(shares):
        little.add(step, step + share, 1)
        much.add(step, step + (1.0 if step == more else share), 2)
    now_s = float(len(shares))
    assert much.read(now_s).busy_share >= little.read(now_s).busy_share - 1e-12
    assert much.read(now_s).flops_per_s >= little.read(now_s).flops_per_s
