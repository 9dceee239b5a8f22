"""A whole cluster over HTTP and gRPC against its own engines alone: what gateway, Ray and Serve cost.

    python -m benchmarks.bench_endtoend [--quick] [--checkpoint PRESET|DIR] [--groups D] [--attention R] [--out DIR]

A cluster is started as `expertmesh up` starts it, and beside it the same D expert groups, router and R attention
engines without one, as in bench_serving. Rounds go engine, HTTP, gRPC, with the same requests, while the others idle.
The clients are one process of their own; they share the machine with what they measure.

Exit code 2: it could not be measured.
"""

import datetime
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.bench_serving import make_prompts, vocabulary_of
from benchmarks.command_line import command_of, say
from benchmarks.endtoend_cluster import UpProcess, check_memory, cluster_of
from benchmarks.endtoend_options import Options, parse
from benchmarks.endtoend_report import ENGINE, WAYS, Report, as_markdown, as_plain, corrected_ratios
from benchmarks.progress import Progress
from benchmarks.result_files import add_section
from benchmarks.serving_fleet import RUN_TIMEOUT_S, Fleet
from benchmarks.serving_machine import this_machine
from benchmarks.serving_options import engines_of, settings_of
from benchmarks.serving_process import Child, clean_environment, cpu_seconds, end_all, wait_until_idle
from benchmarks.serving_setups import Setup
from benchmarks.serving_stats import Measurement, Trace, measure, summarise, tokens_of
from deploy.local import RunningCluster
from experts.errors import ExpertmeshError

WARM_UP_TOKENS = 4
START_TIMEOUT_S = 60.0
Measured = dict[tuple[str, int], list[Measurement]]  # (way, streams) -> one per round


@dataclass(slots=True, kw_only=True)
class Bench:
    """Everything that runs at the same time."""

    setup: Setup
    fleet: Fleet
    clients: Child
    cluster: UpProcess
    running: RunningCluster
    client_cores: float = 0.0  # that the clients were busy with, at most

    def run(self, way: str, prompts: list[list[int]], num_tokens: int) -> tuple[list[Trace], float]:
        """The traces, and how many cores were busy with what should have been idle. Raises ServingError."""
        others = self._idle(way)
        wait_until_idle(others)
        before_s, began_s = cpu_seconds(others), time.monotonic()
        traces = (
            self.fleet.run(self.setup, prompts, num_tokens) if way == ENGINE else self._ask(way, prompts, num_tokens)
        )
        return traces, (cpu_seconds(others) - before_s) / (time.monotonic() - began_s)

    def _ask(self, way: str, prompts: list[list[int]], num_tokens: int) -> list[Trace]:
        address = self.running.grpc if way == "gRPC" else self.running.http.removeprefix("http://")
        family = self.clients.family
        before_s, began_s = cpu_seconds(family), time.monotonic()
        self.clients.tell(
            {
                "surface": way,
                "address": address,
                "model": self.running.model,
                "prompts": prompts,
                "num_tokens": num_tokens,
            }
        )
        answer = self.clients.answer(timeout_s=RUN_TIMEOUT_S)
        assert isinstance(answer, dict)
        cores = (cpu_seconds(family) - before_s) / (time.monotonic() - began_s)
        self.client_cores = max(self.client_cores, cores)
        return [Trace(**answer)]

    def _idle(self, way: str) -> list[psutil.Process]:
        """The engines while the cluster answers, and the cluster while the engines run."""
        return self.cluster.family if way == ENGINE else self.fleet.processes(self.setup)


