"""The history of a drill: what was asked, which token came when, and how it ended, one JSON line for each event.

Every line is written at once, so that a drill that is cut off leaves all that it saw.
Times are of time.monotonic(), which is one clock for all processes of a machine.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.drill_requests import Ask

HUNG = "HUNG"  # the error of a stream that its client had to give up


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a stream ended: with a finish reason, or with an error."""

    finish: str | None = None  # "stop" or "length"
    error: str | None = None  # UNAVAILABLE, HTTP 503, ...
    detail: str = ""  # the error's sentence
    is_retriable: bool = False  # typed, and says that it may be tried again


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What vLLM answers to the same request."""

    tokens: Sequence[int]
    finish: str  # "stop" or "length"


@dataclass(slots=True, kw_only=True)
class Stream:
    """One request and its answer."""

    ask: Ask
    begun_s: float
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)  # when each of them came
    ended_s: float | None = None  # None: the history ends before
    end: End = field(default_factory=End)

    def was_open(self, at_s: float) -> bool:
        return self.begun_s <= at_s and (self.ended_s is None or at_s < self.ended_s)


class Recorder:
    """Writes a history; a context manager."""

    def __init__(self, path: Path) -> None:
        self._out = path.open("a", buffering=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.close()

    def begun(self, ask: Ask, *, at_s: float) -> None:
        self._write({"event": "begun", "at_s": at_s, **asdict(ask)})

    def tokens(self, ask: Ask, ids: Sequence[int], *, at_s: float) -> None:
        self._write({"event": "tokens", "name": ask.name, "at_s": at_s, "ids": list(ids)})

    def ended(self, ask: Ask, end: End, *, at_s: float) -> None:
        self._write({"event": "ended", "name": ask.name, "at_s": at_s, **asdict(end)})

    def _write(self, event: dict[str, object]) -> None:
        self._out.write(json.dumps(event) + "\n")


def read_history(path: Path) -> list[Stream]:
    """All streams, in the order in which they were begun."""
    with path.open() as lines:
        return streams_of(lines)


def streams_of(lines: Iterable[str]) -> list[Stream]:
    """The same from lines; a last line that is not whole is left out."""
    streams: dict[str, Stream] = {}
    for line in lines:
        if not line.endswith("\n"):
            break
        event = json.loads(line)
        kind, at_s = event.pop("event"), event.pop("at_s")
        if kind == "begun":
            assert event["name"] not in streams, f"two requests are named {event['name']}"
            streams[event["name"]] = Stream(ask=Ask(**event), begun_s=at_s)
            continue
        stream = streams[event.pop("name")]
        if kind == "tokens":
            stream.tokens += event["ids"]
            stream.times_s += [at_s] * len(event["ids"])
        else:
            stream.ended_s, stream.end = at_s, End(**event)
    return list(streams.values())
