"""Tokens/s of every setup over unmodified vLLM, by number of streams, as one picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench_verdicts import Plain, ratios_of
from benchmarks.serving_setups import BASELINE, TENSOR_PARALLEL, parse_setup

_COLOURS: Mapping[int, str] = {0: "#7f7f7f", 2: "#1f77b4", 4: "#d62728", 8: "#2ca02c"}  # by D
_DASHES: Mapping[int, str] = {1: "-", 2: "--"}  # by the number of attention engines
_OTHER_COLOUR, _OTHER_DASH = "#9467bd", ":"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One setup on one checkpoint."""

    setup: str
    streams: tuple[int, ...]  # ascending
    ratios: tuple[float, ...]  # to unmodified vLLM

    @property
    def colour(self) -> str:
        return _COLOURS.get(parse_setup(self.setup).num_groups, _OTHER_COLOUR)

    @property
    def dash(self) -> str:
        return _OTHER_DASH if self.setup == TENSOR_PARALLEL else _DASHES.get(parse_setup(self.setup).num_engines, "-.")


def lines_of(reports: Sequence[Plain]) -> list[Line]:
    """A line for every setup but vLLM itself, in the order of their names. reports: on one checkpoint."""
    by_streams = ratios_of(reports, BASELINE)
    setups = sorted({setup for ratios in by_streams.values() for setup in ratios})
    lines = []
    for setup in setups:
        points = [(streams, ratios[setup]) for streams, ratios in sorted(by_streams.items()) if setup in ratios]
        streams, ratios = zip(*points)
        lines.append(Line(setup=setup, streams=streams, ratios=ratios))
    return lines


def draw(panels: Mapping[str, Sequence[Line]], file: Path) -> None:
    """Writes a PNG with one panel for each checkpoint. panels: at least one."""
    # Not at the top: it is a tool of development, and only this function needs it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    for index, (checkpoint, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), index + 1)
        for line in lines:
            axes.plot(
                line.streams,
                line.ratios,
                color=line.colour,
                linestyle=line.dash,
                marker="o",
                markersize=3.5,
                label=line.setup,
            )
        axes.axhline(1.0, color="black", linewidth=0.8)
        ticks = sorted({streams for line in lines for streams in line.streams})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_ylim(bottom=0)
        axes.set_title(checkpoint, fontsize=10)
        axes.set_xlabel("concurrent streams")
        axes.set_ylabel("output tokens/s over unmodified vLLM")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=100, metadata={"Software": None})
