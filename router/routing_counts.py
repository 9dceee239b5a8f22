"""What a gate decides, in numbers: tokens by expert, rows by group, and how even both are.

Counts are exact, of every token. The affinities of the balance factors are not among what the gate hands out, so they
are taken from a sample of its logits: one question in SAMPLE_EVERY, and of that at most SAMPLE_TOKENS.
"""

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experts.counting import MAX_NOTES, taken
from experts.shape import MoEShape
from experts.wire import DType

if TYPE_CHECKING:
    from router.dispatch import Gate

WINDOW_S = 60.0  # of the gauges
MARK_EVERY_S = 5.0
SAMPLE_EVERY = 127  # a prime, so that all layers have their turn whatever their number (but for a multiple of it)
SAMPLE_TOKENS = 64


class LayerSums(NamedTuple):
    """Sums over tokens, by MoE layer; float64, in which whole numbers are exact up to 2^53."""

    tokens: NDArray[np.float64]  # [num_layers]
    selected: NDArray[np.float64]  # [num_layers, num_experts] tokens that select each expert
    rows: NDArray[np.float64]  # [num_layers, num_groups] tokens that visit each group
    sampled: NDArray[np.float64]  # [num_layers] tokens that the sample stands for
    scores: NDArray[np.float64]  # [num_layers, num_experts] their affinities; those of one token add up to 1


