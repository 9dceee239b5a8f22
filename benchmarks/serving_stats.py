"""From the times of single tokens to medians, spreads and paired ratios: arithmetic only."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.serving_setups import BASELINE

FIGURES = ("tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "gap_p50_ms", "gap_p99_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What one engine did with its streams; all times on the machine's monotonic clock, the same in all processes."""

    begun_s: float  # when the first stream was submitted
    times_s: Sequence[Sequence[float]]  # [num_streams][num_tokens], when each token was there
    tokens: Sequence[Sequence[int]]  # [num_streams][num_tokens]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One setup with one number of streams in one round."""

    tokens_per_s: float  # all output tokens over the time from the first submission to the last token
    ttft_p50_ms: float  # time to first token
    ttft_p99_ms: float
    gap_p50_ms: float  # between two tokens of a stream
    gap_p99_ms: float
    identical: float | None  # share of the streams with exactly the baseline's tokens; None: nothing to compare with
    idle_cores: float = 0.0  # cores that the processes of the other setups were busy with meanwhile


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Of one figure over the rounds."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One setup with one number of streams, over all rounds."""

    setup: str
    streams: int
    figures: Mapping[str, Spread]  # by the names in FIGURES
    ratios: Mapping[str, Spread]  # tokens_per_s over another setup's in the same round, by its name
    identical: float | None  # see Measurement, the mean over the rounds


Rounds = Mapping[tuple[str, int], Sequence[Measurement]]  # (setup, streams) -> one per round


def measure(
    traces: Sequence[Trace], baseline: Sequence[Sequence[int]] | None, *, idle_cores: float = 0.0
) -> Measurement:
    """The figures of engines that ran side by side. baseline: the tokens of the same streams, see tokens_of."""
    begun_s = min(trace.begun_s for trace in traces)
    streams = [(trace.begun_s, times_s) for trace in traces for times_s in trace.times_s]
    ended_s = max(times_s[-1] for _, times_s in streams)
    first_ms = [(times_s[0] - submitted_s) * 1e3 for submitted_s, times_s in streams]
    # A single token has no gaps.
    gaps_ms = np.concatenate([np.diff(times_s) for _, times_s in streams]) * 1e3
    tokens = tokens_of(traces)
    same = None
    if baseline is not None:
        assert len(baseline) == len(tokens)
        same = sum(list(a) == list(b) for a, b in zip(tokens, baseline)) / len(tokens)
    return Measurement(
        tokens_per_s=sum(len(times_s) for _, times_s in streams) / (ended_s - begun_s),
        ttft_p50_ms=float(np.percentile(first_ms, 50)),
        ttft_p99_ms=float(np.percentile(first_ms, 99)),
        gap_p50_ms=float(np.percentile(gaps_ms, 50)) if gaps_ms.size else 0.0,
        gap_p99_ms=float(np.percentile(gaps_ms, 99)) if gaps_ms.size else 0.0,
        identical=same,
        idle_cores=idle_cores,
    )


def deal(prompts: Sequence[list[int]], num_engines: int) -> list[list[list[int]]]:
    """Streams given to the engines in turn."""
    return [list(prompts[engine::num_engines]) for engine in range(num_engines)]


def tokens_of(traces: Sequence[Trace]) -> list[Sequence[int]]:
    """The tokens of all streams in the order that `deal` took them from."""
    found: list[Sequence[int]] = [()] * sum(len(trace.tokens) for trace in traces)
    for engine, trace in enumerate(traces):
        found[engine :: len(traces)] = trace.tokens
    return found


def spread(values: Sequence[float]) -> Spread:
    """values: at least one."""
    return Spread(median=statistics.median(values), lowest=min(values), highest=max(values))


def paired_ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Round by round, so that what slowed a whole round down does not count; then the median."""
    assert len(ours) == len(theirs), "a ratio needs both setups in every round"
    return spread([a / b for a, b in zip(ours, theirs)])


def summarise(rounds: Rounds, *, against: Sequence[str]) -> list[Cell]:
    """One cell per setup and number of streams, in the order of `rounds`.

    against: setups that every other one is divided by, where they were measured.
    """
    cells = []
    for (setup, streams), measured in rounds.items():
        speeds = [m.tokens_per_s for m in measured]
        peers = {
            name: [m.tokens_per_s for m in rounds[name, streams]]
            for name in against
            if name != setup and (name, streams) in rounds
        }
        shares = [m.identical for m in measured if m.identical is not None]
        cells.append(
            Cell(
                setup=setup,
                streams=streams,
                figures={name: spread([getattr(m, name) for m in measured]) for name in FIGURES},
                ratios={name: paired_ratios(speeds, theirs) for name, theirs in peers.items()},
                identical=statistics.fmean(shares) if shares else None,
            )
        )
    return cells


def best_splits(cells: Sequence[Cell]) -> dict[int, Cell]:
    """For each number of streams the `D=` setup with the best median ratio to the baseline."""
    best: dict[int, Cell] = {}
    for cell in cells:
        if not cell.setup.startswith("D=") or BASELINE not in cell.ratios:
            continue
        other = best.get(cell.streams)
        if other is None or cell.ratios[BASELINE].median > other.ratios[BASELINE].median:
            best[cell.streams] = cell
    return best


def differing(cells: Sequence[Cell]) -> list[Cell]:
    """The `D=` cells in which some stream has other tokens than the baseline's: in float32 none may."""
    return [cell for cell in cells if cell.setup.startswith("D=") and cell.identical not in (None, 1.0)]
