"""Counting, as every process does it: accumulators, notes for them, and the metrics that come of it.

A thread of the data plane must not spend its time on counting: it leaves a note (a tuple in a deque), and twice a
second another thread counts all of them (`Counting`). Accumulators have one writer, no lock, and nothing of
prometheus-client. Families are made of them when a scrape asks, on a third thread, which may see a number a moment
late, but never one that goes back.
"""

import logging
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from operator import add
from typing import Literal, Protocol, TypeVar

import numpy as np
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

log = logging.getLogger(__name__)

T = TypeVar("T")

# Upper bounds of buckets. A trip of the data plane takes tens of microseconds to its deadline of seconds.
SECONDS = (50e-6, 1e-4, 25e-5, 5e-4, 1e-3, 25e-4, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0)
FOLD_EVERY_S = 0.5
FOLD_NOTES, FOLD_PAIRS = 256, 1 << 12  # counted at a time: tens of microseconds until the data plane may go on
MAX_NOTES = 1 << 14  # more than there can be in FOLD_EVERY_S: it only bounds the memory where nobody counts


class Counting(threading.Thread):
    """Counts what was noted, twice a second until `stop`."""

    def __init__(self, fold: Callable[[float], None]) -> None:
        """fold: is given the time, on time.monotonic()."""
        super().__init__(name="counting", daemon=True)
        self._fold = fold
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(FOLD_EVERY_S):
            try:
                self._fold(time.monotonic())
            except Exception as error:  # a bug in what only counts must not end all counting
                log.exception("not counted", exc_info=error)

    def stop(self) -> None:
        """Ends the thread once it has counted what it is counting."""
        self._stopped.set()
        if self.is_alive():
            self.join()


def taken(notes: deque[T], num_pairs: Callable[[T], int] = lambda _: 0) -> Iterator[list[T]]:
    """What was noted so far, out of the deque, some at a time; in between, the data plane may run.

    num_pairs: of a note that has pairs, by which it is work.
    """
    left = len(notes)
    while left > 0:
        some: list[T] = []
        size = 0
        while left > 0 and len(some) < FOLD_NOTES and size < FOLD_PAIRS:
            some.append(notes.popleft())
            size += num_pairs(some[-1])
            left -= 1
        yield some
        time.sleep(0)  # lets go of the interpreter: a thread that wants it would wait for milliseconds otherwise


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

    def observe_all(self, values: Sequence[float]) -> None:
        """The same for many, in one go."""
        added = np.bincount(np.searchsorted(self.bounds, values), minlength=len(self.counts)).tolist()
        self.counts = list(map(add, self.counts, added))
        self.total += sum(values)

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


def _texts(labels: Sequence[object]) -> list[str]:
    return [str(label) for label in labels]
