"""The step that an engine is computing: its deadline, whether it has been poisoned, and what was left out of it.

An exception inside a layer would kill vLLM's engine and every request in it (docs/adr/0004).
So a layer that cannot be computed returns zeros and poisons the step, and the scheduler of the same process
ends exactly the requests of that step before a token of theirs leaves.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Trip:
    """One layer's way to the experts and back, in a step that is traced."""

    layer: int
    num_rows: int
    begun_ns: int  # on time.time_ns()
    ended_ns: int
    dispatch_s: float  # until the question had left
    wait_s: float  # for the answer, once the engine's own work on the layer was done


class StepTracer(Protocol):
    """Says which steps are traced, and hears of them."""

    def gap(self) -> int:
        """How many steps from here the next one is traced; 1: the very next."""
        ...

    def on_step(self, begun_ns: int, trips: Sequence[Trip], reason: str | None) -> None:
        """A traced step has ended. trips: at least one. reason: why it is poisoned, or None."""
        ...


class Step:
    """One per engine process: steps follow each other, they do not overlap."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._deadline_s: float | None = None
        self.dropped_rows = 0  # that the router left out of this step's answers, see router.capacity_factor
        self.trips: list[Trip] | None = None  # of this step's layers, where it is traced
        self._tracer: StepTracer | None = None
        self._until_traced = 0  # steps; below 0 where none will be
        self._begun_ns = 0  # of a step that is traced

    def trace_with(self, tracer: StepTracer) -> None:
        """From now on the steps that `tracer` picks are traced."""
        self._tracer = tracer
        self._until_traced = tracer.gap()

    def begin(self) -> None:
        """A new step is scheduled; nothing is left of the one before."""
        self._clear()
        self._until_traced -= 1
        if self._until_traced == 0:
            self._begin_trace()

    def deadline_s(self, timeout_s: float) -> float:
        """When this step has to be over, on time.monotonic(): `timeout_s` after its first layer asked."""
        if self._deadline_s is None:
            self._deadline_s = time.monotonic() + timeout_s
        return self._deadline_s

    @property
    def poisoned(self) -> bool:
        return self._reason is not None

    def poison(self, reason: str) -> None:
        """The step's numbers are wrong from here on; the first reason is kept."""
        if self._reason is None:
            self._reason = reason

    def take(self) -> str | None:
        """Why the step is poisoned, or None; the next step begins clean."""
        reason = self._reason
        if self.trips and self._tracer is not None:  # a step without tokens has no trips, and was none
            self._tracer.on_step(self._begun_ns, self.trips, reason)
        self._clear()
        return reason

    def _clear(self) -> None:
        self._reason = None
        self._deadline_s = None
        self.dropped_rows = 0
        self.trips = None

    def _begin_trace(self) -> None:
        assert self._tracer is not None
        self._until_traced = self._tracer.gap()
        self._begun_ns = time.time_ns()
        self.trips = []


CURRENT = Step()
