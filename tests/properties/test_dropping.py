"""Token dropping beside its brute-force twin, and what holds of it whatever the plan."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from router.drop import drop_rows
from router.plan import GroupRows, make_plan

CHECKED = settings(deadline=None, derandomize=True, max_examples=150)
Row = tuple[int, tuple[tuple[int, int], ...]]  # token, its pairs at the group: (expert, bits of the weight)


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[GroupRows], int]:
    """A plan and its number of groups; few different weights, so that ties abound, and some experts in favour."""
    num_groups, per_group = draw(st.sampled_from([(1, 8), (2, 6), (4, 4), (8, 2)]))
    num_experts, num_tokens = num_groups * per_group, draw(st.integers(1, 24))
    top_k = draw(st.integers(1, min(6, num_experts)))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    favour = rng.integers(0, 3, num_experts)
    topk_idx = np.argsort(-(rng.random((num_tokens, num_experts)) + favour), axis=1)[:, :top_k]
    values = np.array(draw(st.sampled_from([[0.25], [0.1, 0.2, 0.3], [1e-7, 1.0, 0.3, 0.0]])), dtype=np.float32)
    weights = rng.choice(values, (num_tokens, top_k))
    idx = np.sort(topk_idx, axis=1).astype(np.int32)
    return make_plan(idx, weights, num_experts=num_experts, num_groups=num_groups), num_groups


factors = st.one_of(
    st.sampled_from([5e-324, 0.1, 0.5, 1.0, 1.1, 1.25, 2.0, 1e308]), st.floats(0.01, 9, allow_nan=False)
)


def rows_of(rows: GroupRows) -> list[Row]:
    found: list[list[tuple[int, int]]] = [[] for _ in rows.tokens]
    for row, expert, bits in rows.pairs.T.tolist():
        found[row].append((expert, bits))
    return [(token, tuple(pairs)) for token, pairs in zip(rows.tokens.tolist(), found, strict=True)]


def affinity_of(row: Row) -> np.float32:
    total = np.float32(0)
    for _, bits in row[1]:
        total = np.float32(total + np.int32(bits).view(np.float32))
    return total


def budget_of(plan: list[GroupRows], factor: float, num_groups: int) -> float:
    mean = factor * sum(len(rows_of(rows)) for rows in plan) / num_groups
    return mean if math.isinf(mean) else max(math.ceil(mean), 1)


def twin(plan: list[GroupRows], factor: float, num_groups: int) -> tuple[list[tuple[int, list[Row]]], int]:
    """Takes away the worst row, the later one of equals, until each group is within its budget."""
    budget = budget_of(plan, factor, num_groups)
    found, dropped = [], 0
    for rows in plan:
        left = rows_of(rows)
        while len(left) > budget:
            left.remove(min(left, key=lambda row: (affinity_of(row), -row[0])))
            dropped += 1
        found.append((rows.group, left))
    return found, dropped


@CHECKED
@given(case=plans(), factor=factors)
def test_what_is_kept_and_counted_is_what_the_twin_keeps_and_counts(
    case: tuple[list[GroupRows], int], factor: float
) -> None:
    plan, num_groups = case
    kept, dropped = drop_rows(plan, capacity_factor=factor, num_groups=num_groups)
    assert ([(rows.group, rows_of(rows)) for rows in kept], dropped) == twin(plan, factor, num_groups)


@CHECKED
@given(case=plans(), factor=factors)
def test_no_group_exceeds_its_budget_and_none_within_it_is_touched(
    case: tuple[list[GroupRows], int], factor: float
) -> None:
    plan, num_groups = case
    budget = budget_of(plan, factor, num_groups)
    kept, dropped = drop_rows(plan, capacity_factor=factor, num_groups=num_groups)
    assert dropped == sum(len(rows.tokens) for rows in plan) - sum(len(rows.tokens) for rows in kept)
    for before, after in zip(plan, kept, strict=True):
        if len(before.tokens) <= budget:
            assert after is before
        else:
            assert len(after.tokens) == budget >= 1
            assert set(rows_of(after)) < set(rows_of(before))


@CHECKED
@given(case=plans(), factor=factors)
def test_what_is_left_is_a_plan_that_can_be_sent(case: tuple[list[GroupRows], int], factor: float) -> None:
    plan, num_groups = case
    for rows in drop_rows(plan, capacity_factor=factor, num_groups=num_groups)[0]:
        assert (np.diff(rows.tokens) > 0).all() and rows.tokens.dtype == np.int64
        assert sorted(set(rows.pairs[0].tolist())) == list(range(len(rows.tokens)))
        keys = rows.pairs[0].astype(np.int64) * 10_000 + rows.pairs[1]
        assert (np.diff(keys) > 0).all()
        assert rows.pairs.dtype == np.int32 and rows.pairs.flags.c_contiguous


@CHECKED
@given(case=plans())
def test_a_factor_of_the_number_of_groups_drops_nothing(case: tuple[list[GroupRows], int]) -> None:
    plan, num_groups = case
    kept, dropped = drop_rows(plan, capacity_factor=float(num_groups), num_groups=num_groups)
    assert dropped == 0 and all(after is before for before, after in zip(plan, kept, strict=True))


@CHECKED
@given(case=plans(), factor=factors)
def test_no_more_is_dropped_than_an_answer_frame_can_say(case: tuple[list[GroupRows], int], factor: float) -> None:
    plan, num_groups = case
    num_rows = 1 + max(int(rows.tokens[-1]) for rows in plan)  # tokens of the question
    top_k = sum(rows.num_pairs for rows in plan) // num_rows
    assert drop_rows(plan, capacity_factor=factor, num_groups=num_groups)[1] <= (num_rows - 1) * top_k
