"""How far a run has come, and how long the rest will take."""

import time
from collections import Counter
from collections.abc import Callable, Iterable


class Progress:
    """Counts units of work by kind: what a kind has taken so far says what is left of it."""

    def __init__(self, units: Iterable[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        """units: the kind of every unit to come; any order."""
        self._clock = clock
        self._left = Counter(units)
        self._total = self._left.total()
        self._taken_s: dict[str, list[float]] = {}
        self._last_s = clock()

    def done(self, kind: str) -> None:
        """A unit has been done since the last call, or since the beginning."""
        now_s = self._clock()
        self._taken_s.setdefault(kind, []).append(now_s - self._last_s)
        self._last_s = now_s
        self._left[kind] -= 1

    @property
    def left_s(self) -> float | None:
        """Seconds until the end; None before the first unit is done."""
        taken = [one for many in self._taken_s.values() for one in many]
        if not taken:
            return None
        overall_s = sum(taken) / len(taken)  # for kinds that have not been seen yet
        mean_s = {kind: sum(many) / len(many) for kind, many in self._taken_s.items()}
        return sum(count * mean_s.get(kind, overall_s) for kind, count in self._left.items())

    def __str__(self) -> str:
        left = self._left.total()
        until_end = "" if self.left_s is None or not left else f", about {duration(self.left_s)} left"
        return f"{self._total - left} of {self._total}{until_end}"


def duration(seconds: float) -> str:
    """For people: 40 s, 3 min, 1 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
