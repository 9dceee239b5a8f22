"""What an expert replica counts."""

from collections import Counter, deque
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from prometheus_client import Metric
from torch import Tensor

from experts.counting import LINKS_REFUSED, REFUSALS, Histogram, counter, histogram, taken

EXPERT_TOKENS = counter(
    "expertmesh_expert_tokens_total",
    "tokens",
    "Tokens that an expert has computed, by its global id.",
    ("group", "layer", "expert"),
)
EXPERT_ROWS = counter(
    "expertmesh_expert_rows_total",
    "rows",
    "Rows that the replica has computed; a token is one row, however many of the group's experts it uses.",
    ("group", "layer"),
)
WAIT_SECONDS = histogram(
    "expertmesh_expert_wait_seconds",
    "seconds",
    "From the begin of a pass over all rows that were there until the computing of a batch begins.",
    ("group",),
)
COMPUTE_SECONDS = histogram(
    "expertmesh_expert_compute_seconds",
    "seconds",
    "Computing the experts of one batch; the sum is the time in which the replica was busy.",
    ("group",),
)
NACKS = counter(
    "expertmesh_nacks_total",
    "frames",
    "ROWS frames that the replica sent back: it does not hold what they ask for, or could not compute it.",
    ("group",),
)


class BatchNote(NamedTuple):
    """One batch that was computed."""

    layer: int
    num_rows: int
    expert: Tensor  # [num_pairs] int32, indices into the replica's experts; never changed any more
    wait_s: float  # from the pass's begin to the batch's
    compute_s: float


class ServerNotes(Protocol):
    """What an ExpertServer notes and counts by itself."""

    counts: Counter[str]
    refused: Counter[str]
    batch_notes: deque[BatchNote]


class ExpertMetrics:
    """Of one expert replica; `fold` is called on one thread, `collect` on any."""

    def __init__(self, server: ServerNotes, *, group: int, held: range, layers: Iterable[int]) -> None:
        """held: global ids of the experts, in the order of the replica's weights."""
        self._server = server
        self._group = group
        self._held = held
        self._layers = sorted(layers)
        self._index = {layer: i for i, layer in enumerate(self._layers)}
        self._rows = np.zeros(len(self._layers), dtype=np.int64)
        self._tokens = np.zeros((len(self._layers), len(held)), dtype=np.int64)
        self._wait = Histogram()
        self._compute = Histogram()

    def fold(self, now_s: float) -> None:
        """Counts what was noted since the last time."""
        for notes in taken(self._server.batch_notes, lambda note: note.expert.shape[0]):
            self._count(notes)

    def collect(self) -> Iterable[Metric]:
        group = self._group
        yield EXPERT_TOKENS.family(
            ((group, layer, expert), tokens)
            for layer, by_expert in zip(self._layers, self._tokens.tolist(), strict=True)
            for expert, tokens in zip(self._held, by_expert, strict=True)
        )
        yield EXPERT_ROWS.family(
            ((group, layer), rows) for layer, rows in zip(self._layers, self._rows.tolist(), strict=True)
        )
        yield WAIT_SECONDS.family([((group,), self._wait)])
        yield COMPUTE_SECONDS.family([((group,), self._compute)])
        yield NACKS.family([((group,), self._server.counts["nacks"])])
        yield LINKS_REFUSED.by_label(dict(self._server.refused), REFUSALS)

    def _count(self, notes: list[BatchNote]) -> None:
        layers, num_rows, experts, waits, computes = zip(*notes, strict=True)
        self._wait.observe_all(waits)
        self._compute.observe_all(computes)
        layer_idx = [self._index[layer] for layer in layers]
        self._rows += np.bincount(layer_idx, num_rows, len(self._layers)).astype(np.int64)
        slot = np.repeat(layer_idx, [expert.shape[0] for expert in experts]) * len(self._held)
        slot += torch.cat(experts).numpy()
        self._tokens += np.bincount(slot, minlength=self._tokens.size).reshape(self._tokens.shape)
