"""Plans by hand: small enough to be read, and the corners that hypothesis would find by luck."""

import numpy as np

from router.plan import make_plan


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
