"""`make drill`: breaks a cluster in every way while it serves, and checks each token that it gave.

    python -m benchmarks.drill [--minutes M] [--streams N] [--faults KIND,KIND] [--replicas N] [--out DIR]

A cluster of its own is started as `expertmesh up` starts it, in float32. Clients keep so many greedy and seeded streams
open, over gRPC and HTTP, while a script made from a seed applies one fault after the other, each at full strength.
Every token is recorded with its time; then an unmodified vLLM process answers every request again.

Exit code 0: nothing failed, nothing was wrong, nothing hung. With `--replicas 1` requests may be refused, but only with
an error that says that they may be tried again. 1: something did. 2: it could not be tried.
"""

import datetime
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command_line import command_of, say
from benchmarks.drill_cluster import View
from benchmarks.drill_history import Expected, Stream, read_history
from benchmarks.drill_load import Job
from benchmarks.drill_options import Options, cluster_of, parse
from benchmarks.drill_replay import started_reference
from benchmarks.drill_report import Report, as_markdown, as_plain
from benchmarks.drill_requests import Mix
from benchmarks.drill_script import Clients, run_script
from benchmarks.drill_streams import Doors
from benchmarks.drill_verdict import Window, costs, judge, outcomes_by_fault, quiet_gaps
from benchmarks.endtoend_cluster import UpProcess
from benchmarks.progress import duration
from benchmarks.result_files import add_section
from benchmarks.serving_machine import Machine, this_machine
from deploy.config import Resolved
from deploy.local import RunningCluster
from deploy.parity_traffic import make_prompts
from experts.errors import ConfigError, ExpertmeshError

NUM_PROMPTS = 256
REPLAY_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbed:
    """What was done to the cluster; what came of it is in the history."""

    windows: Sequence[Window]
    problems: Sequence[str]  # why not all of the script was applied
    taken_s: float  # with the start and the end of the cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """vLLM's answers."""

    expected: Sequence[Expected]  # one for each stream
    num_alone: int  # how many it answered one by one, too
    unsharp: Sequence[str]  # names of those for which that made a difference


def main() -> int:
    """Runs what the command line asks for; the exit code."""
    # A shell lets what it starts in the background ignore SIGINT, and the cluster that we end by it would inherit that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    options = parse()
    folder = options.history or Path(tempfile.mkdtemp(prefix="em-drill-"))
    try:
        report = run(options, folder)
    except ExpertmeshError as error:
        print(f"drill: {error}\ndrill: history and logs are in {folder}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ndrill: interrupted; the history so far is in {folder}", file=sys.stderr)
        return 130
    section = as_markdown(report)
    print("\n" + section, flush=True)
    if options.out is not None:
        written = add_section(options.out, "drill", section, as_plain(report), date=report.date)
        print(f"written: {', '.join(map(str, written))}")
    if report.holds and options.history is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"history and logs: {folder}")
    return 0 if report.holds else 1


def run(options: Options, folder: Path) -> Report:
    """The whole drill; history and logs are left in `folder`. Raises ExpertmeshError."""
    folder.mkdir(parents=True, exist_ok=True)
    history = folder / "history.jsonl"
    if history.exists():
        raise ConfigError(f"{history} is of an earlier drill: name another folder")
    machine, resolved = this_machine(), cluster_of(options)
    disturbed = disturb(options, resolved, folder)
    streams = read_history(history)
    if not streams:
        raise ConfigError(f"no stream began: {'; '.join(disturbed.problems) or 'the clients said nothing'}")
    return report_of(options, machine, streams, disturbed, replay(resolved, streams, options))


def disturb(options: Options, resolved: Resolved, folder: Path) -> Disturbed:
    """Runs cluster, load and script; nothing is left of them. Raises ExpertmeshError."""
    began_s = time.monotonic()
    with UpProcess(resolved) as cluster:
        say("starting the cluster")
        running = cluster.ready()
        view = View(http=running.http, owner_pid=running.pid, size=options.size)
        try:
            view.wait_until_whole((), timeout_s=options.whole_timeout_s)
            say("starting the load")
            with Clients(_job(options, resolved, running, folder), folder) as clients:
                windows, problems = run_script(view, clients, options, folder)
        finally:
            _keep_logs(running, folder)
    return Disturbed(windows=windows, problems=problems, taken_s=time.monotonic() - began_s)


