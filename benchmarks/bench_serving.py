"""Tokens per second, latency and memory of unmodified vLLM and of every way to split it, side by side in one run.

    python -m benchmarks.bench_serving [--quick] [--checkpoint PRESET|DIR] [--dtype bfloat16] [--out DIR]

At the level of engines: no gateway and no Ray, but the product's router and expert groups, each in a process of its
own. Every setup is loaded once and stays; then rounds go A B C, A B C, so that whatever else the machine does falls on
all alike, and ratios are taken within a round.

    vllm        unmodified vLLM in one process
    vllm-tp2    unmodified vLLM with tensor parallel size 2: its own way to use two processes on a CPU
    D=4         four expert groups, a router and one attention engine (any D that divides the checkpoint's n_group)
    D=4 x2      the same with two attention engines, which share the streams

Exit code 1: in float32 a split gave other tokens than vLLM. 2: it could not be measured.
"""

import datetime
import signal
import sys
import time
from collections.abc import Sequence
from random import Random

import psutil

from benchmarks.command_line import command_of, say
from benchmarks.progress import Progress
from benchmarks.serving_fleet import Engines, Fleet
from benchmarks.serving_machine import this_machine
from benchmarks.serving_options import Options, engines_of, parse, settings_of
from benchmarks.serving_process import cpu_seconds, wait_until_idle
from benchmarks.serving_report import Report, as_markdown, number, write
from benchmarks.serving_setups import BASELINE, TENSOR_PARALLEL, Setup, fitting
from benchmarks.serving_stats import Cell, Measurement, Trace, differing, measure, summarise, tokens_of
from experts.errors import ConfigError, ExpertmeshError

RESERVED_BYTES = 1 << 30  # for this process and the rest of the machine
WARM_UP_TOKENS = 4
IDLE_CORES_LIMIT = 0.1  # used by what should be idle; a reader is told of more
Measured = dict[tuple[str, int], list[Measurement]]  # (setup, streams) -> one per round


