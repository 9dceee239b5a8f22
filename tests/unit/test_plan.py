"""Plans by hand: small enough to be read, and the corners that hypothesis would find by luck."""

import numpy as np

from router.drop import drop_rows
from router.plan import GroupRows, make_plan


def plan_of(
    topk_idx: list[list[int]], *, num_experts: int = 8, num_groups: int = 4
) -> list[tuple[int, list[int], list[list[int]]]]:
    idx = np.array(topk_idx, dtype=np.int32)
    weights = np.arange(idx.size, dtype=np.float32).reshape(idx.shape)
    plan = make_plan(idx, weights, num_experts=num_experts, num_groups=num_groups)
    return [
        (
            rows.group,
            rows.tokens.tolist(),
            [[*map(int, pair[:2]), int(pair[2:].view(np.float32)[0])] for pair in rows.pairs.T],
        )
        for rows in plan
    ]


def test_a_token_that_uses_two_experts_of_a_group_is_one_row_of_it() -> None:
    assert plan_of([[0, 1, 6]]) == [(0, [0], [[0, 0, 0], [0, 1, 1]]), (3, [0], [[0, 6, 2]])]


def test_rows_count_inside_their_group_and_name_their_tokens() -> None:
    assert plan_of([[0, 2], [2, 3], [1, 7]]) == [
        (0, [0, 2], [[0, 0, 0], [1, 1, 4]]),
        (1, [0, 1], [[0, 2, 1], [1, 2, 2], [1, 3, 3]]),
        (3, [2], [[0, 7, 5]]),
    ]


def test_groups_that_nobody_visits_have_no_entry() -> None:
    assert [group for group, _, _ in plan_of([[4, 5], [4, 5]])] == [2]


def test_one_group_gets_every_token_once() -> None:
    ((group, tokens, pairs),) = plan_of([[0, 7], [3, 4]], num_groups=1)
    assert (group, tokens, len(pairs)) == (0, [0, 1], 4)


def test_weights_travel_as_their_exact_bits() -> None:
    weights = np.array([[np.nan, -0.0, 1e-45]], dtype=np.float32)
    (rows,) = make_plan(np.array([[0, 1, 2]], dtype=np.int32), weights, num_experts=4, num_groups=1)
    assert rows.pairs[2].tobytes() == weights.tobytes()


def test_a_plan_is_ready_to_be_sent() -> None:
    for rows in make_plan(np.array([[0, 5]], dtype=np.int32), np.ones((1, 2), np.float32), num_experts=8, num_groups=4):
        assert rows.pairs.dtype == np.int32 and rows.pairs.flags.c_contiguous
        assert rows.num_pairs == 1


def crowded(weights: list[list[float]]) -> list[GroupRows]:
    """Every token visits group 0 of 2 with two experts, and the last token group 1 with a third one."""
    idx = np.array([[0, 1, 2]] * (len(weights) - 1) + [[0, 1, 4]], dtype=np.int32)
    return make_plan(idx, np.array(weights, dtype=np.float32), num_experts=8, num_groups=2)


def test_beyond_a_groups_budget_the_lowest_sums_of_weights_go_and_of_equal_ones_the_later_token() -> None:
    plan = crowded([[1, 1, 2], [3, 0, 0], [1, 2, 0], [9, 9, 9]])  # sums at group 0: 4, 3, 3, 18; 5 rows
    kept, dropped = drop_rows(plan, capacity_factor=1.0, num_groups=2)
    assert dropped == 1
    assert kept[0].tokens.tolist() == [0, 1, 3]
    assert kept[0].pairs[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert kept[0].pairs[2].view(np.float32).tolist() == [1, 1, 2, 3, 0, 0, 9, 9]
    assert kept[1] is plan[1]


def test_groups_that_nobody_visits_count_for_the_mean() -> None:
    plan = make_plan(np.zeros((8, 1), np.int32), np.ones((8, 1), np.float32), num_experts=4, num_groups=4)
    kept, dropped = drop_rows(plan, capacity_factor=1.25, num_groups=4)
    assert (kept[0].tokens.tolist(), dropped) == ([0, 1, 2], 5)


def test_a_group_always_keeps_its_best_row() -> None:
    kept, dropped = drop_rows(crowded([[1, 1, 1], [5, 5, 5], [2, 2, 2]]), capacity_factor=1e-300, num_groups=2)
    assert ([rows.tokens.tolist() for rows in kept], dropped) == ([[1], [2]], 2)


def test_affinities_are_added_pair_by_pair_in_float32() -> None:
    # 1 is lost when it is added to 2**24, and is not when the ones are added first.
    ones_last, ones_first = [2.0**24] + [1.0] * 8, [1.0] * 8 + [2.0**24]
    plan = make_plan(
        np.tile(np.arange(9, dtype=np.int32), (2, 1)),
        np.array([ones_last, ones_first], np.float32),
        num_experts=9,
        num_groups=1,
    )
    kept, _ = drop_rows(plan, capacity_factor=0.5, num_groups=1)
    assert kept[0].tokens.tolist() == [1]