def main() -> int:
    """Runs what the command line asks for; the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the processes are ended then, as after Ctrl-C
    options = parse()
    try:
        report = run(options)
    except ExpertmeshError as error:
        print(f"bench_endtoend: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbench_endtoend: interrupted; nothing was written", file=sys.stderr)
        return 130
    section = as_markdown(report)
    print("\n" + section, flush=True)
    if options.serving.out is not None:
        written = add_section(options.serving.out, "endtoend", section, as_plain(report), date=report.date)
        print(f"written: {', '.join(map(str, written))}")
    return 0


def run(options: Options) -> Report:
    """Measures. Raises ExpertmeshError."""
    machine, serving = this_machine(), options.serving
    engines = engines_of(serving)
    vocabulary = vocabulary_of(engines)
    notes = []
    if machine.is_busy:
        notes.append(f"Other programs used {machine.busy_share:.0%} of the machine: only the ratios mean something.")
    with started(options) as bench:
        warm_up(bench, options, vocabulary)
        measured = measure_rounds(bench, options, vocabulary)
    notes += _found(measured, bench)
    return Report(
        title=f"End to end: {serving.title}, {options.setup.name}",
        date=f"{datetime.date.today():%Y-%m-%d}",
        command=command_of("bench_endtoend"),
        machine=machine,
        settings=settings_of(serving, engines),
        cells=summarise(measured, against=(ENGINE,)),
        corrected=corrected_ratios(measured, cores=machine.cores),
        notes=notes,
    )


@contextmanager
def started(options: Options) -> Iterator[Bench]:
    """The cluster, the engines and the clients; nothing is left of them. Raises ExpertmeshError."""
    engines = engines_of(options.serving)
    resolved = cluster_of(engines, options.setup)
    check_memory(resolved, engines, options.setup)
    with (
        tempfile.TemporaryDirectory(prefix="em-") as folder,
        UpProcess(resolved) as cluster,
        Fleet(engines) as fleet,
    ):
        say("starting the cluster")
        running = cluster.ready()
        say(f"loading {options.setup.name} without a cluster")
        fleet.load(options.setup)
        log = Path(folder) / "clients.log"
        clients = Child("clients", "benchmarks.endtoend_load", [], environment=clean_environment(), log=log)
        try:
            clients.answer(timeout_s=START_TIMEOUT_S)
            yield Bench(setup=options.setup, fleet=fleet, clients=clients, cluster=cluster, running=running)
        finally:
            end_all([clients])


def warm_up(bench: Bench, options: Options, vocabulary: int) -> None:
    """A few tokens of everything that will be measured, so that no first call is."""
    for streams in options.serving.streams:
        say(f"warming up with {streams} streams")
        for way in WAYS:
            prompts = make_prompts(options.serving, vocabulary, streams, 0)
            bench.run(way, prompts, min(WARM_UP_TOKENS, options.serving.output))


def measure_rounds(bench: Bench, options: Options, vocabulary: int) -> Measured:
    """Every round has every way with every number of streams, and begins with another way."""
    serving = options.serving
    measured: Measured = {(way, streams): [] for streams in serving.streams for way in WAYS}
    progress = Progress([str(streams) for streams in serving.streams] * serving.rounds)
    for index in range(serving.rounds):
        for streams in serving.streams:
            first = index % len(WAYS)
            prompts = make_prompts(serving, vocabulary, streams, 1 + index)
            found = {way: bench.run(way, prompts, serving.output) for way in WAYS[first:] + WAYS[:first]}
            engine_tokens = tokens_of(found[ENGINE][0])
            for way, (traces, idle_cores) in found.items():
                baseline = None if way == ENGINE else engine_tokens
                measured[way, streams].append(measure(traces, baseline, idle_cores=idle_cores))
            progress.done(str(streams))
            say(f"round {index + 1}/{serving.rounds}, {streams} streams, {_speeds(measured, streams)}; {progress}")
    return measured


def _speeds(measured: Measured, streams: int) -> str:
    speeds = (f"{way} {measured[way, streams][-1].tokens_per_s:.0f}" for way in WAYS)
    return f"tokens/s: {', '.join(speeds)}"


def _found(measured: Measured, bench: Bench) -> Sequence[str]:
    """What a reader of the numbers must know."""
    idle = {way: max(one.idle_cores for (of, _), many in measured.items() if of == way for one in many) for way in WAYS}
    others = max(cores for way, cores in idle.items() if way != ENGINE)
    return [
        f"The clients used up to {bench.client_cores:.2f} cores of the same machine.",
        f"The idle cluster used up to {idle[ENGINE]:.2f} cores while its engines alone were measured, and the idle "
        f"engines up to {others:.2f} while the cluster was.",
    ]


if __name__ == "__main__":
    sys.exit(main())
