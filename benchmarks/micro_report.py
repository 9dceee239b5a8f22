"""What bench_micro found, in tables for people, and the figures that the project has set itself a goal for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from benchmarks.micro_cells import (
    Cell,
    Quantiles,
    Result,
    Speeds,
    as_json,
    growth,
    quantiles,
)
from benchmarks.serving_machine import Machine, facts_of
from benchmarks.serving_report import number, table

FEW_TOKENS, MANY_TOKENS = 32, 1024  # up to here memory is the floor of compute, and from here on products are
_TITLES: Mapping[str, str] = {
    "gate": "Gate: router/gate_fast.py",
    "plan": "Plan: router/plan.py",
    "trip": "One trip around without compute: engine, router, D groups, router, engine",
    "compute": "Expert compute: the rows of one group",
}
Say = Callable[[Result], str]


def headline(results: Sequence[Result]) -> dict[str, float]:
    """The figures with a goal, by name; those that were not measured are left out."""
    by_cell = {result.cell: result for result in results}
    found: dict[str, float] = {}
    for tokens in (1, FEW_TOKENS):
        trip = Cell(part="trip", tokens=tokens)
        if trip in by_cell:
            found[f"trip_us_{tokens}"] = by_cell[trip].us.median
        grown = growth(results, Cell(part="trip", tokens=tokens, groups=2), Cell(part="trip", tokens=tokens, groups=8))
        if grown is not None:
            found[f"trip_growth_{tokens}"] = grown.median
    for dtype in ("bfloat16", "float32"):
        # At the base setting: one of four groups.
        mine = [r for r in results if r.cell == Cell(part="compute", tokens=r.cell.tokens, dtype=dtype)]
        few = [r.memory_share.median for r in mine if r.cell.tokens <= FEW_TOKENS]
        many = [r.matmul_share.median for r in mine if r.cell.tokens == MANY_TOKENS]
        if few:
            found[f"compute_memory_share_{dtype}"] = min(few)
        if many:
            found[f"compute_matmul_share_{dtype}"] = min(many)
    return found


def as_markdown(
    results: Sequence[Result], speeds: Sequence[Speeds], machine: Machine, settings: Mapping[str, str]
) -> str:
    """The section of one run; begins with its heading."""
    facts = {**facts_of(machine), **settings, **speeds_of(speeds)}
    parts = ["## Microbenchmarks", "\n".join(f"- {name}: {fact}" for name, fact in facts.items())]
    parts.append(
        "Microseconds of a call: the median over the rounds, and in brackets the 10th and the 90th percentile.\n"
        "Below it the share of the floor that is reached: 1.00 is as fast as the machine can."
    )
    for part in dict.fromkeys(result.cell.part for result in results):
        mine = [result for result in results if result.cell.part == part]
        parts += [f"### {_TITLES[part]}", _by_tokens(mine, lambda result: _spread(result.us))]
        if part == "compute":
            parts += [
                "Share of the memory bandwidth, for the bytes of the experts in use:",
                _by_tokens(mine, lambda result: number(result.memory_share.median)),
                "Share of the matmul rate in the same type:",
                _by_tokens(mine, lambda result: number(result.matmul_share.median)),
            ]
        else:
            parts += [
                "The floor in microseconds, and the share of it that is reached:",
                _by_tokens(mine, lambda r: f"{number(r.floor_us)}, {number(r.share.median)}"),
            ]
    readings = headline(results)
    if readings:
        parts += ["### Figures with a goal", _readings(readings)]
    return "\n\n".join(parts) + "\n"


def as_plain(
    results: Sequence[Result], speeds: Sequence[Speeds], machine: Machine, settings: Mapping[str, str]
) -> dict[str, object]:
    """The same for programs."""
    return {
        "machine": asdict(machine),
        "settings": {**settings, **speeds_of(speeds)},
        "headline": headline(results),
        "cells": as_json(results),
    }


def speeds_of(speeds: Sequence[Speeds]) -> dict[str, str]:
    """What the floors are made of, in words."""
    found = {"memory bandwidth": f"{_spread(quantiles([s.bytes_per_s / 1e9 for s in speeds]))} GB/s"}
    for dtype in speeds[0].flops_per_s:
        rates = quantiles([s.flops_per_s[dtype] / 1e9 for s in speeds])
        found[f"matmul rate in {dtype}"] = f"{_spread(rates)} GFLOP/s"
    if speeds[0].hop_s:
        found["a message over a bare Unix socket"] = f"{_spread(quantiles([s.hop_s * 1e6 for s in speeds]))} us"
    return found


def _by_tokens(results: Sequence[Result], say: Say) -> str:
    """One row per setting, one column per number of tokens."""
    tokens = sorted({result.cell.tokens for result in results})
    settings = list(dict.fromkeys(result.cell.setting for result in results))
    shown = {(result.cell.setting, result.cell.tokens): say(result) for result in results}
    rows = []
    for setting in settings:
        groups, hidden, experts, dtype = setting
        cells = [shown.get((setting, n), "-") for n in tokens]
        rows.append([str(groups), str(hidden), str(experts), dtype, *cells])
    headings = ("D", "hidden", "experts", "type", *(_tokens(n) for n in tokens))
    return table(headings, rows, numbers_from=4)


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"


def _readings(readings: Mapping[str, float]) -> str:
    words = {
        "trip_us": "one trip, D=4, hidden 1024, microseconds, tokens",
        "trip_growth": "one trip, D=8 over D=2, tokens",
        "compute_memory_share": f"compute, least share of the memory bandwidth for 1 to {FEW_TOKENS} tokens,",
        "compute_matmul_share": f"compute, share of the matmul rate for {MANY_TOKENS} tokens,",
    }
    rows = []
    for name, value in readings.items():
        kind, _, which = name.rpartition("_")
        rows.append([f"{words[kind]} {which}", number(value)])
    return table(("figure", "measured"), rows, numbers_from=1)


def _spread(q: Quantiles) -> str:
    return f"{number(q.median)} ({number(q.p10)} to {number(q.p90)})"