def replay(resolved: Resolved, streams: Sequence[Stream], options: Options) -> Replayed:
    """Answers of unmodified vLLM, and whether they depend on the batch. Raises ServingError."""
    asks = [stream.ask for stream in streams]
    say(f"loading unmodified vLLM for {len(asks)} requests")
    with started_reference(resolved, max_num_seqs=REPLAY_BATCH) as reference:
        expected = reference.answer_all(asks, batch=REPLAY_BATCH)
        again = _to_repeat(streams, expected, options.num_alone)
        say(f"asking {len(again)} of them one by one")
        alone = {index: reference.answer([asks[index]])[0] for index in again}
    unsharp = [asks[index].name for index in again if alone[index] != expected[index]]
    return Replayed(expected=expected, num_alone=len(again), unsharp=unsharp)


def report_of(
    options: Options, machine: Machine, streams: Sequence[Stream], disturbed: Disturbed, replayed: Replayed
) -> Report:
    """Everything that was found."""
    windows = disturbed.windows
    judged = [
        judge(stream, expected, deadline_s=options.timeout_s)
        for stream, expected in zip(streams, replayed.expected, strict=True)
    ]
    size = options.size
    return Report(
        title=f"Drill: {size.groups} groups x {size.replicas}, attention x {size.attention}",
        date=f"{datetime.date.today():%Y-%m-%d}",
        command=command_of("drill", without_history(sys.argv[1:])),
        machine=machine,
        settings=_settings(options, disturbed, replayed),
        is_single=options.is_single,
        costs=costs(windows, judged),
        before=outcomes_by_fault(windows, judged).get(-1, Counter()),
        judged=judged,
        undisturbed=quiet_gaps(streams, windows),
        unsharp=replayed.unsharp,
        problems=disturbed.problems,
    )


def without_history(arguments: Sequence[str]) -> list[str]:
    """A command line without --history, which names a folder of one machine."""
    pairs = zip(["", *arguments], arguments)
    return [one for before, one in pairs if "--history" not in (before, one.partition("=")[0])]


def _job(options: Options, resolved: Resolved, running: RunningCluster, folder: Path) -> Job:
    vocab_size = resolved.checkpoint.config.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise ConfigError(f"{resolved.checkpoint.path}/config.json has no vocab_size")
    prompts = make_prompts(resolved.checkpoint.path, NUM_PROMPTS, vocab_size=vocab_size)
    return Job(
        history=str(folder / "history.jsonl"),
        concurrency=options.concurrency,
        doors=Doors(
            grpc=running.grpc,
            http=running.http.removeprefix("http://"),
            model=running.model,
            timeout_s=options.timeout_s,
        ),
        mix=Mix(seed=options.seed, prompts=prompts, num_tokens=options.num_tokens),
    )


def _to_repeat(streams: Sequence[Stream], expected: Sequence[Expected], count: int) -> list[int]:
    """Indices of `count` streams from all over the drill, and of all that are not what vLLM says in a batch."""
    step = max(len(streams) // count, 1)
    chosen = set(range(0, len(streams), step)[:count])
    for index, (stream, answer) in enumerate(zip(streams, expected, strict=True)):
        if stream.tokens != list(answer.tokens)[: len(stream.tokens)]:
            chosen.add(index)
    return sorted(chosen)


def _settings(options: Options, disturbed: Disturbed, replayed: Replayed) -> dict[str, str]:
    lengths = options.lengths
    return {
        "cluster": f"{options.checkpoint} in float32, expert links over {options.listen}",
        "load": f"{options.concurrency} streams at a time, {options.num_tokens[0]} to {options.num_tokens[1]} tokens, "
        f"deadline {options.timeout_s:g} s",
        "script": f"seed {options.seed}; stop {lengths.stop_s:g} s, cut {lengths.cut_s:g} s, slow {lengths.slow_s:g} s "
        f"at a tenth of the time; {options.pause_s:g} s at full strength before each fault",
        "time": f"{duration(disturbed.taken_s)} with the start and the end of the cluster",
        "reference": f"vLLM in batches of {REPLAY_BATCH}; {replayed.num_alone} requests one by one, too, of which "
        f"{replayed.num_alone - len(replayed.unsharp)} had the same answer",
    }


def _keep_logs(running: RunningCluster, folder: Path) -> None:
    """They go with the cluster, and are wanted where a drill does not hold."""
    try:
        shutil.copytree(running.log_dir, folder / "logs", dirs_exist_ok=True, ignore_dangling_symlinks=True)
    except OSError as error:  # files come and go meanwhile
        say(f"not all logs were kept: {str(error)[:200]}")


if __name__ == "__main__":
    sys.exit(main())
