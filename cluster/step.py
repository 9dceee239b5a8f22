"""The step that an engine is computing: its deadline, whether it has been poisoned, and what was left out of it.

An exception inside a layer would kill vLLM's engine and every request in it (docs/adr/0004).
So a layer that cannot be computed returns zeros and poisons the step, and the scheduler of the same process
ends exactly the requests of that step before a token of theirs leaves.
"""

import time


class Step:
    """One per engine process: steps follow each other, they do not overlap."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._deadline_s: float | None = None
        self.dropped_rows = 0  # that the router left out of this step's answers, see router.capacity_factor

    def begin(self) -> None:
        """A new step is scheduled; nothing is left of the one before."""
        self._reason = None
        self._deadline_s = None
        self.dropped_rows = 0

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
        self.begin()
        return reason


CURRENT = Step()
