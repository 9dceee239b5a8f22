"""What a drill found, as Markdown for people and as plain values for programs, and whether it holds."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from benchmarks.drill_verdict import FaultCost, Judged, Outcome
from benchmarks.serving_machine import Machine, facts_of
from benchmarks.serving_report import number, table

HEADINGS = (
    "fault",
    "times",
    "in flight",
    "failed",
    "refused",
    "wrong",
    "hung",
    "stall s, median",
    "longest",
    "full strength s, median",
    "longest",
)
SHOWN = 20  # streams that were not right
_BAD: tuple[Outcome, ...] = ("failed", "refused", "wrong", "hung")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One drill."""

    title: str
    date: str  # YYYY-MM-DD
    command: str
    machine: Machine
    settings: Mapping[str, str]  # in words
    is_single: bool  # one copy of each group: a request may be refused
    costs: Sequence[FaultCost]
    before: Counter[Outcome]  # bad outcomes before the first fault
    judged: Sequence[Judged]
    undisturbed: tuple[float, float] | None  # median and longest gap where no fault was, in seconds
    unsharp: Sequence[str]  # requests that vLLM answered in two ways: then right and wrong are not sharp
    problems: Sequence[str]  # why not all of the script was applied

    @property
    def outcomes(self) -> Counter[Outcome]:
        return Counter(one.outcome for one in self.judged)

    @property
    def lost_probes(self) -> int:
        """Requests after a replacement that did not get their tokens."""
        return sum(one.outcome != "right" and one.stream.ask.is_probe for one in self.judged)

    @property
    def holds(self) -> bool:
        """Whether nobody noticed anything, or with single copies nothing that a client could not answer to."""
        allowed: set[Outcome] = {"right", "refused"} if self.is_single else {"right"}
        return self.outcomes.keys() <= allowed and not (self.lost_probes or self.unsharp or self.problems)


def as_markdown(report: Report) -> str:
    """The section of one drill; begins with its heading."""
    facts = {
        **facts_of(report.machine),
        "command": f"`{report.command}`",
        "date": report.date,
        **report.settings,
        "streams": _streams(report),
    }
    parts = [
        f"## {report.title}",
        f"**{'Holds' if report.holds else 'Does not hold'}**: {_verdict(report)}",
        "\n".join(f"- {name}: {fact}" for name, fact in facts.items()),
        table(HEADINGS, _rows(report), numbers_from=1),
        _legend(report),
        "\n".join(f"- {problem}" for problem in (*report.problems, *map(_unsharp, report.unsharp), *_bad(report))),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_plain(report: Report) -> dict[str, object]:
    """The same for programs, with every fault by itself."""
    return {
        "date": report.date,
        "command": report.command,
        "machine": asdict(report.machine),
        "settings": dict(report.settings),
        "holds": report.holds,
        "streams": len(report.judged),
        "outcomes": dict(report.outcomes),
        "undisturbed_gap_s": report.undisturbed,
        "unsharp": list(report.unsharp),
        "problems": list(report.problems),
        "faults": [
            {
                "kind": cost.window.kind,
                "victim": cost.window.victim,
                "in_flight": cost.in_flight,
                "outcomes": dict(cost.outcomes),
                "stall_s": cost.stall_s,
                "whole_after_s": cost.whole_after_s,
            }
            for cost in report.costs
        ],
        "bad": list(_bad(report)),
    }


def _rows(report: Report) -> list[list[str]]:
    by_kind: dict[str, list[FaultCost]] = {}
    for cost in report.costs:
        by_kind.setdefault(cost.window.kind, []).append(cost)
    rows = [_row(kind, many) for kind, many in sorted(by_kind.items())]
    if report.before:
        counts = [str(report.before[outcome]) for outcome in _BAD]
        rows.insert(0, ["before the first", "", "", *counts, "", "", "", ""])
    total = ["all", str(len(report.costs)), "", *(str(report.outcomes[outcome]) for outcome in _BAD)]
    return [*rows, [*total, "", "", "", ""]]


def _row(kind: str, many: Sequence[FaultCost]) -> list[str]:
    outcomes = sum((cost.outcomes for cost in many), Counter[Outcome]())
    stalls_s = [cost.stall_s for cost in many if cost.stall_s is not None]
    wholes_s = [cost.whole_after_s for cost in many if cost.whole_after_s is not None]
    in_flight = sum(cost.in_flight for cost in many)
    counts = [str(outcomes[outcome]) for outcome in _BAD]
    never = "never" if len(wholes_s) < len(many) else None
    return [
        kind,
        str(len(many)),
        str(in_flight),
        *counts,
        _median(stalls_s),
        number(max(stalls_s)) if stalls_s else "-",
        _median(wholes_s),
        never or number(max(wholes_s)),
    ]


def _median(values: Sequence[float]) -> str:
    return number(statistics.median(values)) if values else "-"


def _streams(report: Report) -> str:
    tokens = sum(len(one.stream.tokens) for one in report.judged)
    surfaces = Counter(one.stream.ask.surface for one in report.judged)
    sampled = sum("seed" in one.stream.ask.sampling for one in report.judged)
    by_surface = ", ".join(f"{count} over {surface}" for surface, count in surfaces.items())
    return f"{len(report.judged)} with {tokens} tokens; {by_surface}; {sampled} sampled with a seed, the others greedy"


def _verdict(report: Report) -> str:
    outcomes = report.outcomes
    counts = ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in _BAD)
    probes = sum(one.stream.ask.is_probe for one in report.judged)
    return f"of {len(report.judged)} streams {counts}; {probes - report.lost_probes} of {probes} probes right."


def _legend(report: Report) -> str:
    lines = [
        "In flight: requests that were open when a fault began, of all faults of the kind together.",
        "Refused: ended within its deadline with UNAVAILABLE, or 503 with Retry-After; "
        + ("allowed, since each group has one copy." if report.is_single else "counts as lost here."),
        "Wrong: another token than unmodified vLLM has for the same request. Hung: no end at its deadline.",
        "Stall: the longest gap between two tokens of a stream, from a fault until full strength. "
        "Full strength: every replica is there, healthy and connected; from the beginning of the fault.",
        "A probe is a request right after full strength.",
    ]
    if report.undisturbed is not None:
        median_s, longest_s = report.undisturbed
        lines.append(f"Where no fault was, the median gap was {median_s:.3f} s and the longest {longest_s:.3f} s.")
    return "\n".join(lines)


def _bad(report: Report) -> list[str]:
    bad = [one for one in report.judged if one.outcome != "right"]
    lines = [f"{one.outcome}: request {one.stream.ask.name} ({one.stream.ask.surface}): {one.why}" for one in bad]
    rest = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + rest


def _unsharp(name: str) -> str:
    return f"vLLM answers request {name} alone otherwise than in a batch"
