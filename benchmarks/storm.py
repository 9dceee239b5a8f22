"""`make storm`: ten times more than a cluster can do, and clients that leave, in one run.

    python -m benchmarks.storm [--seconds S] [--count N] [--out DIR]

A cluster is started as `expertmesh up` starts it. First its peak is measured, then ten times as many requests as it
can answer arrive for a while, then it must be at full speed again; then clients cancel and let deadlines pass, and what
is open before and after is counted: requests, KV blocks, sockets, tasks.

Exit code 0: every line of the table holds. 1: something does not. 2: it could not be tried.
"""

import argparse
import dataclasses
import datetime
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.command_line import command_of, count, say
from benchmarks.endtoend_cluster import UpProcess, free_ports
from benchmarks.result_files import add_section
from benchmarks.serving_machine import this_machine
from benchmarks.serving_process import Child, clean_environment
from deploy.config import DEFAULT_CONFIG, Resolved, load, resolve
from experts.errors import ExpertmeshError, ServingError

NUM_TOKENS = 32
STREAMS = (8, 32, 64)  # at which the peak is looked for
PEAK_S, SPREAD_S, SETTLE_S = 20.0, 5.0, 5.0
TIMES = 10
PROBES_PER_S = 10.0
AT_A_TIME = 50  # clients that leave
REST_S = 2.0  # after which nothing of them may be left
COUNTED = ("expertmesh_open_requests", "expertmesh_engine_requests", "expertmesh_kv_blocks", "expertmesh_gateway_tasks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One promise, and what was measured."""

    promise: str
    measured: str
    holds: bool


class Cluster:
    """The running cluster, its clients, and what can be counted of it."""

    def __init__(self, up: UpProcess, resolved: Resolved, folder: Path) -> None:
        running = up.ready()
        self._pid = running.pid
        self._metrics = f"http://127.0.0.1:{resolved.config.metrics.port}/metrics"
        self._told = {"address": running.grpc, "model": running.model, "num_tokens": NUM_TOKENS}
        self._crowd, self._prober = (
            Child(name, "benchmarks.storm_load", (), environment=clean_environment(), log=folder / f"{name}.log")
            for name in ("crowd", "prober")
        )
        for child in (self._crowd, self._prober):
            child.answer(timeout_s=60)

    def storm(self, do: str, *, timeout_s: float, **settings: float) -> Mapping[str, object]:
        """The fields of storm_load.Outcome. Raises ServingError."""
        self._crowd.tell({"do": do, **settings, **self._told})
        return cast("Mapping[str, object]", self._crowd.answer(timeout_s=timeout_s))

    def peak(self, streams: int, *, spread_s: float = SPREAD_S) -> float:
        """Tokens a second of so many streams at a time, which begin over spread_s.

        Nobody who sends on his own is in step with the others. Streams that are, because they all begin at once and
        are equally long, have their prompts computed in one step, and are answered faster.
        """
        told = {"streams": streams, "seconds": PEAK_S, "spread_s": spread_s}
        return _rate(self.storm("closed", **told, timeout_s=PEAK_S + 90), SPREAD_S, PEAK_S)

    def overload(self, per_s: float, seconds: float) -> tuple[Mapping[str, object], Mapping[str, object]]:
        """Outcomes of a crowd, and of one more client, with a process of its own, that sends PROBES_PER_S."""
        timeout_s = seconds + 120
        self._prober.tell({"do": "open", "per_s": PROBES_PER_S, "seconds": seconds, **self._told})
        found = self.storm("flood", per_s=per_s, seconds=seconds, timeout_s=timeout_s)
        return found, cast("Mapping[str, object]", self._prober.answer(timeout_s=timeout_s))

    def memory_mib(self) -> float:
        """Resident, of all of its processes."""
        return sum(process.memory_info().rss for process in self._processes()) / 2**20

    def counted(self) -> dict[str, float]:
        """What is open: everything of COUNTED that is not free, and the sockets of all processes."""
        with urllib.request.urlopen(self._metrics, timeout=30) as page:  # noqa: S310  (http only)
            families = text_string_to_metric_families(page.read().decode())
        found: dict[str, float] = {}
        for family in families:
            if family.name in COUNTED:
                for sample in family.samples:
                    if sample.labels.get("state") != "free":
                        name = family.name.removeprefix("expertmesh_").replace("_", " ")
                        found[name] = found.get(name, 0.0) + sample.value
        found["sockets"] = sum(
            connection.status == psutil.CONN_ESTABLISHED
            for process in self._processes()
            for connection in process.net_connections("inet")
        )
        return found

    def _processes(self) -> list[psutil.Process]:
        own = psutil.Process(self._pid)
        return [own, *own.children(recursive=True)]


def main() -> int:
    """Runs what the command line asks for; the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    parser = argparse.ArgumentParser(prog="storm", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=count, default=60, help="of the overload")
    parser.add_argument("--count", type=count, default=500, help="clients that cancel, and that let a deadline pass")
    parser.add_argument("--out", type=Path, help="folder for the results")
    options = parser.parse_args()
    resolved = _resolved()
    folder = Path(tempfile.mkdtemp(prefix="em-storm-"))
    try:
        with UpProcess(resolved) as up:
            say("starting the cluster")
            cluster = Cluster(up, resolved, folder)
            lines = [*overload(cluster, float(options.seconds)), *leavers(cluster, options.count)]
    except ExpertmeshError as error:
        print(f"storm: {error}", file=sys.stderr)
        return 2
    section = _as_markdown(lines)
    print("\n" + section, flush=True)
    if options.out is not None:
        plain = {"lines": [dataclasses.asdict(line) for line in lines]}
        add_section(options.out, "storm", section, plain, date=f"{datetime.date.today():%Y-%m-%d}")
    return 0 if all(line.holds for line in lines) else 1


def overload(cluster: Cluster, seconds: float) -> list[Line]:
    """Peak, overload, and full speed again."""
    peaks = {}
    for streams in STREAMS:
        peaks[streams] = cluster.peak(streams)
        say(f"{streams} streams: {peaks[streams]:.0f} tokens/s")
    streams, peak = max(peaks.items(), key=lambda item: item[1])
    per_s = TIMES * peak / NUM_TOKENS
    before_mib = cluster.memory_mib()
    say(f"{per_s:.0f} requests/s for {seconds:.0f} s, where {peak / NUM_TOKENS:.1f} can be answered")
    found, probed = cluster.overload(per_s, seconds)
    grown_mib = cluster.memory_mib() - before_mib
    goodput = _rate(found, 5.0, seconds) + _rate(probed, 5.0, seconds)
    (median_ms, p99_ms), (_, crowd_ms) = _refusal_ms(probed), _refusal_ms(found)
    flooded, told = (cast("dict[str, int]", each["codes"]) for each in (found, probed))
    time.sleep(SETTLE_S)
    again, in_step = cluster.peak(streams), cluster.peak(streams, spread_s=0)
    mean = (peak + again) / 2  # a machine that others use, too, is not as fast after a minute as it was before
    others = {*flooded, *told} - {"OK", "REFUSED", "RESOURCE_EXHAUSTED"}
    return [
        Line(
            promise=f"Goodput under {TIMES} times the capacity for {seconds:.0f} s: at least 90 % of the peak",
            measured=f"{goodput:.0f} of {mean:.0f} tokens/s ({goodput / mean:.0%}), the mean of the peak before it, "
            f"{peak:.0f}, and of the same {streams} streams after it, {again:.0f}; all in step, {in_step:.0f}",
            holds=goodput >= 0.9 * mean,
        ),
        Line(
            promise="Refusals within 50 ms (p99)",
            measured=f"p99 {p99_ms:.0f} ms, median {median_ms:.0f} ms, for a client of {PROBES_PER_S:g} requests/s; in "
            f"the process that floods, which waits for its own loop, too, p99 {crowd_ms:.0f} ms",
            holds=p99_ms <= 50,
        ),
        Line(promise="No other end than an answer or a refusal", measured=f"{flooded}, and {told}", holds=not others),
        Line(
            promise="Memory of all processes flat: grown by less than 5 %",
            measured=f"{before_mib:.0f} MiB, {grown_mib:+.0f} MiB",
            holds=grown_mib < 0.05 * before_mib,
        ),
        Line(
            promise=f"Full speed again {SETTLE_S:.0f} s later: at least 90 % of the peak",
            measured=f"{again:.0f} of {peak:.0f} tokens/s ({again / peak:.0%})",
            holds=again >= 0.9 * peak,
        ),
    ]


def leavers(cluster: Cluster, num_clients: int) -> list[Line]:
    """Clients that cancel, and whose deadlines pass; what is left of them."""
    lines = []
    for do, word in (("cancel", "cancelled"), ("expire", "timed-out")):
        time.sleep(REST_S)
        before = cluster.counted()
        say(f"{num_clients} {word} streams")
        found = cluster.storm(do, count=num_clients, at_a_time=AT_A_TIME, timeout_s=600)
        time.sleep(REST_S)
        after = cluster.counted()
        changes = {name: f"{before.get(name, 0):g} -> {value:g}" for name, value in after.items()}
        lines.append(
            Line(
                promise=f"Nothing is left of {num_clients} {word} streams after {REST_S:.0f} s",
                measured=f"{found['codes']}; {', '.join(f'{name} {text}' for name, text in changes.items())}",
                holds=all(value <= before.get(name, 0) for name, value in after.items()),
            )
        )
    return lines


def _rate(found: Mapping[str, object], from_s: float, until_s: float) -> float:
    """Tokens a second of whole answers, between two times after the beginning."""
    began_s = cast("float", found["began_s"])
    times = [moment - began_s for moment in cast("list[float]", found["tokens_at_s"])]
    return sum(from_s <= moment < until_s for moment in times) / (until_s - from_s)


def _refusal_ms(found: Mapping[str, object]) -> tuple[float, float]:
    """Median and p99 of the times until a refusal. Raises ServingError where nothing was refused."""
    refused = sorted(cast("list[float]", found["refused_after_s"]))
    if not refused:
        raise ServingError("nothing was refused: this load was none")
    return 1000 * refused[len(refused) // 2], 1000 * refused[int(0.99 * (len(refused) - 1))]


def _resolved() -> Resolved:
    http_port, grpc_port, metrics_port = free_ports(3)
    ports = {"gateway.http_port": http_port, "gateway.grpc_port": grpc_port, "metrics.port": metrics_port}
    return resolve(load(DEFAULT_CONFIG, {**ports, "gateway.max_open_requests": 64}))


def _as_markdown(lines: list[Line]) -> str:
    rows = [f"| {line.promise} | {line.measured} | {'yes' if line.holds else '**no**'} |" for line in lines]
    return "\n".join(
        [
            f"## Storm, {datetime.date.today():%Y-%m-%d}",
            "",
            f"`{command_of('storm')}`, {this_machine().cpu}",
            "",
            "| promise | measured | holds |",
            "| --- | --- | --- |",
            *rows,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
