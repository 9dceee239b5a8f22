"""What an expert replica counts, and the accumulators with which every process counts.

A thread of the data plane must not spend its time on counting: it leaves a note (a tuple in a deque), and a few times
a second counts all notes at once. Accumulators have one writer, no lock, and nothing of prometheus-client.
Families are made of them when a scrape asks, on another thread, which may see a number a moment late, but never one
that goes back.
"""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from torch import Tensor  # the controller has no use for torch

# Upper bounds of buckets. A trip of the data plane takes tens of microseconds to its deadline of seconds.
SECONDS = (50e-6, 1e-4, 25e-5, 5e-4, 1e-3, 25e-4, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0)
FOLD_AFTER = 64  # notes
FOLD_EVERY_S = 0.25
MAX_NOTES = 1 << 14  # more than there can be between two ticks: it only bounds the memory of those who never tick


class Pace:
    """When notes are to be counted: many at a time, since each of them costs a tenth of what it would by itself."""

    __slots__ = ("_last_s",)

    def __init__(self) -> None:
        self._last_s = 0.0

    def is_due(self, num_notes: int, now_s: float) -> bool:
        if num_notes < FOLD_AFTER and now_s - self._last_s < FOLD_EVERY_S:
            return False
        self._last_s = now_s
        return True


class Histogram:
    """Counts by bucket."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        """bounds: ascending; a value that equals one belongs below it, as Prometheus has it."""
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)  # a list: numpy takes ten times as long for one number
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, how many up to it), the last one for all."""
        names = [*map(floatToGoString, self.bounds), "+Inf"]
        return list(zip(names, accumulate(self.counts), strict=True))


Sample = tuple[Sequence[object], "float | Histogram"]  # values of the spec's labels, in its order; the number


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric: its line in docs/metrics.md, which a test compares."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    unit: str  # of a sample's value
    meaning: str
    labels: tuple[str, ...] = ()  # beside `deployment` and `replica`, which every process's samples get

    def family(self, samples: Iterable[Sample]) -> Metric:
        """The samples as prometheus-client knows them."""
        if self.kind == "histogram":
            family = HistogramMetricFamily(self.name, self.meaning, labels=self.labels)
            for labels, value in samples:
                assert isinstance(value, Histogram)
                family.add_metric(_texts(labels), value.buckets, value.total)
            return family
        kind = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = kind(self.name, self.meaning, labels=self.labels)
        for labels, value in samples:
            assert not isinstance(value, Histogram)
            family.add_metric(_texts(labels), value)
        return family

    def one(self, value: "float | Histogram") -> Metric:
        """The family of a metric without labels."""
        return self.family([((), value)])

    def by_label(self, values: Mapping[str, int], known: Iterable[str] = ()) -> Metric:
        """The family of a metric with one label, from numbers by its value; 0 for a known value that is not there."""
        return self.family(((label,), value) for label, value in {**dict.fromkeys(known, 0), **values}.items())


counter, gauge, histogram = (partial(Spec, kind) for kind in ("counter", "gauge", "histogram"))


class Publish(Protocol):
    """Makes a collector's families part of its node's page; cluster/exporter.py does."""

    def __call__(self, member_id: str, collector: Collector) -> object:
        """member_id: as experts/member.py makes them, `deployment#replica`."""
        ...


# In more than one kind of process.
PLACEMENT_VERSION = gauge(
    "expertmesh_placement_version",
    "1",
    "Version of the placement in use; it grows with every change of the expert replicas.",
)
REFUSALS = ("handshake", "pending", "stalled", "internal", "LinkError", "FrameError")  # of experts/loop.py
LINKS_REFUSED = counter(
    "expertmesh_links_refused_total",
    "links",
    "Links of the data plane that were refused or cut, by reason.",
    ("reason",),
)

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
    "From the begin of a pass over all rows that were there until a batch of it is computed.",
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


class ServerCounts(Protocol):
    """What an ExpertServer counts by itself."""

    counts: Counter[str]
    refused: Counter[str]


class ExpertMetrics:
    """Of one expert replica; `collect` may be called on any thread, everything else on the data plane's."""

    def __init__(self, server: ServerCounts, *, group: int, held: range, layers: Iterable[int]) -> None:
        """held: global ids of the experts, in the order of the replica's weights."""
        # A note for each batch: layer, rows, experts of its pairs ([num_pairs] int32 indices into `held`, not to be
        # changed any more), seconds from the pass's begin to the batch's, seconds of computing it.
        self.batches: deque[tuple[int, int, Tensor, float, float]] = deque(maxlen=MAX_NOTES)
        self._server = server
        self._group = group
        self._held = held
        self._layers = sorted(layers)
        self._index = {layer: i for i, layer in enumerate(self._layers)}
        self._rows = [0] * len(self._layers)
        self._tokens = np.zeros((len(self._layers), len(held)), dtype=np.int64)
        self._wait = Histogram()
        self._compute = Histogram()
        self._pace = Pace()

    def tick(self, now_s: float) -> None:
        """To be called every few hundredths of a second: counts what was noted."""
        if self._pace.is_due(len(self.batches), now_s):
            self.fold()

    def fold(self) -> None:
        """Counts what was noted since the last time."""
        if not self.batches:
            return
        notes = list(self.batches)
        self.batches.clear()
        for layer, num_rows, _, wait_s, compute_s in notes:
            self._rows[self._index[layer]] += num_rows
            self._wait.observe(wait_s)
            self._compute.observe(compute_s)
        experts = [expert.numpy() for _, _, expert, _, _ in notes]
        layer_idx = np.repeat([self._index[note[0]] for note in notes], [len(expert) for expert in experts])
        slot = layer_idx * len(self._held) + np.concatenate(experts)
        self._tokens += np.bincount(slot, minlength=self._tokens.size).reshape(self._tokens.shape)

    def collect(self) -> Iterable[Metric]:
        group = self._group
        yield EXPERT_TOKENS.family(
            ((group, layer, expert), tokens)
            for layer, by_expert in zip(self._layers, self._tokens.tolist(), strict=True)
            for expert, tokens in zip(self._held, by_expert, strict=True)
        )
        yield EXPERT_ROWS.family(((group, layer), rows) for layer, rows in zip(self._layers, self._rows, strict=True))
        yield WAIT_SECONDS.family([((group,), self._wait)])
        yield COMPUTE_SECONDS.family([((group,), self._compute)])
        yield NACKS.family([((group,), self._server.counts["nacks"])])
        yield LINKS_REFUSED.by_label(dict(self._server.refused), REFUSALS)


def _texts(labels: Sequence[object]) -> list[str]:
    return [str(label) for label in labels]
