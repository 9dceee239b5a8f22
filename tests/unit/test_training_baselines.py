"""The figures that a trained model is held against: the counts agree with plain ones, and are probabilities."""

import lzma
import math
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("transformers")

from training.baselines import ngram_bits_per_byte, ngram_probabilities, xz_bits_per_byte
from training.tokenizer import BOS

VOCAB_SIZE = 7


def random_tokens(seed: int, count: int) -> NDArray[np.uint16]:
    # Half of the draws are one token, so that long contexts repeat.
    rng = np.random.default_rng(seed)
    return np.where(rng.random(count) < 0.5, 3, rng.integers(0, VOCAB_SIZE, count)).astype(np.uint16)


def plain_counts(train: list[int], length: int, order: int) -> Counter[tuple[int, ...]]:
    """How often each run of `length` tokens was seen, or, below the order, after how many different tokens."""
    if length == order:
        return Counter(tuple(train[i : i + length]) for i in range(len(train) - length + 1))
    return Counter(run[1:] for run in plain_counts(train, length + 1, order))


def plain_discount(count: int, counts: Counter[tuple[int, ...]]) -> float:
    n1, n2, n3, n4 = (sum(value == times for value in counts.values()) for times in (1, 2, 3, 4))
    if n1 and n2 and n3:
        y = n1 / (n1 + 2 * n2)
        fitted = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        if min(fitted) > 0:
            return fitted[min(count, 3) - 1]
    return 0.5 if count == 1 else 0.75


def plain_probability(train: list[int], context: tuple[int, ...], token: int, order: int) -> float:
    """The formula as the docstring has it, with counts in dictionaries."""
    shorter = plain_probability(train, context[1:], token, order) if context else 1 / VOCAB_SIZE
    counts = plain_counts(train, len(context) + 1, order)
    after = {run: count for run, count in counts.items() if run[:-1] == context}
    if not after:
        return shorter
    own = after.get((*context, token), 0)
    left = own - plain_discount(own, counts) if own else 0
    taken = sum(plain_discount(count, counts) for count in after.values())
    return (left + taken * shorter) / sum(after.values())


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("train_size", [5, 60, 400])
def test_probabilities_are_those_of_plain_counting(order: int, train_size: int) -> None:
    train, tokens = random_tokens(0, train_size), random_tokens(1, 30)
    listed = [int(token) for token in tokens]
    expected = [
        plain_probability(train.tolist(), tuple(listed[max(i - order + 1, 0) : i]), token, order)
        for i, token in enumerate(listed)
    ]
    got = ngram_probabilities(train, tokens, vocab_size=VOCAB_SIZE, order=order)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("train_size", [0, 3, 200])
@pytest.mark.parametrize("seed", range(5))
def test_after_any_context_the_probabilities_sum_to_one(train_size: int, seed: int) -> None:
    train, context = random_tokens(0, train_size), random_tokens(seed, 4)
    total = sum(
        ngram_probabilities(train, np.append(context, token), vocab_size=VOCAB_SIZE, order=5)[-1]
        for token in range(VOCAB_SIZE)
    )
    assert total == pytest.approx(1, rel=1e-12)


def test_the_largest_tokens_of_a_full_vocabulary_keep_their_bits() -> None:
    train = np.full(50, 4095, dtype=np.uint16)
    assert ngram_probabilities(train, train, vocab_size=4096, order=5)[-1] > 0.99


def test_a_run_that_does_not_fit_into_an_integer_is_refused() -> None:
    with pytest.raises(ValueError, match="order=6 tokens of 12 bits"):
        ngram_probabilities(random_tokens(0, 9), random_tokens(0, 9), vocab_size=4096, order=6)


def test_without_training_text_every_predicted_token_costs_the_whole_vocabulary() -> None:
    held_out = np.array([BOS, 4, 5, 2, BOS, 6, 2], dtype=np.uint16)
    bits = ngram_bits_per_byte(np.empty(0, dtype=np.uint16), held_out, num_bytes=10, vocab_size=VOCAB_SIZE)
    assert bits == pytest.approx(5 * math.log2(VOCAB_SIZE) / 10)  # the two <s> are given


def test_text_like_the_training_text_costs_less() -> None:
    train = np.tile(np.array([BOS, 3, 4, 5, 6, 2], dtype=np.uint16), 20)
    alike, other = train[:6], np.array([BOS, 6, 5, 4, 3, 2], dtype=np.uint16)
    costs = [ngram_bits_per_byte(train, text, num_bytes=4, vocab_size=VOCAB_SIZE) for text in (alike, other)]
    assert costs[0] < 0.5 < 2 < costs[1]


def test_the_compressor_is_given_all_texts_as_one() -> None:
    texts = ["To be, or not to be. " * 20, "ÄÖÜ"]
    data = "".join(texts).encode()
    assert xz_bits_per_byte(texts) == 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
    assert xz_bits_per_byte([texts[0], texts[0]]) < xz_bits_per_byte([texts[0]])
