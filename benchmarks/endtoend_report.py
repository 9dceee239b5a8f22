"""What bench_endtoend found, as Markdown for people and as plain values for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from benchmarks.serving_machine import Machine, facts_of
from benchmarks.serving_report import shown, table
from benchmarks.serving_stats import FIGURES, Cell, Rounds, Spread, spread

ENGINE = "engine"
WAYS = (ENGINE, "HTTP", "gRPC")
_HEADINGS = (
    "streams",
    "way",
    "tokens/s",
    f"over {ENGINE}",
    "corrected",
    "first token ms, p50",
    "p99",
    "between tokens ms, p50",
    "p99",
    "same tokens",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run on one checkpoint; a cell's setup is a way."""

    title: str
    date: str  # YYYY-MM-DD
    command: str
    machine: Machine
    settings: Mapping[str, str]  # what was measured, in words
    cells: Sequence[Cell]
    corrected: Mapping[tuple[str, int], Spread]  # see corrected_ratios
    notes: Sequence[str]  # sentences


def corrected_ratios(rounds: Rounds, *, cores: int) -> dict[tuple[str, int], Spread]:
    """Tokens/s of HTTP and gRPC over the engines', had these had the machine to themselves: (way, streams) -> spread.

    While the engines are measured, the idle cluster goes on looking after itself. What it takes is taken off the ratio
    as if the engines could have used all of it, so this is the lower of two bounds; the plain ratio is the upper one.
    """
    found = {}
    for (way, streams), measured in rounds.items():
        if way != ENGINE:
            pairs = zip(measured, rounds[ENGINE, streams], strict=True)
            ratios = [m.tokens_per_s / e.tokens_per_s * max(1 - e.idle_cores / cores, 0.0) for m, e in pairs]
            found[way, streams] = spread(ratios)
    return found


def as_markdown(report: Report) -> str:
    """The section of one run; begins with its heading."""
    facts = {
        **facts_of(report.machine),
        "command": f"`{report.command}`",
        "date": report.date,
        **report.settings,
    }
    rows = []
    for cell in sorted(report.cells, key=lambda cell: cell.streams):  # stable: ways stay in their order
        tokens_per_s, *latencies = (shown(cell.figures[name]) for name in FIGURES)
        same = "-" if cell.identical is None else f"{cell.identical:.1%}"
        ratios = (shown(cell.ratios.get(ENGINE)), shown(report.corrected.get((cell.setup, cell.streams))))
        rows.append([str(cell.streams), cell.setup, tokens_per_s, *ratios, *latencies, same])
    parts = [
        f"## {report.title}",
        "\n".join(f"- {name}: {fact}" for name, fact in facts.items()),
        f"`{ENGINE}` is the same engines without gateway, Ray and clients, in the same round.\n"
        f"Corrected: as if the engines had also had what the idle cluster took meanwhile.\n"
        "Median over the rounds (lowest to highest); ratios are taken within each round.",
        table(_HEADINGS, rows, numbers_from=2),
        "\n".join(report.notes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_plain(report: Report) -> dict[str, object]:
    """The same for programs, with the corrected ratios by number of streams and way."""
    corrected: dict[str, dict[str, float]] = {}
    for (way, streams), ratio in report.corrected.items():
        corrected.setdefault(str(streams), {})[way] = ratio.median
    return {**asdict(replace(report, corrected={})), "corrected": corrected}
