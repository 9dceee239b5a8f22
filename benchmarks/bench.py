"""All benchmarks in one command, with one page, one JSON file and one picture at the end: `make bench`.

    python -m benchmarks.bench [--parts A,B] [--rounds N] [--streams N,N] [--dtype NAME] [--fresh] [--quick] [--out DIR]

Every part is a process of its own and keeps its results in an ignored folder. A run that was cut goes on where it
stopped, as long as the code is the same; --fresh begins anew. A name such as `serving` stands for all parts that begin
with it.

Exit code 1: some part found something wrong, such as tokens that differ. 2: some part could not be measured.
"""

import argparse
import datetime
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench_parts import Part, Wish, chosen, code_id, exit_code_of, mark_done, parts_of, work_folder
from benchmarks.bench_results import Summary, missing_notes, read_outcome, write_summary
from benchmarks.bench_verdicts import verdicts_of
from benchmarks.command_line import command_of, count, counts, say
from benchmarks.progress import duration
from benchmarks.serving_machine import ROOT, this_machine
from benchmarks.serving_report import number

RESULTS = Path(__file__).parent / "results"
END_TIMEOUT_S = 180.0
MEASURED = (0, 1)  # exit codes of a part that has results


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One run."""

    parts: tuple[Part, ...]  # to be measured now
    every: tuple[Part, ...]  # whose results go onto the page, if they are there
    fresh: bool
    out: Path


def main() -> int:
    """Runs what is missing, writes what there is; the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as after Ctrl-C
    options = parse()
    work = work_folder(code_id())
    try:
        codes = [run_part(part, work / part.name, options, place) for place, part in enumerate(options.parts)]
    except KeyboardInterrupt:
        print("\nbench: interrupted; the parts that were done are kept, and the next run goes on", file=sys.stderr)
        return 130
    done = [part for part in options.every if exit_code_of(part, work / part.name) is not None]
    outcomes = [read_outcome(part, work / part.name) for part in done]
    summary = Summary(
        date=f"{datetime.date.today():%Y-%m-%d}",
        command=command_of("bench"),
        machine=this_machine(),
        outcomes=outcomes,
        notes=missing_notes(options.every, outcomes),
    )
    written = write_summary(summary, options.out)
    for verdict in verdicts_of(summary.found):
        if verdict.met is False:
            say(f"not reached: {verdict.what}: {number(verdict.measured or 0.0)}, and the goal is {verdict.goal:g}")
    print(f"written: {', '.join(map(str, written))}")
    return max(codes, default=0)


def parse(arguments: list[str] | None = None) -> Options:
    """The command line; ends the process with a sentence where it is wrong, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="bench", description="All benchmarks, side by side, with one page at the end."
    )
    parser.add_argument("--parts", metavar="A,B", help=f"of {', '.join(part.name for part in parts_of(Wish()))}")
    parser.add_argument("--rounds", type=count, metavar="N", help="of every part")
    parser.add_argument("--streams", type=counts, metavar="N,N", help="of serving and endtoend")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured with the same code")
    parser.add_argument("--quick", action="store_true", help="a look at everything in minutes, on the nano checkpoint")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the page goes (benchmarks/results)")
    given = parser.parse_args(arguments)
    if given.quick and given.out is None:
        parser.error("--quick says nothing about the goals: give it a folder of its own with --out")
    wish = Wish(rounds=given.rounds, streams=given.streams, dtype=given.dtype, quick=given.quick)
    every = parts_of(wish)
    parts = every
    if given.parts is not None:
        try:
            parts = chosen(every, [name.strip() for name in given.parts.split(",")])
        except ValueError as error:
            parser.error(f"--parts: {error}")
    return Options(parts=tuple(parts), every=tuple(every), fresh=given.fresh, out=given.out or RESULTS)


def run_part(part: Part, folder: Path, options: Options, place: int) -> int:
    """Its exit code; 0 where it has been done before."""
    where = f"part {place + 1} of {len(options.parts)}, {part.name}"
    before = exit_code_of(part, folder)
    if before is not None and not options.fresh:
        say(f"{where}: measured before, with the same code")
        return before
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    say(f"{where}: {shlex.join(['python', *part.command(folder)[1:]])}")
    began_s = time.monotonic()
    exit_code = _run(part.command(folder), folder / "output.txt")
    took_s = time.monotonic() - began_s
    if exit_code in MEASURED:
        mark_done(part, folder, took_s=took_s, exit_code=exit_code)
        say(f"{where}: done after {duration(took_s)}")
    else:
        say(f"{where}: FAILED with exit code {exit_code} after {duration(took_s)}; the others go on")
    return exit_code if exit_code in MEASURED else 2


def _run(command: Sequence[str], output: Path) -> int:
    """Progress goes to our standard error, results to a file. Ends the process where we are interrupted."""
    with output.open("w") as out:
        # Ctrl-C is for us: a part that gets it twice could not end its own processes.
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, start_new_session=True)
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait(END_TIMEOUT_S)
            raise


if __name__ == "__main__":
    sys.exit(main())
