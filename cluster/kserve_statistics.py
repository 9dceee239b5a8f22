"""What ModelStatistics tells of one gateway replica: counts and durations, since its start, in plain memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Durations:
    """How often something took place, and how long that was together."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns


class Stopwatch:
    """One inference on its way."""

    def __init__(self) -> None:
        self.began_ns = self.input_ended_ns = time.monotonic_ns()

    def input_is_read(self) -> None:
        """It is checked and tokenised, and goes to the engine."""
        self.input_ended_ns = time.monotonic_ns()


@dataclass(slots=True)
class Statistics:
    """Used from one event loop. Whatever has no whole answer has failed, and that is also what the client left."""

    success: Durations = field(default_factory=Durations)
    fail: Durations = field(default_factory=Durations)
    compute_input: Durations = field(default_factory=Durations)  # of the successful ones, as the next
    compute_infer: Durations = field(default_factory=Durations)
    last_inference_ms: int = 0  # on the wall clock; 0: there was none

    @contextmanager
    def inference(self) -> Iterator[Stopwatch]:
        """Counts one inference by how the block ends."""
        watch = Stopwatch()
        self.last_inference_ms = time.time_ns() // 1_000_000
        try:
            yield watch
        except BaseException:
            self.fail.add(time.monotonic_ns() - watch.began_ns)
            raise
        ended_ns = time.monotonic_ns()
        self.success.add(ended_ns - watch.began_ns)
        self.compute_input.add(watch.input_ended_ns - watch.began_ns)
        self.compute_infer.add(ended_ns - watch.input_ended_ns)
