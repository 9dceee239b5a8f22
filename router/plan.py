"""From experts to rows: which rows of a step each expert group gets, with the experts that it applies to them."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from experts.compiled import compiled
from router.plan_kernels import fill_plan


class GroupRows(NamedTuple):
    """What one expert group has to do for one layer of one step."""

    group: int
    tokens: NDArray[np.int64]  # [num_rows] token of each row, ascending
    pairs: NDArray[np.int32]  # [3, num_pairs]: row, global expert id, float32 weight (as bits), row-major

    @property
    def num_pairs(self) -> int:
        return self.pairs.shape[1]


def make_plan(
    topk_idx: NDArray[np.int32], topk_weights: NDArray[np.float32], *, num_experts: int, num_groups: int
) -> list[GroupRows]:
    """One entry per expert group that any token visits, ascending by group.

    topk_idx: [num_tokens, top_k] global expert ids, ascending within a token (router/gate.py).
    topk_weights: [num_tokens, top_k].

    A token is one row per group it visits, however many of the group's experts it uses, so it travels once.
    """
    num_pairs = topk_idx.size
    tokens = np.empty(num_pairs, np.int64)
    pairs = np.empty(3 * num_pairs, np.int32)
    row_begin, pair_begin = np.empty(num_groups + 1, np.int64), np.empty(num_groups + 1, np.int64)
    compiled(fill_plan)(
        topk_idx, topk_weights.view(np.int32), num_experts // num_groups, tokens, pairs, row_begin, pair_begin
    )
    rows, ends = row_begin.tolist(), pair_begin.tolist()
    return [
        GroupRows(group, tokens[rows[group] : rows[group + 1]], pairs[3 * ends[group] : 3 * end].reshape(3, -1))
        for group, end in enumerate(ends[1:])
        if end > ends[group]
    ]


def count_rows(plan: list[GroupRows]) -> int:
    """R: how often any token visits any group."""
    return sum(len(rows.tokens) for rows in plan)