class RoutingCounts:
    """Counts what a gate decides.

    The counted gate is the data plane's; `fold` and `move_window` are called on one other thread, all else on any.
    """

    def __init__(self, shape: MoEShape, *, num_groups: int, sample_every: int = SAMPLE_EVERY) -> None:
        self.layers = shape.moe_layers
        self.fanout = np.zeros(num_groups + 1, dtype=np.int64)  # tokens by the number of groups that they visit
        self.num_groups = num_groups
        # A model group lies within one expert group, so a token visits no more expert groups than model groups.
        self.max_groups = min(shape.topk_group if shape.num_model_groups > 1 else shape.top_k, num_groups)
        self._shape = shape
        self._index = {layer: i for i, layer in enumerate(self.layers)}
        # All sums side by side, so that a mark of the window is one copy.
        self._sheet = np.zeros((len(self.layers), 2 + 2 * shape.num_experts + num_groups))
        self._sums = self._parts(self._sheet)
        # By layer, the experts of each question. A tuple round them would be work for the garbage collector.
        self._notes: dict[int, deque[NDArray[np.int32]]] = {layer: deque(maxlen=MAX_NOTES) for layer in self.layers}
        self._samples: deque[tuple[int, int, NDArray[np.generic]]] = deque(maxlen=MAX_NOTES // SAMPLE_EVERY)
        self._sample_every = sample_every
        self._until_sample = 1
        self._marks = deque([(float("-inf"), self._sheet.copy())])

    def counted(self, gate: "Gate") -> "Gate":
        """The same gate, whose decisions are counted: topk_idx must ascend within a token, and never change again."""

        def count_and_route(
            layer: int, logits: NDArray[np.generic], dtype: DType, scale: float
        ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
            routing = gate(layer, logits, dtype, scale)
            self._notes[layer].append(routing[0])
            self._until_sample -= 1
            if not self._until_sample:
                self._until_sample = self._sample_every
                # Copied: the buffer is written again.
                self._samples.append((layer, len(logits), logits[:: -(-len(logits) // SAMPLE_TOKENS)].copy()))
            return routing

        return count_and_route

    def fold(self) -> None:
        """Counts what was noted since the last time."""
        for i, layer in enumerate(self.layers):
            for notes in taken(self._notes[layer], lambda topk_idx: topk_idx.size):
                self._count(i, notes)
        for samples in taken(self._samples, lambda sample: sample[2].size):
            for sample in samples:
                self._sample(*sample)

    def move_window(self, now_s: float) -> None:
        """To be called every second at least; now_s on any clock that only grows."""
        if now_s - self._marks[-1][0] >= MARK_EVERY_S:
            self._marks.append((now_s, self._sheet.copy()))
            while self._marks[1][0] <= now_s - WINDOW_S:
                self._marks.popleft()

    @property
    def sums(self) -> LayerSums:
        """Since the router's start."""
        return self._parts(self._sheet.copy())

    @property
    def in_window(self) -> LayerSums:
        """In the last WINDOW_S, or up to MARK_EVERY_S more; since the start where that is less."""
        return self._parts(self._sheet - self._marks[0][1])

    def _count(self, i: int, notes: list[NDArray[np.int32]]) -> None:
        """notes: of the i-th layer."""
        num_experts, num_groups = self._shape.num_experts, self.num_groups
        # One row for each choice and not for each token: numpy is several times faster along tokens.
        chosen = np.concatenate(notes).T.copy()  # [top_k, num_tokens]
        group = chosen // (num_experts // num_groups)
        another = group[1:] != group[:-1]  # experts ascend: another group than before is one more that is visited
        self._sums.tokens[i] += chosen.shape[1]
        self._sums.selected[i] += np.bincount(chosen.ravel(), minlength=num_experts)
        self._sums.rows[i] += np.bincount(group[0], minlength=num_groups)
        self._sums.rows[i] += np.bincount(group[1:][another], minlength=num_groups)
        self.fanout += np.bincount(1 + another.sum(axis=0, dtype=np.int32), minlength=num_groups + 1)

    def _sample(self, layer: int, num_tokens: int, logits: NDArray[np.generic]) -> None:
        """logits: of some of the num_tokens tokens of a question."""
        scores = affinities(logits, scoring=self._shape.scoring)
        scores = scores[np.isfinite(scores).all(axis=1)]  # a token without finite scores has none
        if len(scores):
            # Every question counts by its tokens, not by how many of them were looked at.
            i = self._index[layer]
            self._sums.sampled[i] += num_tokens
            self._sums.scores[i] += scores.sum(axis=0, dtype=np.float64) * (num_tokens / len(scores))

    def _parts(self, sheet: NDArray[np.float64]) -> LayerSums:
        num_experts, num_groups = self._shape.num_experts, self.num_groups
        rows_end = 2 + num_experts + num_groups
        return LayerSums(
            tokens=sheet[:, 0],
            sampled=sheet[:, 1],
            selected=sheet[:, 2 : 2 + num_experts],
            rows=sheet[:, 2 + num_experts : rows_end],
            scores=sheet[:, rows_end:],
        )


def affinities(logits: NDArray[np.generic], *, scoring: str) -> NDArray[np.float32]:
    """[num_tokens, num_experts] that add up to 1 for a token, as the balance factors want them: softmax, or sigmoid
    over its sum (DeepSeek-V3, 2.1.2); NaN where logits are not finite.

    logits: float32, float16, or uint16 for the bits of bfloat16.
    """
    values = (logits.astype(np.uint32) << 16).view(np.float32) if logits.dtype == np.uint16 else logits
    values = values.astype(np.float32)
    with np.errstate(all="ignore"):
        if scoring == "softmax":
            scores = np.exp(values - values.max(axis=1, keepdims=True))
        else:
            scores = 1 / (1 + np.exp(-values))
        return scores / scores.sum(axis=1, keepdims=True)


def balance_factors_of(sums: LayerSums, *, max_groups: int) -> dict[str, NDArray[np.float64]]:
    """By level, [num_layers]: router/balance.py's three factors, from sums; NaN where a layer has no tokens.

    Equal to them where the sample is of all tokens.
    """
    num_layers, num_experts = sums.selected.shape
    num_groups = sums.rows.shape[1]
    with np.errstate(all="ignore"):
        f = sums.selected * (num_experts / sums.selected.sum(axis=1, keepdims=True))
        p = sums.scores / sums.sampled[:, None]
        f_communication = sums.rows * (num_groups / (max_groups * sums.tokens[:, None]))
    f_device = f.reshape(num_layers, num_groups, -1).mean(axis=2)
    p_device = p.reshape(num_layers, num_groups, -1).sum(axis=2)
    return {
        "expert": (f * p).sum(axis=1),
        "device": (f_device * p_device).sum(axis=1),
        "communication": (f_communication * p_device).sum(axis=1),
    }


def balancedness_of(load: NDArray[np.float64]) -> NDArray[np.float64]:
    """[num_layers]: mean over maximum of load [num_layers, n]; NaN where there is none."""
    with np.errstate(all="ignore"):
        return load.mean(axis=1) / load.max(axis=1)
