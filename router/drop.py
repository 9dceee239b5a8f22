"""Token dropping (DeepSeek-V2, 2.2.4), only where a capacity factor is set: no group computes more than its budget."""

import math

import numpy as np

from router.plan import GroupRows, count_rows


def drop_rows(plan: list[GroupRows], *, capacity_factor: float, num_groups: int) -> tuple[list[GroupRows], int]:
    """The plan without the rows that exceed the budgets of their groups, and how many those were.

    capacity_factor: above 0. num_groups: D, counting the groups that nobody visits.

    A group's budget is ceil(capacity_factor * R / D) of the plan's R rows, so every group keeps at least one.
    Beyond it the rows of lowest affinity go, of equal ones the later token first; a row's affinity is the sum of its
    weights at this group.
    What is left keeps its weights: a dropped row's contribution is missing, and nothing else changes.
    """
    num_rows = count_rows(plan)
    budget = _budget(num_rows, capacity_factor, num_groups)
    kept = [rows if len(rows.tokens) <= budget else _best(rows, budget) for rows in plan]
    return kept, num_rows - count_rows(kept)


def _budget(num_rows: int, capacity_factor: float, num_groups: int) -> int:
    # No group can have more than all rows, and a factor near the largest float would overflow an int.
    return max(math.ceil(min(capacity_factor * num_rows / num_groups, num_rows)), 1)


def _best(rows: GroupRows, budget: int) -> GroupRows:
    """The `budget` rows of highest affinity, in their old order and counted anew."""
    affinity = np.zeros(len(rows.tokens), dtype=np.float32)
    np.add.at(affinity, rows.pairs[0], rows.pairs[2].view(np.float32))  # pair by pair; add.reduce would sum by halves
    chosen = np.zeros(len(rows.tokens), dtype=bool)
    chosen[np.argsort(-affinity, kind="stable")[:budget]] = True  # stable: of equals the earlier token is kept
    pairs = rows.pairs.compress(chosen[rows.pairs[0]], axis=1)
    pairs[0] = (np.cumsum(chosen) - 1)[pairs[0]]
    return GroupRows(group=rows.group, tokens=rows.tokens[chosen], pairs=pairs)
