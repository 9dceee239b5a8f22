"""What the project has set itself as goals for speed, and whether a run reached them: arithmetic only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.serving_setups import BASELINE, TENSOR_PARALLEL

CHECKPOINTS = ("bench-300m", "bench-1b")
OVER_VLLM: Mapping[int, float] = {1: 0.85, 8: 0.92, 32: 0.95, 64: 1.0}  # by streams
OVER_TENSOR_PARALLEL = 1.8
TRIP_US: Mapping[int, float] = {1: 170.0, 32: 400.0}  # by tokens
TRIP_GROWTH = 1.6
MEMORY_SHARE, MATMUL_SHARE = 0.6, 0.5
ENDTOEND, ENDTOEND_STREAMS = 0.9, 64
START_S = 60.0
Plain = Mapping[str, object]  # of JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The results of all parts as they stand in their files; what was not measured is left out."""

    serving: Mapping[str, Sequence[Plain]]  # by checkpoint
    micro: Sequence[Plain] = ()
    endtoend: Sequence[Plain] = ()
    start: Sequence[Plain] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One goal, and what came of it."""

    line: int  # of the list of goals
    what: str
    goal: float
    at_least: bool  # or else at most
    measured: float | None  # None: it was not
    detail: str = ""  # which setup, or which type

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.goal if self.at_least else self.measured <= self.goal


class Best(NamedTuple):
    """The highest ratio of several, and whose it is."""

    ratio: float
    whose: str


def verdicts_of(found: Found) -> list[Verdict]:
    """One for every goal, in the order of the list."""
    return [*_over_vllm(found), *_over_tensor_parallel(found), *_trip(found), *_compute(found), *_front_door(found)]


def ratios_of(reports: Sequence[Plain], against: str) -> dict[int, dict[str, float]]:
    """Median tokens/s of every setup over another one's: streams -> setup -> ratio.

    reports: of bench_serving on one checkpoint. A setup that is in several has the ratio of the first.
    """
    ratios: dict[int, dict[str, float]] = {}
    for report in reports:
        for cell in _list(report, "cells"):
            spread = _dict(cell, "ratios").get(against)
            if isinstance(spread, Mapping):
                ratios.setdefault(int(_number(cell, "streams")), {}).setdefault(str(cell["setup"]), spread["median"])
    return ratios


def _best_split(reports: Sequence[Plain], streams: int, against: str) -> Best | None:
    splits = ratios_of(reports, against).get(streams, {})
    return max((Best(ratio, setup) for setup, ratio in splits.items() if setup.startswith("D=")), default=None)


def _over_vllm(found: Found) -> list[Verdict]:
    return [
        _of_best(1, f"{checkpoint}, tokens/s over {BASELINE}, {_counted(streams, 'stream')}", goal, best)
        for checkpoint in CHECKPOINTS
        for streams, goal in OVER_VLLM.items()
        for best in [_best_split(found.serving.get(checkpoint, ()), streams, BASELINE)]
    ]


def _over_tensor_parallel(found: Found) -> list[Verdict]:
    return [
        _of_best(
            2,
            f"{checkpoint}, tokens/s over {TENSOR_PARALLEL}, {_counted(streams, 'stream')}",
            OVER_TENSOR_PARALLEL,
            best,
        )
        for checkpoint in CHECKPOINTS
        for streams in OVER_VLLM
        for best in [_best_split(found.serving.get(checkpoint, ()), streams, TENSOR_PARALLEL)]
    ]


def _trip(found: Found) -> list[Verdict]:
    figures = _headline(found)
    trips = [
        _at_most(
            3, f"one trip without compute, D=4, {_counted(tokens, 'token')}, us", goal, figures.get(f"trip_us_{tokens}")
        )
        for tokens, goal in TRIP_US.items()
    ]
    growths = [
        _at_most(
            3, f"one trip, D=8 over D=2, {_counted(tokens, 'token')}", TRIP_GROWTH, figures.get(f"trip_growth_{tokens}")
        )
        for tokens in TRIP_US
    ]
    return trips + growths


def _compute(found: Found) -> list[Verdict]:
    figures = _headline(found)
    goals = {
        "compute_memory_share": ("expert compute, share of the memory bandwidth, 1 to 32 tokens", MEMORY_SHARE),
        "compute_matmul_share": ("expert compute, share of the matmul rate, 1024 tokens", MATMUL_SHARE),
    }
    return [
        Verdict(line=4, what=f"{what}, {dtype}", goal=goal, at_least=True, measured=figures.get(f"{name}_{dtype}"))
        for name, (what, goal) in goals.items()
        for dtype in ("bfloat16", "float32")
    ]


def _front_door(found: Found) -> list[Verdict]:
    ratios = [
        Best(_number(by_way, way), f"{way}, {str(report['title']).rpartition(', ')[2]}")
        for report in found.endtoend
        for by_way in [_dict(_dict(report, "corrected"), str(ENDTOEND_STREAMS))]
        for way in by_way
    ]
    what = f"end to end over the engines alone, {_counted(ENDTOEND_STREAMS, 'stream')}"
    starts = [_number(report, "first_token_s") for report in found.start]
    return [
        _of_best(5, what, ENDTOEND, max(ratios, default=None)),
        _at_most(6, "from `expertmesh up` to the first token, s", START_S, starts[0] if starts else None),
    ]


def _headline(found: Found) -> dict[str, float]:
    return {
        name: _number(figures, name)
        for report in found.micro
        for figures in [_dict(report, "headline")]
        for name in figures
    }


def _of_best(line: int, what: str, goal: float, best: Best | None) -> Verdict:
    if best is None:
        return Verdict(line=line, what=what, goal=goal, at_least=True, measured=None)
    return Verdict(line=line, what=what, goal=goal, at_least=True, measured=best.ratio, detail=best.whose)


def _at_most(line: int, what: str, goal: float, measured: float | None) -> Verdict:
    return Verdict(line=line, what=what, goal=goal, at_least=False, measured=measured)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


# Reading plain values.


def _dict(plain: Plain, name: str) -> Plain:
    value = plain.get(name, {})
    assert isinstance(value, Mapping), f"{name} is {value!r}"
    return value


def _list(plain: Plain, name: str) -> Sequence[Plain]:
    value = plain.get(name, [])
    assert isinstance(value, list), f"{name} is {value!r}"
    return value


def _number(plain: Plain, name: str) -> float:
    value = plain[name]
    assert isinstance(value, int | float), f"{name} is {value!r}"
    return value
