"""Gate, plan, one trip around without compute, and expert compute, each beside what this machine could do at best.

    python -m benchmarks.bench_micro [--quick] [--only gate,plan,trip,compute] [--rounds N] [--threads N] [--out DIR]

Every round measures the machine's memory bandwidth, matmul rate and the time of a message, and then every cell once;
a cell is compared with what was measured in its own round. One thing is varied at a time: the number of tokens, D, the
hidden size, the number of experts.

Run it on a machine that does nothing else: two other busy programs double the time of a trip.
"""

import argparse
import datetime
import signal
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.command_line import command_of, count, say
from benchmarks.micro_cells import PARTS, Cell, Part, Result, Speeds, cells_of
from benchmarks.micro_probe import Probe
from benchmarks.micro_report import as_markdown, as_plain
from benchmarks.micro_tasks import tasks_of
from benchmarks.micro_timing import measure
from benchmarks.result_files import add_section
from benchmarks.serving_machine import this_machine
from experts.errors import ExpertmeshError


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One run."""

    parts: tuple[Part, ...]
    quick: bool
    rounds: int
    threads: int  # of gate, plan and compute; a trip has the product's own
    out: Path | None  # None: the results are shown only

    @property
    def budget_s(self) -> float:
        """Of one cell in one round."""
        return 0.05 if self.quick else 0.1

    @property
    def cells(self) -> list[Cell]:
        return [cell for part in self.parts for cell in cells_of(part, quick=self.quick)]


def main() -> int:
    """Runs what the command line asks for; the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the processes are ended then, as after Ctrl-C
    options = parse()
    try:
        run(options)
    except ExpertmeshError as error:
        print(f"bench_micro: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbench_micro: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def parse(arguments: list[str] | None = None) -> Options:
    """The command line; ends the process with a sentence where it is wrong, as argparse does."""
    parser = argparse.ArgumentParser(prog="bench_micro", description="Each step of a layer beside its floor.")
    parser.add_argument("--quick", action="store_true", help="a first look in a minute: fewer cells and rounds")
    parser.add_argument("--only", type=_parts, default=PARTS, metavar="A,B", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=count, metavar="N", help="default: 15, and 5 with --quick")
    parser.add_argument("--threads", type=count, default=1, metavar="N", help="of gate, plan and compute (1)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results go; without it they are shown only")
    given = parser.parse_args(arguments)
    return Options(
        parts=given.only,
        quick=given.quick,
        rounds=given.rounds or (5 if given.quick else 15),
        threads=given.threads,
        out=given.out,
    )


def run(options: Options) -> None:
    """Measures, shows and writes. Raises ExpertmeshError."""
    torch.set_num_threads(options.threads)
    machine = this_machine()
    if machine.is_busy:
        say(f"Other programs use {machine.busy_share:.0%} of the machine: the times will be too long.")
    results, speeds = measure_all(options)
    settings = {
        "command": f"`{command_of('bench_micro')}`",
        "rounds": f"{options.rounds}, interleaved, {options.budget_s:g} s a cell",
        "threads": f"{options.threads} of gate, plan and compute",
    }
    section = as_markdown(results, speeds, machine, settings)
    print("\n" + section, flush=True)
    if options.out is not None:
        plain = as_plain(results, speeds, machine, settings)
        written = add_section(options.out, "micro", section, plain, date=f"{datetime.date.today():%Y-%m-%d}")
        print(f"written: {', '.join(map(str, written))}")


def measure_all(options: Options) -> tuple[list[Result], list[Speeds]]:
    """Everything that was asked for, interleaved; the processes are gone afterwards."""
    dtypes = ("bfloat16", "float32") if "compute" in options.parts else ()
    with ExitStack() as stack:
        say(f"preparing {len(options.cells)} cells")
        tasks = tasks_of(options.cells, stack, say)
        probe = stack.enter_context(Probe(dtypes=dtypes, hops="trip" in options.parts))
        return measure(tasks, probe, rounds=options.rounds, budget_s=options.budget_s, say=say)


def _parts(text: str) -> tuple[Part, ...]:
    asked = {part.strip() for part in text.split(",")}
    if unknown := asked - set(PARTS):
        raise argparse.ArgumentTypeError(f"there is no {', '.join(sorted(unknown))}; choose of {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in asked)


if __name__ == "__main__":
    sys.exit(main())
