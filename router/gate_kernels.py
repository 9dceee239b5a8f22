"""The compiled half of router/gate_fast: one pass over the logits of a batch, without the GIL.

A row is decided here only if it would be decided the same whatever torch's last bits are; otherwise it is left open.
One file on purpose: numba compiles a cached function again when its own file changes, and looks at no other.
"""

import numpy as np
from numba import njit

# How a choice is made, as plain numbers for compiled code: by logits; by softmax or sigmoid scores in float32.
PLAIN, SOFTMAX, SIGMOID = 0, 1, 2

_MINUS_INF, _ZERO, _ONE = np.float32(-np.inf), np.float32(0.0), np.float32(1.0)
_FLOOR = np.float32(-87.0)  # e^-87 is nearly the smallest normal float32
_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)  # few bits, so that n * high is exact
_LN2_LOW = np.float32(-2.12194440e-4)
# Adding 1.5 * 2^23 rounds a small float32 to a whole number and leaves that number in the low bits.
_ROUNDER = np.float32(12582912.0)
_C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(1 / f) for f in (2, 6, 24, 120, 720, 5040))
_SMALLEST_WEIGHT = np.float32(1e-34)  # far above where float32 loses precision
_SMALLEST_ROUNDED = np.float32(6.2e-5)  # just above where float16 does
# A float32 score is off by at most 2^-22 of itself, in torch as here: exp by two units of the last place, its sum and
# the division by one each. With a bias, a sum of two is off by 2^-21, and comparing two of those, theirs and ours, sees
# four such errors, 2^-19. Twice that, to be safe. Without, the rounding of exp's argument grows with its size.
_MARGIN = np.float32(2.0**-18)
# Below e^-80 float32 scores run out of bits, and experts that differ in logits get equal scores.
_DEEPEST = np.float32(80.0)

_compiled = njit(nogil=True, error_model="numpy")


def route_rows(
    values,  # [num_tokens, num_experts] float32, read-only
    bias,  # [num_experts] float32, read-only; used by SIGMOID
    biased,  # whether a bias was given
    kind,  # PLAIN, SOFTMAX or SIGMOID
    num_groups,
    topk_group,
    renormalise,
    rounded_bits,  # low bits of a weight that are rounded away; 0 for none
    scale,  # float32
    settle_ties,  # whether torch.topk breaks ties as _settle does
    topk_idx,  # out, [num_tokens, top_k] int32
    topk_weights,  # out, [num_tokens, top_k] float32
    unclear,  # out, [num_tokens] bool: rows left open; what the other outputs hold there means nothing
):
    """Routes every row whose choice is certain; returns the number of rows left open."""
    num_tokens, num_experts = values.shape
    top_k = topk_idx.shape[1]
    group_size = num_experts // num_groups
    scores = np.empty(num_experts, np.float32)
    choice = np.empty(num_experts, np.float32)
    group_scores = np.empty(num_groups, np.float32)
    whole = np.zeros(1, np.int32)  # the groups themselves are one group to choose from
    groups = np.empty(num_groups + 1, np.int32)
    experts = np.empty(num_experts + 1, np.int32)
    best = np.empty(num_experts + 1, np.float32)
    num_unclear = 0
    for token in range(num_tokens):
        # With bias the scores decide, without it the logits: the order is the same, and their differences are exact.
        if kind == SIGMOID:
            total, top = _sigmoid_and_choice(values[token], bias, scores, choice)
        else:
            for i in range(num_experts):
                choice[i] = values[token, i]
            total, top = _exp_and_max(choice, scores)
        clear = np.isfinite(total)
        if clear and topk_group < num_groups:
            _rate_groups(choice, biased, group_scores)
            clear = _choose(group_scores, whole, 1, num_groups, topk_group, top, kind, settle_ties, best, groups)
        elif clear:
            for i in range(num_groups):
                groups[i] = i
        if clear:
            clear = _choose(choice, groups, topk_group, group_size, top_k, top, kind, settle_ties, best, experts)
        if clear:
            for i in range(top_k):
                topk_idx[token, i] = experts[i]
            clear = _weigh(scores, total, kind, renormalise, rounded_bits, scale, experts, topk_weights[token])
        unclear[token] = not clear
        num_unclear += not clear
    return num_unclear