def main() -> int:
    """Runs what the command line asks for; the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the processes are ended then, as after Ctrl-C
    options = parse()
    try:
        return run(options)
    except ExpertmeshError as error:
        print(f"bench_serving: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbench_serving: interrupted; nothing was written", file=sys.stderr)
        return 130


def run(options: Options) -> int:
    """Measures, shows and writes; the exit code. Raises ExpertmeshError."""
    machine = this_machine()
    engines = engines_of(options)
    vocabulary = vocabulary_of(engines)
    free_bytes = psutil.virtual_memory().available - RESERVED_BYTES
    setups, dropped = fitting(options.setups, engines.bytes_of, free_bytes)
    notes = [f"{setup.name} was left out: with it there would not be enough memory." for setup in dropped]
    if machine.is_busy:
        notes.append(f"Other programs used {machine.busy_share:.0%} of the machine: only the ratios mean something.")
    for note in notes:
        say(note)
    with Fleet(engines) as fleet:
        load_all(fleet, setups)
        warm_up(fleet, setups, options, vocabulary)
        measured = measure_rounds(fleet, setups, options, vocabulary)
        memory = {setup.name: fleet.memory(setup) for setup in setups}
    cells = summarise(measured, against=(BASELINE, TENSOR_PARALLEL))
    notes += _found(measured, cells, options)
    report = Report(
        title=options.title,
        date=f"{datetime.date.today():%Y-%m-%d}",
        command=command_of("bench_serving"),
        machine=machine,
        settings=settings_of(options, engines),
        cells=cells,
        memory=memory,
        notes=notes,
    )
    print("\n" + as_markdown(report), flush=True)
    if options.out is not None:
        print(f"written: {', '.join(str(file) for file in write(report, options.out))}")
    return 1 if options.dtype == "float32" and differing(cells) else 0


def load_all(fleet: Fleet, setups: Sequence[Setup]) -> None:
    """One setup after the other."""
    for setup in setups:
        started_s = time.monotonic()
        say(f"loading {setup.name}")
        fleet.load(setup)
        say(f"loading {setup.name}: ready after {time.monotonic() - started_s:.0f} s")


def warm_up(fleet: Fleet, setups: Sequence[Setup], options: Options, vocabulary: int) -> None:
    """A few tokens of everything that will be measured, so that no first call is."""
    for streams in options.streams:
        for setup in _able(setups, streams):
            say(f"warming up {setup.name} with {streams} streams")
            fleet.run(setup, make_prompts(options, vocabulary, streams, 0), min(WARM_UP_TOKENS, options.output))


def measure_rounds(fleet: Fleet, setups: Sequence[Setup], options: Options, vocabulary: int) -> Measured:
    """Every round has every setup with every number of streams, and begins with another setup."""
    able = {streams: found for streams in options.streams if (found := _able(setups, streams))}
    measured: Measured = {(setup.name, streams): [] for streams, found in able.items() for setup in found}
    progress = Progress([str(streams) for streams in able] * options.rounds)
    for index in range(options.rounds):
        for streams, in_order in able.items():
            first = index % len(in_order)
            in_turn = in_order[first:] + in_order[:first]
            prompts = make_prompts(options, vocabulary, streams, 1 + index)
            found = {setup.name: _run(fleet, setup, prompts, options.output) for setup in in_turn}
            baseline = tokens_of(found[BASELINE][0]) if BASELINE in found else None
            for name, (traces, idle_cores) in found.items():
                one = measure(traces, None if name == BASELINE else baseline, idle_cores=idle_cores)
                measured[name, streams].append(one)
            shown = ", ".join(f"{name} {number(measured[name, streams][-1].tokens_per_s)}" for name in found)
            progress.done(str(streams))
            say(f"round {index + 1}/{options.rounds}, {streams} streams, tokens/s: {shown}; {progress}")
    return measured


def make_prompts(options: Options, vocabulary: int, streams: int, number_of_round: int) -> list[list[int]]:
    """Random token ids below `vocabulary`, the same for every setup: [streams][options.prompt]."""
    rng = Random(f"{options.seed} {number_of_round} {streams}")
    # The first ids are those of special tokens.
    return [[rng.randrange(3, vocabulary) for _ in range(options.prompt)] for _ in range(streams)]


def vocabulary_of(engines: Engines) -> int:
    """How many token ids the checkpoint has. Raises ConfigError where it does not say so."""
    size = engines.checkpoint.config.get("vocab_size")
    if not isinstance(size, int):
        raise ConfigError(f"the checkpoint's config.json has vocab_size {size!r}, and must have a whole number")
    return size


def _run(fleet: Fleet, setup: Setup, prompts: list[list[int]], num_tokens: int) -> tuple[list[Trace], float]:
    """The traces, and how many cores the processes of the other setups used meanwhile."""
    others = fleet.others(setup)
    wait_until_idle(others)
    before_s, started_s = cpu_seconds(others), time.monotonic()
    traces = fleet.run(setup, prompts, num_tokens)
    return traces, (cpu_seconds(others) - before_s) / (time.monotonic() - started_s)


def _able(setups: Sequence[Setup], streams: int) -> list[Setup]:
    """Those that have a stream for each of their engines."""
    return [setup for setup in setups if setup.num_engines <= streams]


def _found(measured: Measured, cells: Sequence[Cell], options: Options) -> list[str]:
    """What a reader of the numbers must know."""
    notes = []
    idle_cores = max((one.idle_cores for many in measured.values() for one in many), default=0.0)
    if idle_cores > IDLE_CORES_LIMIT:
        notes.append(f"While one setup ran, the others used up to {idle_cores:.2f} cores: the numbers are too low.")
    if not any(cell.setup == BASELINE for cell in cells):
        notes.append(f"{BASELINE} was not measured, so there are no ratios to it and no tokens to compare with.")
    elif options.dtype == "float32":
        wrong = ", ".join(f"{cell.setup} with {cell.streams} streams" for cell in differing(cells))
        right = f"In float32 every split gave exactly the tokens of {BASELINE}."
        notes.append(
            f"THE TOKENS DIFFER from those of {BASELINE}: {wrong}. The speeds mean nothing." if wrong else right
        )
    else:
        notes.append(
            f"In {options.dtype} rounding depends on threads and batches, so vLLM differs even from itself; "
            "`expertmesh parity` judges such tokens."
        )
    return notes


if __name__ == "__main__":
    sys.exit(main())
