"""What the nano model has to beat on held-out text: a compressor that learns nothing, and counts of token runs.

Both are bits per byte of UTF-8, so that they compare with each other and with a model over any tokenizer.
"""

import lzma
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.tokenizer import BOS


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits that `xz -9e` needs for a byte of the texts, one after another. It has seen nothing but these texts."""
    data = "".join(texts).encode("utf-8")
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def ngram_bits_per_byte(
    train_tokens: NDArray[np.integer],
    held_out_tokens: NDArray[np.integer],
    num_bytes: int,
    vocab_size: int,
    order: int = 5,
) -> float:
    """Bits per byte of the held-out text under a model of runs of `order` tokens, counted in the training tokens.

    train_tokens, held_out_tokens: [num_tokens], documents one after another, each `<s>` ... `</s>`.
    num_bytes: UTF-8 bytes of the held-out documents.

    `<s>` is given and not predicted; every other token counts, the `</s>` of each document too.
    """
    probabilities = ngram_probabilities(train_tokens, held_out_tokens, vocab_size=vocab_size, order=order)
    return float(-np.log2(probabilities[held_out_tokens != BOS]).sum() / num_bytes)


def ngram_probabilities(
    train_tokens: NDArray[np.integer], tokens: NDArray[np.integer], *, vocab_size: int, order: int
) -> NDArray[np.float64]:
    """[num_tokens] the probability of each token after the up to order - 1 tokens before it.

    Interpolated modified Kneser-Ney smoothing (Chen and Goodman, 1998): a run hw of context h and token w counts c(hw),
    less a discount d(hw) that depends on c(hw) alone, and the shorter context shares out what was taken:
    p(w | h) = (c(hw) - d(hw) + sum over v of d(hv) * p(w | h without its first token)) / sum over v of c(hv).
    c is how often the run was seen where it has `order` tokens, and after how many different tokens where it has fewer.
    Below the single tokens, p is uniform. Raises ValueError where a run of `order` tokens does not fit into 63 bits.
    """
    bits = (vocab_size - 1).bit_length()
    if bits * order > 63:
        raise ValueError(f"{order=} tokens of {bits} bits do not fit into 63 bits")
    probabilities = np.full(len(tokens), 1 / vocab_size)
    for table in _count_runs(train_tokens, order, bits):
        wanted = _pack_runs(tokens, table.length, bits)
        total = _look_up(table.contexts, table.total, wanted >> bits)
        taken = _look_up(table.contexts, table.taken, wanted >> bits)
        left = _look_up(table.runs, table.left, wanted)
        shorter = probabilities[table.length - 1 :]
        # A context that was never seen says nothing: the shorter one stands.
        np.divide(left + taken * shorter, total, out=shorter, where=total > 0)
    return probabilities


class _RunCounts(NamedTuple):
    """The runs of one length, as packed numbers, and their contexts: the runs without the last token."""

    length: int
    runs: NDArray[np.int64]  # [num_runs] ascending
    left: NDArray[np.float64]  # [num_runs] count less discount
    contexts: NDArray[np.int64]  # [num_contexts] ascending
    total: NDArray[np.float64]  # [num_contexts] sum of the counts of a context's runs
    taken: NDArray[np.float64]  # [num_contexts] sum of their discounts


def _count_runs(tokens: NDArray[np.integer], order: int, bits: int) -> list[_RunCounts]:
    """One table for each length, shortest first."""
    tables: list[_RunCounts] = []
    seen = _pack_runs(tokens, order, bits)
    for length in range(order, 0, -1):
        runs, counts = np.unique(seen, return_counts=True)
        discounts = _discounts(counts)[np.minimum(counts, 3) - 1]
        # Ascending runs are in order of their contexts too, so a context is a stretch of them.
        contexts, starts = np.unique(runs >> bits, return_index=True)
        tables.append(
            _RunCounts(length, runs, counts - discounts, contexts, _add_up(counts, starts), _add_up(discounts, starts))
        )
        seen = runs & ((1 << bits * (length - 1)) - 1)  # without the first token: once for each token before it
    return tables[::-1]


def _discounts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """[3] what a count of 1, of 2, and of 3 or more loses, from how many runs are counted once, ... four times."""
    once, twice, thrice, four_times = (int((counts == times).sum()) for times in (1, 2, 3, 4))
    if once and twice and thrice:
        share = once / (once + 2 * twice)
        fitted = np.array(
            [1 - 2 * share * twice / once, 2 - 3 * share * thrice / twice, 3 - 4 * share * four_times / thrice]
        )
        if (fitted > 0).all():
            return fitted
    return np.array([0.5, 0.75, 0.75])  # so little text says nothing about discounts; any between 0 and 1 will do


def _add_up(values: NDArray[np.int64] | NDArray[np.float64], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """[num_starts] the sum of each stretch of values."""
    return np.add.reduceat(values.astype(np.float64), starts) if len(starts) else np.empty(0)


def _pack_runs(tokens: NDArray[np.integer], length: int, bits: int) -> NDArray[np.int64]:
    """[max(num_tokens - length + 1, 0)] each run of `length` tokens as one number, its last token lowest."""
    num_runs = max(len(tokens) - length + 1, 0)
    packed = np.zeros(num_runs, dtype=np.int64)
    for offset in range(length):
        packed = (packed << bits) | tokens[offset : offset + num_runs].astype(np.int64)
    return packed


def _look_up(keys: NDArray[np.int64], values: NDArray[np.float64], wanted: NDArray[np.int64]) -> NDArray[np.float64]:
    """[num_wanted] the value of each wanted key, 0 where it is not among the (ascending) keys."""
    if not len(keys):
        return np.zeros(len(wanted))
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0.0)
