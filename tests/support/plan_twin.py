"""The plain twin of router/plan: group by group, with numpy."""

import numpy as np
from numpy.typing import NDArray

from router.plan import GroupRows


def plan_by_groups(
    topk_idx: NDArray[np.int32], topk_weights: NDArray[np.float32], *, num_experts: int, num_groups: int
) -> list[GroupRows]:
    """What make_plan gives, for the same arguments."""
    num_tokens, top_k = topk_idx.shape
    flat_group = topk_idx.ravel() // (num_experts // num_groups)
    flat_token = np.repeat(np.arange(num_tokens), top_k)
    plan: list[GroupRows] = []
    for group in range(num_groups):
        chosen = np.flatnonzero(flat_group == group)
        if not len(chosen):
            continue
        tokens, row = np.unique(flat_token[chosen], return_inverse=True)
        weights = topk_weights.ravel()[chosen].view(np.int32)
        pairs = np.stack([row.astype(np.int32), topk_idx.ravel()[chosen], weights])
        plan.append(GroupRows(group=group, tokens=tokens, pairs=pairs))
    return plan
