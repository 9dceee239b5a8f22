"""What bench_serving found, as Markdown for people and as JSON for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.result_files import add_section
from benchmarks.serving_machine import Machine, facts_of
from benchmarks.serving_process import ProcessMemory
from benchmarks.serving_setups import BASELINE, TENSOR_PARALLEL
from benchmarks.serving_stats import FIGURES, Cell, Spread, best_splits

_HEADINGS = (
    "streams",
    "setup",
    "tokens/s",
    f"over {BASELINE}",
    f"over {TENSOR_PARALLEL}",
    "first token ms, p50",
    "p99",
    "between tokens ms, p50",
    "p99",
    "same tokens",
)
_NUMBERS_FROM = 2  # columns from here on are aligned to the right


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run on one checkpoint."""

    title: str  # the checkpoint and its type
    date: str  # YYYY-MM-DD
    command: str
    machine: Machine
    settings: Mapping[str, str]  # what was measured, in words
    cells: Sequence[Cell]
    memory: Mapping[str, Sequence[ProcessMemory]]  # by setup
    notes: Sequence[str]  # sentences


def as_markdown(report: Report) -> str:
    """The section of one run; begins with its heading."""
    facts = {
        **facts_of(report.machine),
        "command": f"`{report.command}`",
        "date": report.date,
        **report.settings,
    }
    parts = [f"## {report.title}", "\n".join(f"- {name}: {fact}" for name, fact in facts.items())]
    parts += ["Median over the rounds (lowest to highest); ratios are taken within each round.", _speed(report.cells)]
    if best := best_splits(report.cells):
        parts += ["The best split for each number of streams:", _best(best)]
    parts += ["Memory after the last round, MiB:", _memory(report.memory)]
    parts += ["\n".join(report.notes)] if report.notes else []
    return "\n\n".join(parts) + "\n"


def as_json(report: Report) -> dict[str, object]:
    """The same as plain values."""
    plain = {name: value for name, value in asdict(report).items() if name != "title"}
    best = best_splits(report.cells)
    plain["best"] = {
        str(streams): {"setup": cell.setup, "ratios": {name: s.median for name, s in cell.ratios.items()}}
        for streams, cell in best.items()
    }
    return plain


def write(report: Report, folder: Path) -> list[Path]:
    """Adds the run to the day's Markdown file and to latest.json, in the place of an earlier one with its title."""
    return add_section(folder, "serving", as_markdown(report), as_json(report), date=report.date)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int) -> str:
    """A Markdown table, its columns filled up to one width, so that it can be read in a terminal, too."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if i >= numbers_from else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths)))
        return f"| {' | '.join(padded)} |"

    rules = ["-" * (w - 1) + (":" if i >= numbers_from else "-") for i, w in enumerate(widths)]
    return "\n".join([line(headings), line(rules), *map(line, rows)])


def number(value: float) -> str:
    """Three digits or all before the point: 0.987, 12.3, 345."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def shown(spread: Spread | None) -> str:
    """0.953 (0.941 to 0.970), or a dash."""
    if spread is None:
        return "-"
    return f"{number(spread.median)} ({number(spread.lowest)} to {number(spread.highest)})"


def _speed(cells: Sequence[Cell]) -> str:
    """One row per cell, by number of streams."""
    rows = []
    for cell in sorted(cells, key=lambda cell: cell.streams):  # stable: setups stay in their order
        ratios = [shown(cell.ratios.get(name)) for name in (BASELINE, TENSOR_PARALLEL)]
        tokens_per_s, *latencies = (shown(cell.figures[name]) for name in FIGURES)
        same = "-" if cell.identical is None else f"{cell.identical:.1%}"
        rows.append([str(cell.streams), cell.setup, tokens_per_s, *ratios, *latencies, same])
    return table(_HEADINGS, rows, numbers_from=_NUMBERS_FROM)


def _best(best: Mapping[int, Cell]) -> str:
    rows = [
        [str(streams), cell.setup, *(shown(cell.ratios.get(name)) for name in (BASELINE, TENSOR_PARALLEL))]
        for streams, cell in sorted(best.items())
    ]
    return table((*_HEADINGS[:2], *_HEADINGS[3:5]), rows, numbers_from=_NUMBERS_FROM)


def _memory(memory: Mapping[str, Sequence[ProcessMemory]]) -> str:
    """A sum for each setup, then each process once: setups with the same D share theirs."""
    rows = []
    for setup, processes in memory.items():
        rows.append([setup, f"{len(processes)} together", _mib(sum(p.pss_bytes for p in processes)), ""])
    seen = {process.name: process for processes in memory.values() for process in processes}
    rows += [["", process.name, _mib(process.pss_bytes), _mib(process.rss_bytes)] for process in seen.values()]
    return table(("setup", "processes", "PSS", "RSS"), rows, numbers_from=_NUMBERS_FROM)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f}"