@_compiled
def _choose(choice, groups, num_open, group_size, k, top, kind, settle_ties, best, ids):
    """Fills ids[:k], ascending, with the best k inside the first num_open of `groups`; False if it is not certain."""
    _best_in(choice, groups, num_open, group_size, k, best, ids)
    clear = _is_above(best[k - 1], best[k], top, kind)
    # Two equal logits have equal softmax scores; equal sums with a bias prove nothing of the sort.
    if settle_ties and kind != SIGMOID and best[k - 1] == best[k]:
        clear = _settle(choice, groups, num_open, group_size, k, top, kind, best, ids)
    for i in range(1, k):
        value, at = ids[i], i
        while at > 0 and ids[at - 1] > value:
            ids[at] = ids[at - 1]
            at -= 1
        ids[at] = value
    return clear


@_compiled
def _is_above(high, low, top, kind):
    """Whether torch's score for `high` is certainly above that for `low`; False for any NaN."""
    gap = high - low
    if kind == PLAIN:
        return gap > _ZERO
    if kind == SIGMOID:
        return gap > _MARGIN * max(_ONE, top)
    depth = top - high
    return depth < _DEEPEST and gap > _MARGIN * max(_ONE, depth)


@_compiled
def _best_in(choice, groups, num_open, group_size, k, best, ids):
    """The k + 1 highest of the open groups, highest first, into best and ids; -inf where there are not so many."""
    for i in range(k + 1):
        best[i] = _MINUS_INF
    for g in range(num_open):
        for i in range(groups[g] * group_size, (groups[g] + 1) * group_size):
            value = choice[i]
            if value > best[k]:
                at = k
                while at > 0 and value > best[at - 1]:
                    best[at], ids[at] = best[at - 1], ids[at - 1]
                    at -= 1
                best[at], ids[at] = value, i


