"""What `make bench` leaves behind: a Markdown page, a JSON file and a picture, made of the results of its parts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.bench_chart import draw, lines_of
from benchmarks.bench_parts import Part
from benchmarks.bench_verdicts import CHECKPOINTS, Found, Plain, Verdict, ratios_of, verdicts_of
from benchmarks.result_files import read_json, sections_of, write_json
from benchmarks.serving_machine import Machine, facts_of
from benchmarks.serving_report import number, table
from benchmarks.serving_setups import BASELINE, TENSOR_PARALLEL

KINDS = ("serving", "micro", "endtoend", "start")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The results of one part that has run."""

    part: Part
    sections: Sequence[str]  # Markdown, each with its heading
    plain: Mapping[str, Mapping[str, Plain]]  # kind -> title -> result


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Everything that is known at the end."""

    date: str  # YYYY-MM-DD
    command: str
    machine: Machine
    outcomes: Sequence[Outcome]
    notes: Sequence[str]  # sentences: what is missing, and why

    @property
    def found(self) -> Found:
        serving: dict[str, list[Plain]] = {}
        rest: dict[str, list[Plain]] = {kind: [] for kind in KINDS[1:]}
        for outcome in self.outcomes:
            for kind, by_title in outcome.plain.items():
                of_kind = serving.setdefault(outcome.part.checkpoint, []) if kind == "serving" else rest[kind]
                of_kind += by_title.values()
        return Found(serving=serving, **rest)


def read_outcome(part: Part, folder: Path) -> Outcome:
    """Of a part that is done."""
    pages = sorted(folder.glob("*.md"))
    plain = {kind: found for kind, found in read_json(folder / "latest.json").items() if kind in KINDS}
    return Outcome(
        part=part,
        sections=[section for page in pages for section in sections_of(page.read_text())],
        plain=plain,  # type: ignore[arg-type]
    )


def write_summary(summary: Summary, folder: Path) -> list[Path]:
    """DATE.md, latest.json and, where vLLM was compared with, DATE.png."""
    folder.mkdir(parents=True, exist_ok=True)
    page, latest, picture = folder / f"{summary.date}.md", folder / "latest.json", folder / f"{summary.date}.png"
    written = [page, latest]
    panels = {name: lines for name, reports in summary.found.serving.items() if (lines := lines_of(reports))}
    if panels:
        draw(panels, picture)
        written.append(picture)
    page.write_text(as_markdown(summary, picture=picture.name if panels else None))
    write_json(latest, as_plain(summary))
    return written


def as_markdown(summary: Summary, *, picture: str | None) -> str:
    """The whole page."""
    facts = {**facts_of(summary.machine), "command": f"`{summary.command}`"}
    parts = [
        f"# Benchmarks, {summary.date}",
        "\n".join(f"- {name}: {fact}" for name, fact in facts.items()),
        "## Goals",
        _goals(verdicts_of(summary.found)),
        *summary.notes,
    ]
    if picture is not None:
        parts.append(f"![Tokens/s of every setup over unmodified vLLM, by number of streams]({picture})")
    for outcome in summary.outcomes:
        # Several parts may have the same heading, and what follows must be found by its part.
        parts += [f"## {outcome.part.name}: {section.removeprefix('## ')}" for section in outcome.sections]
    return "\n\n".join(parts) + "\n"


def as_plain(summary: Summary) -> dict[str, object]:
    """The same for programs."""
    found = summary.found
    return {
        "date": summary.date,
        "command": summary.command,
        "machine": asdict(summary.machine),
        "verdicts": [{**asdict(verdict), "met": verdict.met} for verdict in verdicts_of(found)],
        "ratios": {
            checkpoint: {
                against: {str(streams): ratios for streams, ratios in sorted(ratios_of(reports, against).items())}
                for against in (BASELINE, TENSOR_PARALLEL)
            }
            for checkpoint, reports in found.serving.items()
        },
        "notes": list(summary.notes),
        "parts": {outcome.part.name: outcome.plain for outcome in summary.outcomes},
    }


def missing_notes(parts: Sequence[Part], outcomes: Sequence[Outcome]) -> list[str]:
    """A sentence about parts that have no result, so that a gap is never taken for a goal that was reached."""
    there = {outcome.part.name for outcome in outcomes}
    missing = [part.name for part in parts if part.name not in there]
    notes = [f"Without results: {', '.join(missing)}."] if missing else []
    if any(outcome.part.checkpoint and outcome.part.checkpoint not in CHECKPOINTS for outcome in outcomes):
        notes.append("This was a quick run on a small checkpoint, which says nothing about the goals.")
    return notes


def _goals(verdicts: Sequence[Verdict]) -> str:
    words = {True: "yes", False: "NO", None: "not measured"}
    rows = [
        [
            str(verdict.line),
            verdict.what,
            f"{'at least' if verdict.at_least else 'at most'} {verdict.goal:g}",
            "-" if verdict.measured is None else number(verdict.measured),
            words[verdict.met],
            verdict.detail,
        ]
        for verdict in verdicts
    ]
    return table(("line", "figure", "goal", "measured", "reached", "by"), rows, numbers_from=6)
