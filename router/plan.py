"""From experts to rows: which rows of a step each expert group gets, with the experts that it applies to them."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


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
    num_tokens, top_k = topk_idx.shape
    flat_expert = topk_idx.ravel()
    flat_group = flat_expert // (num_experts // num_groups)
    flat_token = np.repeat(np.arange(num_tokens), top_k)
    flat_weight = topk_weights.ravel().view(np.int32)
    plan: list[GroupRows] = []
    for group in range(num_groups):
        chosen = np.flatnonzero(flat_group == group)
        if not len(chosen):
            continue
        token = flat_token[chosen]
        first = np.empty(len(token), dtype=bool)  # tokens are ascending: a new value begins a new row
        first[0] = True
        np.not_equal(token[1:], token[:-1], out=first[1:])
        pairs = np.empty((3, len(chosen)), dtype=np.int32)
        np.subtract(np.cumsum(first), 1, out=pairs[0], casting="unsafe")
        pairs[1] = flat_expert[chosen]
        pairs[2] = flat_weight[chosen]
        plan.append(GroupRows(group=group, tokens=token[first], pairs=pairs))
    return plan


def count_rows(plan: list[GroupRows]) -> int:
    """R: how often any token visits any group."""
    return sum(len(rows.tokens) for rows in plan)
