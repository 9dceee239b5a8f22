"""Was every stream of a drill right, and what did each fault cost? Pure: a history, the script, vLLM's answers."""

import bisect
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.drill_history import HUNG, Expected, Stream
from benchmarks.drill_plan import FaultKind

# refused: with a typed error that says that it may be tried again, before its deadline.
Outcome = Literal["right", "wrong", "failed", "refused", "hung"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A fault that was applied, until the cluster was at full strength again. Times of time.monotonic()."""

    kind: FaultKind
    victim: str
    began_s: float
    whole_s: float | None  # None: it never was

    @property
    def end_s(self) -> float:
        return float("inf") if self.whole_s is None else self.whole_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A stream and what is to be said of it."""

    stream: Stream
    outcome: Outcome
    at_s: float  # when that showed
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultCost:
    """What one fault did to the streams."""

    window: Window
    in_flight: int  # when it began
    outcomes: Counter[Outcome]  # of those that ended badly after it and before the next
    stall_s: float | None  # None: no stream had two tokens around it

    @property
    def whole_after_s(self) -> float | None:
        return None if self.window.whole_s is None else self.window.whole_s - self.window.began_s


def judge(stream: Stream, expected: Expected, *, deadline_s: float) -> Judged:
    """deadline_s: of a request, from its beginning."""
    position = first_difference(stream.tokens, expected.tokens)
    if position < len(stream.tokens):
        theirs = expected.tokens[position] if position < len(expected.tokens) else "nothing"
        why = f"token {position} is {stream.tokens[position]}, and vLLM has {theirs}"
        return Judged(stream=stream, outcome="wrong", at_s=stream.times_s[position], why=why)
    if stream.ended_s is None:
        return Judged(stream=stream, outcome="hung", at_s=stream.begun_s, why="the history ends before it")
    if stream.end.error is not None:
        why = f"{stream.end.error} after {len(stream.tokens)} tokens: {stream.end.detail}"
        return Judged(stream=stream, outcome=_bad_end(stream, deadline_s), at_s=stream.ended_s, why=why)
    if len(stream.tokens) < len(expected.tokens) or stream.end.finish != expected.finish:
        why = (
            f"{len(stream.tokens)} tokens and {stream.end.finish}, and vLLM has {len(expected.tokens)} and "
            f"{expected.finish}"
        )
        return Judged(stream=stream, outcome="wrong", at_s=stream.ended_s, why=why)
    return Judged(stream=stream, outcome="right", at_s=stream.ended_s)


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """The first position of `ours` that is not in `theirs`; its length where all are."""
    for position, (a, b) in enumerate(zip(ours, theirs)):
        if a != b:
            return position
    return min(len(ours), len(theirs))


def costs(windows: Sequence[Window], judged: Sequence[Judged]) -> list[FaultCost]:
    """One for each fault, in their order."""
    streams = [one.stream for one in judged]
    outcomes = outcomes_by_fault(windows, judged)
    return [
        FaultCost(
            window=window,
            in_flight=sum(stream.was_open(window.began_s) for stream in streams),
            outcomes=outcomes.get(index, Counter()),
            stall_s=longest_gap(streams, window.began_s, window.end_s),
        )
        for index, window in enumerate(windows)
    ]


def outcomes_by_fault(windows: Sequence[Window], judged: Sequence[Judged]) -> dict[int, Counter[Outcome]]:
    """Bad outcomes by the index of the last fault that had begun when they showed; -1 before the first."""
    begins = [window.began_s for window in windows]
    found: dict[int, Counter[Outcome]] = {}
    for one in judged:
        if one.outcome != "right":
            index = bisect.bisect_right(begins, one.at_s) - 1
            found.setdefault(index, Counter())[one.outcome] += 1
    return found


def longest_gap(streams: Sequence[Stream], began_s: float, end_s: float) -> float | None:
    """Seconds between two tokens of one stream, of gaps that lie at least partly in the time asked for."""
    longest = None
    for stream in streams:
        times_s = stream.times_s
        for before, after in _gaps(times_s, bisect.bisect_right(times_s, began_s)):
            if before >= end_s:
                break
            longest = max(longest or 0.0, after - before)
    return longest


def quiet_gaps(streams: Sequence[Stream], windows: Sequence[Window]) -> tuple[float, float] | None:
    """Median and longest gap of those that no fault touches; None where there is none."""
    found = [
        after - before
        for stream in streams
        for before, after in _gaps(stream.times_s, 1)
        if not any(window.began_s < after and before < window.end_s for window in windows)
    ]
    return (statistics.median(found), max(found)) if found else None


def _gaps(times_s: Sequence[float], first: int) -> Iterator[tuple[float, float]]:
    """Neighbours, from the one that ends at index `first` on."""
    for index in range(max(first, 1), len(times_s)):
        yield times_s[index - 1], times_s[index]


def _bad_end(stream: Stream, deadline_s: float) -> Outcome:
    assert stream.ended_s is not None
    if stream.end.error == HUNG:
        return "hung"
    in_time = stream.ended_s - stream.begun_s <= deadline_s
    return "refused" if stream.end.is_retriable and in_time else "failed"
