"""How long it takes from `expertmesh up` to the first token, with the config that it has without options.

    python -m benchmarks.bench_start [--rounds N] [--out DIR]

Exit code 2: it could not be measured.
"""

import argparse
import datetime
import http.client
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from benchmarks.command_line import command_of, count, say
from benchmarks.endtoend_cluster import UpProcess, free_ports
from benchmarks.progress import Progress
from benchmarks.result_files import add_section
from benchmarks.serving_machine import Machine, facts_of, this_machine
from benchmarks.serving_report import shown
from benchmarks.serving_stats import spread
from deploy.config import DEFAULT_CONFIG, Resolved, check_machine, load, resolve
from experts.errors import ExpertmeshError, ServingError

FIRST_TOKEN_TIMEOUT_S = 120.0


class Start(NamedTuple):
    """Seconds from the command on."""

    ready_s: float  # until `up` says so
    first_token_s: float  # until an answer of one token is there


def main() -> int:
    """Runs what the command line asks for; the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the processes are ended then, as after Ctrl-C
    parser = argparse.ArgumentParser(prog="bench_start", description="From `expertmesh up` to the first token.")
    parser.add_argument("--rounds", type=count, default=3, metavar="N", help="starts, one after the other (3)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go; without it they are shown only")
    options = parser.parse_args()
    machine = this_machine()
    try:
        starts = measure(options.rounds)
    except ExpertmeshError as error:
        print(f"bench_start: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbench_start: interrupted; nothing was written", file=sys.stderr)
        return 130
    command = command_of("bench_start")
    section = as_markdown(starts, machine, command)
    print("\n" + section, flush=True)
    if options.out is not None:
        date = f"{datetime.date.today():%Y-%m-%d}"
        written = add_section(options.out, "start", section, as_plain(starts, machine, command), date=date)
        print(f"written: {', '.join(map(str, written))}")
    return 0


def measure(rounds: int) -> list[Start]:
    """One start after the other, each from nothing. Raises ExpertmeshError."""
    progress, starts = Progress(["start"] * rounds), []
    for index in range(rounds):
        starts.append(_start(_laptop()))
        progress.done("start")
        say(f"start {index + 1}/{rounds}: first token after {starts[-1].first_token_s:.1f} s; {progress}")
    return starts


def as_markdown(starts: Sequence[Start], machine: Machine, command: str) -> str:
    """The section of one run; begins with its heading."""
    facts = {**facts_of(machine), "command": f"`{command}`", "starts": str(len(starts))}
    ready, first = (spread(seconds) for seconds in zip(*starts))
    parts = [
        "## From `expertmesh up` to the first token",
        "\n".join(f"- {name}: {fact}" for name, fact in facts.items()),
        f"Ready after {shown(ready)} s, and the first token after {shown(first)} s: the median (lowest to highest).",
    ]
    return "\n\n".join(parts) + "\n"


def as_plain(starts: Sequence[Start], machine: Machine, command: str) -> dict[str, object]:
    """The same for programs."""
    return {
        "machine": asdict(machine),
        "command": command,
        "starts": [start._asdict() for start in starts],
        "first_token_s": spread([start.first_token_s for start in starts]).median,
    }


def _laptop() -> Resolved:
    """The default deployment, on ports that are free now."""
    http_port, grpc_port = free_ports(2)
    resolved = resolve(load(DEFAULT_CONFIG, {"gateway.http_port": http_port, "gateway.grpc_port": grpc_port}))
    check_machine(resolved)
    return resolved


def _start(resolved: Resolved) -> Start:
    began_s = time.monotonic()
    with UpProcess(resolved) as cluster:
        running = cluster.ready()
        ready_s = time.monotonic() - began_s
        ask_one_token(running.http, running.model)
        return Start(ready_s=ready_s, first_token_s=time.monotonic() - began_s)


def ask_one_token(base_url: str, model: str) -> None:
    """Raises ServingError where there is no answer."""
    body = json.dumps({"model": model, "prompt": "The harbour", "max_tokens": 1, "temperature": 0})
    connection = http.client.HTTPConnection(base_url.removeprefix("http://"), timeout=FIRST_TOKEN_TIMEOUT_S)
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        said = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise ServingError(f"the cluster that was ready did not answer: {error}") from None
    finally:
        connection.close()
    if answer.status != http.HTTPStatus.OK:
        raise ServingError(
            f"the cluster that was ready answered {answer.status}: {said[:300].decode(errors='replace')}"
        )


if __name__ == "__main__":
    sys.exit(main())