@_compiled
def _settle(choice, groups, num_open, group_size, k, top, kind, queue, ids):
    """Fills ids[:k] as torch.topk does where equal values compete for the last places; False if it is not certain.

    torch.topk(sorted=False) leaves ties to the C++ library's quickselect, whose outcome depends on which comparisons
    say "greater" and on nothing else: take the same steps, and give up at a comparison that rounding could turn.
    """
    size = choice.size
    if k * 64 <= size:
        return False  # torch takes another algorithm for so few out of so many
    for i in range(size):
        queue[i], ids[i] = _MINUS_INF, i  # -inf: a closed group
    for g in range(num_open):
        for i in range(groups[g] * group_size, (groups[g] + 1) * group_size):
            queue[i] = choice[i]
            if queue[i] == _MINUS_INF:
                return False
    first, last, rounds = 0, size, 0
    while last - first > 3:
        rounds += 1
        if 2 << (rounds // 2) > size:
            return False  # after 2 log2(size) rounds the library changes its algorithm, too
        cut = _split(queue, ids, first, last, top, kind)
        if cut < 0:
            return False
        first, last = (cut, last) if cut < k else (first, cut)
    for i in range(first + 1, last):
        at = i
        while at > first and queue[at] > queue[at - 1]:
            queue[at], queue[at - 1] = queue[at - 1], queue[at]
            ids[at], ids[at - 1] = ids[at - 1], ids[at]
            at -= 1
        if at > first and _is_open(queue[at - 1], queue[at], top, kind):
            return False
    return True


@_compiled
def _split(queue, ids, first, last, top, kind):
    """One round of quickselect: moves the median of three to `first`, and what is above it before the returned cut.

    Returns -1 if a comparison is not certain.
    """
    low, middle, high = first + 1, first + (last - first) // 2, last - 1
    a, b, c = queue[low], queue[middle], queue[high]
    if _is_open(a, b, top, kind) or _is_open(b, c, top, kind) or _is_open(a, c, top, kind):
        return -1
    if a > b:
        median = middle if b > c else high if a > c else low
    else:
        median = low if a > c else high if b > c else middle
    queue[first], queue[median] = queue[median], queue[first]
    ids[first], ids[median] = ids[median], ids[first]
    pivot = queue[first]
    for i in range(first + 1, last):
        if _is_open(queue[i], pivot, top, kind):
            return -1
    left, right = first + 1, last
    while True:
        while queue[left] > pivot:
            left += 1
        right -= 1
        while pivot > queue[right]:
            right -= 1
        if left >= right:
            return left
        queue[left], queue[right] = queue[right], queue[left]
        ids[left], ids[right] = ids[right], ids[left]
        left += 1


@_compiled
def _is_open(a, b, top, kind):
    """Whether rounding could decide between two values that differ; -inf marks what is closed, for certain."""
    if a == b or a == _MINUS_INF or b == _MINUS_INF:  # noqa: SIM109  (numba)
        return False
    return not _is_above(max(a, b), min(a, b), top, kind)


@_compiled
def _rate_groups(choice, biased, group_scores):
    """A group is worth its best expert, or with bias its best two."""
    size = choice.size // group_scores.size
    for group in range(group_scores.size):
        first = second = _MINUS_INF
        for i in range(group * size, (group + 1) * size):
            value = choice[i]
            if value > first:
                first, second = value, first
            elif value > second:
                second = value
        group_scores[group] = first + second if biased else first


@_compiled
def _exp_and_max(x, scores):
    """scores = exp(x - max); returns (sum of scores, max); the sum is NaN if x has a NaN or +inf, or only -inf."""
    top = _MINUS_INF
    for i in range(x.size):
        top = max(top, x[i])
    _exp_all(x, top, scores)
    return _sum(scores), top


@_compiled
def _sigmoid_and_choice(x, bias, scores, choice):
    """scores = sigmoid(x), choice = scores + bias; returns (sum of choice, largest absolute choice)."""
    for i in range(x.size):
        choice[i] = -abs(x[i])
    _exp_all(choice, _ZERO, scores)
    top = _ZERO
    for i in range(x.size):
        e = scores[i]
        scores[i] = (e if x[i] < _ZERO else _ONE) / (_ONE + e)
        choice[i] = scores[i] + bias[i]
        top = max(top, abs(choice[i]))
    return _sum(choice), top


@_compiled
def _weigh(scores, total, kind, renormalise, rounded_bits, scale, experts, weights):
    """Fills one token's weights; False where torch's may differ by more than rounding errors."""
    chosen = _ZERO
    for i in range(weights.size):
        weights[i] = scores[experts[i]]
        chosen += weights[i]
        if weights[i] < _SMALLEST_WEIGHT:
            return False
    # A sigmoid has no divisor unless renormalised, a softmax always one.
    divisor = chosen if renormalise else total if kind == SOFTMAX else _ONE
    for i in range(weights.size):
        weights[i] = weights[i] / divisor * scale
    if rounded_bits == 0:
        return True
    bits = weights.view(np.int32)
    half = 1 << (rounded_bits - 1)
    for i in range(weights.size):
        rest = bits[i] & (2 * half - 1)
        # So near the middle of two roundings, the last bits would decide.
        if abs(rest - half) <= 16 or weights[i] < _SMALLEST_ROUNDED:
            return False
        bits[i] += (2 * half if rest > half else 0) - rest
    return True


@njit(nogil=True, error_model="numpy", fastmath={"reassoc"})
def _sum(x):
    total = _ZERO
    for i in range(x.size):
        total += x[i]
    return total


@_compiled
def _exp_all(x, top, out):
    """out[i] = exp(x[i] - top) for arguments up to 0, within two units of the last place; NaN stays NaN."""
    bits = out.view(np.int32)
    for i in range(x.size):
        d = max(x[i] - top, _FLOOR)
        out[i] = d * _LOG2_E + _ROUNDER
    for i in range(x.size):
        d = max(x[i] - top, _FLOOR)
        n = out[i] - _ROUNDER
        r = (d - n * _LN2_HIGH) - n * _LN2_LOW
        p = _C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * (_C6 + r * _C7))))
        p = _ONE + (r + r * r * p)
        bits[i] = (bits[i] + 127) << 23  # 2^n
        out[i] *= p
