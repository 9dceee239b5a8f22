"""How quickly the copies of one expert group answer: which of them are slow now, when rows are better asked again
elsewhere, and when a slow copy is tried again.

Pure: the caller owns the clock. Copies are compared with their peers only, since what is slow depends on the machine.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

CopyId = tuple[str, int]  # member id, incarnation

SLOW_FACTOR = 3.0  # times the median of its peers
FLOOR_S = 0.02  # nobody is slow who answers within this: on a busy machine a few ms are noise
HEDGE_FLOOR_S = 0.05  # no frame is asked elsewhere before this
HALF_LIFE_S = 0.1
MAX_WEIGHT = 0.2  # of one answer, however long the one before is ago: three very slow ones make a slow copy, not one
PROBE_S = 1.0  # between two trials of a slow copy
LOST_S = 10.0  # a frame is not waited for when one that was sent so much later is answered
MAX_OPEN = 256  # frames of one copy that are timed at once
_LOG_FACTOR = math.log(SLOW_FACTOR)
_QUICK_S = FLOOR_S / SLOW_FACTOR  # what is quicker counts as this
_LOG_QUICK_S = math.log(_QUICK_S)
_RATE_PER_S = math.log(2) / HALF_LIFE_S
_MAX_SURPRISE = math.log(10)  # what one answer may differ by, for the average
_NONE: frozenset[CopyId] = frozenset()


@dataclass(slots=True, kw_only=True, eq=False)
class _Copy:
    pace: float | None = None  # log of the seconds that a frame of the group's first size takes; None: never answered
    answered_s: float = -math.inf  # when it last answered
    silent_since_s: float = 0.0  # while frames are open: its last answer, or the first of them
    probe_s: float = -math.inf  # when it may be tried again, once it is slow
    open: dict[int, tuple[float, int]] = field(default_factory=dict)  # seq -> when sent, size; oldest first


@dataclass(slots=True, kw_only=True, eq=False)
class _Size:
    cost: float  # log of how much longer a frame of this size takes than one of the first size
    num_answers: int = 1


class Paces:
    """The copies of one expert group.

    The time of an answer is explained as log(seconds) = pace of the copy + cost of the frame's size. A size is the
    number of binary digits of the rows that the copy had to compute when the frame was sent, the frame's own and those
    before it: so decoding, prefills and queues of either are comparable, whatever a row costs beside a frame.
    Both are learned. The pace follows what is left of log(seconds) with the weight

        1 - 2 ** (-seconds since the copy's last answer / HALF_LIFE_S), at most MAX_WEIGHT

    so that answers which arrive together, after one hiccup, count together for one. The cost follows ten times more
    slowly, after its first answers, and is 0 for the first size: a copy that gets slow moves its pace and not the cost.
    """

    def __init__(self) -> None:
        self._copies: dict[CopyId, _Copy] = {}
        self._sizes: dict[int, _Size] = {}
        self._first_size = -1

    # Events.

    def on_sent(self, copy: CopyId, seq: int, num_rows: int, *, now_s: float) -> None:
        """num_rows: that the copy owes now, those of this frame included."""
        state = self._copies.get(copy)
        if state is None:
            state = self._copies[copy] = _Copy()
        if not state.open:
            state.silent_since_s = now_s
        if len(state.open) < MAX_OPEN:
            state.open[seq] = now_s, num_rows.bit_length()

    def on_answer(self, copy: CopyId, seq: int, *, now_s: float) -> None:
        """Of any frame, also of one that another copy has answered before."""
        state = self._copies.get(copy)
        frame = state.open.pop(seq, None) if state is not None else None
        if state is None or frame is None:
            return
        sent_s, size = frame
        state.silent_since_s = now_s
        while state.open and next(iter(state.open.values()))[0] < sent_s - LOST_S:
            del state.open[next(iter(state.open))]  # a link keeps the order: it will not be answered any more
        seconds = now_s - sent_s
        self._learn(state, size, math.log(seconds) if seconds > _QUICK_S else _LOG_QUICK_S, now_s)

    def on_void(self, copy: CopyId, seq: int) -> None:
        """The frame was refused, or not sent after all: it says nothing of the pace."""
        state = self._copies.get(copy)
        if state is not None:
            state.open.pop(seq, None)

    def on_down(self, copy: CopyId) -> None:
        """Its link broke. Should it come back, it is as good as its peers at first."""
        self._copies.pop(copy, None)

    def keep(self, copies: Collection[CopyId]) -> None:
        """Forgets whoever is not among `copies`."""
        for copy in [copy for copy in self._copies if copy not in copies]:
            del self._copies[copy]

    # Decisions.

    def slow(self, copies: Sequence[CopyId], *, now_s: float) -> frozenset[CopyId]:
        """Those of `copies` that take SLOW_FACTOR times the median of the others; never all of them.

        Of an even number of others the lower median is meant. Who owes an answer takes at least as long as it has been
        silent. Who has neither answered nor been silent is not slow, and nobody's measure.
        """
        quickest, slowest = math.inf, -math.inf
        for copy in copies:  # asked for every frame, and nearly always this is all
            time = self._time_of(copy, now_s)
            if time is not None:
                quickest = time if time < quickest else quickest
                slowest = time if time > slowest else slowest
        return self._slower_than_peers(copies, now_s) if slowest - quickest > _LOG_FACTOR else _NONE

    def is_overdue(self, copy: CopyId, seq: int, copies: Iterable[CopyId], *, now_s: float) -> bool:
        """Whether the frame is out for HEDGE_FLOOR_S, and for SLOW_FACTOR times what the median of the others takes."""
        state = self._copies.get(copy)
        frame = state.open.get(seq) if state is not None else None
        if frame is None or now_s - frame[0] <= HEDGE_FLOOR_S:
            return False
        others = (other for other in copies if other != copy)
        times = sorted(time for other in others if (time := self._time_of(other, now_s)) is not None)
        if not times:
            return False
        expected = times[(len(times) - 1) // 2] + self._cost_of(frame[1])
        return math.log(now_s - frame[0]) - expected > _LOG_FACTOR

    def is_probe_due(self, copy: CopyId, *, now_s: float) -> bool:
        """Whether a slow copy should be tried with rows that another one is asked for, too.

        Once in PROBE_S, and at once after an answer that was quicker than its average. A frame that it owes is trial
        enough, unless it seems lost.
        """
        state = self._copies.get(copy)
        if state is None or state.open:
            return state is not None and now_s - next(reversed(state.open.values()))[0] > LOST_S
        return now_s >= state.probe_s

    # What follows from them.

    def _learn(self, state: _Copy, size: int, log_seconds: float, now_s: float) -> None:
        if state.pace is None:
            state.pace = self._first_pace(size, log_seconds)
        known = self._sizes.get(size)
        if known is None:
            known = self._sizes[size] = _Size(cost=log_seconds - state.pace)
        surprise = log_seconds - known.cost - state.pace
        weight = -math.expm1((state.answered_s - now_s) * _RATE_PER_S)
        if weight > MAX_WEIGHT:
            weight = MAX_WEIGHT
        state.pace += weight * (_clipped(surprise))
        state.answered_s = now_s
        state.probe_s = now_s if surprise < 0 else now_s + PROBE_S
        if size != self._first_size:
            known.num_answers += 1
            known.cost += surprise * max(weight / 10, 1 / known.num_answers)

    def _slower_than_peers(self, copies: Sequence[CopyId], now_s: float) -> frozenset[CopyId]:
        times = sorted((time, copy) for copy in copies if (time := self._time_of(copy, now_s)) is not None)
        middle = (len(times) - 2) // 2  # of the others, by rank; the copy itself, where it is before, is left out
        return frozenset(
            copy for rank, (time, copy) in enumerate(times) if time - times[middle + (rank <= middle)][0] > _LOG_FACTOR
        )

    def _first_pace(self, size: int, log_seconds: float) -> float:
        """That of the peers, as far as one is known: one answer alone makes no copy slow."""
        paces = sorted(state.pace for state in self._copies.values() if state.pace is not None)
        if paces:
            return paces[(len(paces) - 1) // 2]
        if not self._sizes:
            self._first_size = size
            return log_seconds
        return log_seconds - self._cost_of(size)

    def _time_of(self, copy: CopyId, now_s: float) -> float | None:
        """Log of the seconds that the copy needs now for a frame of the first size; None where nothing tells."""
        state = self._copies.get(copy)
        if state is None:
            return None
        if state.open and now_s - state.silent_since_s > FLOOR_S:
            _, size = next(iter(state.open.values()))
            silence = math.log(now_s - state.silent_since_s) - self._cost_of(size)
            return silence if state.pace is None else max(state.pace, silence)
        return state.pace

    def _cost_of(self, size: int) -> float:
        """What is known, or at most: a smaller frame costs no more, one of twice the rows no more than twice."""
        known = self._sizes.get(size)
        if known is not None:
            return known.cost
        smaller = max((other for other in self._sizes if other < size), default=None)
        if smaller is not None:
            return self._sizes[smaller].cost + (size - smaller) * math.log(2)
        return self._sizes[min(self._sizes)].cost if self._sizes else 0.0


def _clipped(surprise: float) -> float:
    return -_MAX_SURPRISE if surprise < -_MAX_SURPRISE else min(surprise, _MAX_SURPRISE)
