"""Whether the held-out text is new to the model: how much of it stands word for word in the training text."""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from training.text import Document


def shared_passages(documents: Sequence[Document], *, num_words: int = 20) -> dict[str, float]:
    """For each held-out document, the share of its runs of `num_words` words that a training document has too.

    Case and punctuation do not count.
    Runs are compared by a 64-bit hash; among some millions of them a false match is less likely than one in a million.
    """
    vocabulary: dict[str, int] = {}
    multipliers = np.random.default_rng(0).integers(1, 1 << 63, num_words, dtype=np.uint64) | np.uint64(1)
    hashes = {document.name: _hash_runs(_words(document, vocabulary), multipliers) for document in documents}
    known = np.unique(_join(hashes[document.name] for document in documents if not document.held_out))
    return {
        document.name: float(np.isin(hashes[document.name], known).mean()) if len(hashes[document.name]) else 0.0
        for document in documents
        if document.held_out
    }


def _words(document: Document, vocabulary: dict[str, int]) -> NDArray[np.uint64]:
    """[num_words] a number for each word; new words are added to `vocabulary`."""
    words = re.findall(r"[^\W_]+", document.text.lower())
    return np.array([vocabulary.setdefault(word, len(vocabulary) + 1) for word in words], dtype=np.uint64)


def _hash_runs(words: NDArray[np.uint64], multipliers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """[num_words - len(multipliers) + 1] one hash for each run of len(multipliers) words; sums wrap around."""
    num_runs = max(len(words) - len(multipliers) + 1, 0)
    total = np.zeros(num_runs, dtype=np.uint64)
    for offset, multiplier in enumerate(multipliers):
        total += words[offset : offset + num_runs] * multiplier
    return total


def _join(parts: Iterable[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    return np.concatenate([np.empty(0, dtype=np.uint64), *parts])
