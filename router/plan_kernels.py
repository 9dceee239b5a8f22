"""The compiled halves of plan and combine: single passes over a step's pairs and rows.

One file on purpose: numba compiles a cached function again when its own file changes, and looks at no other.
"""

import numpy as np


def fill_plan(
    topk_idx,  # [num_tokens, top_k] int32, global expert ids, ascending within a token
    weight_bits,  # [num_tokens, top_k] int32, the bits of float32 weights
    experts_per_group,
    tokens,  # out, [num_pairs] int64: the rows of each group behind those of the group before it
    pairs,  # out, [3 * num_pairs] int32: of each group its rows, then its experts, then its weights
    row_begin,  # out, [num_groups + 1] int64: where each group begins in `tokens`
    pair_begin,  # out, [num_groups + 1] int64: how many pairs the groups before it have
):
    """Sorts the pairs of a step by expert group; within a group they stay in the order of tokens and experts."""
    num_tokens, top_k = topk_idx.shape
    num_groups = len(row_begin) - 1
    last_token = np.full(num_groups, -1, np.int64)
    row_begin[:] = 0
    pair_begin[:] = 0
    for token in range(num_tokens):
        for choice in range(top_k):
            group = topk_idx[token, choice] // experts_per_group
            pair_begin[group + 1] += 1
            if last_token[group] != token:
                last_token[group] = token
                row_begin[group + 1] += 1
    for group in range(num_groups):
        row_begin[group + 1] += row_begin[group]
        pair_begin[group + 1] += pair_begin[group]
    next_pair = pair_begin[:-1].copy()
    next_row = row_begin[:-1].copy()
    last_token[:] = -1
    for token in range(num_tokens):
        for choice in range(top_k):
            expert = topk_idx[token, choice]
            group = expert // experts_per_group
            if last_token[group] != token:
                last_token[group] = token
                tokens[next_row[group]] = token
                next_row[group] += 1
            size = pair_begin[group + 1] - pair_begin[group]
            at = 2 * pair_begin[group] + next_pair[group]
            pairs[at] = next_row[group] - row_begin[group] - 1
            pairs[at + size] = expert
            pairs[at + 2 * size] = weight_bits[token, choice]
            next_pair[group] += 1
    return 0


def add_rows(
    y,  # in and out, [num_tokens, hidden_size] float32
    tokens,  # [num_rows] int64, each at most once
    partial,  # [num_rows, hidden_size] float32
):
    """y[tokens] += partial."""
    for row in range(len(tokens)):
        token = tokens[row]
        for column in range(y.shape[1]):
            y[token, column] += partial[row, column]
    return 0
