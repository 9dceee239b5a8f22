"""Expert groups that scale by their load: a hot spot comes, stays and goes, and the tokens stay those of vLLM.

    python -m benchmarks.scaling [--steady S] [--pulse S] [--out DIR]

A cluster of its own is started with up to two copies of each expert group. Then:

1. a hot spot begins: prompts of one token, whose rows all go to one group; that group must get a second copy,
2. the load stays as it is for `--steady` seconds: no number of copies may change,
3. the load ends: the copy must go again,
4. the hot spot comes and goes, and `expertmesh parity` runs all the while.

Exit code 0: all of it came true, and no answer failed or differed. 1: something did not. 2: it could not be tried.
"""

import argparse
import datetime
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import grpc

from benchmarks.command_line import command_of, count, say
from benchmarks.endtoend_cluster import UpProcess, free_ports
from benchmarks.result_files import add_section
from benchmarks.serving_machine import this_machine
from benchmarks.serving_process import ROOT, clean_environment
from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc
from deploy.config import DEFAULT_CONFIG, Resolved, check_machine, load, resolve
from deploy.local import RunningCluster
from experts.errors import ConfigError, ExpertmeshError

HOT_TOKEN, HOT_GROUP = 3662, 1  # of the embedded checkpoint: all rows of such a prompt go to group 1, none to group 0
PROMPT_TOKENS = 300
STREAMS = 4
POLL_S = 1.0
CHANGE_TIMEOUT_S = 120.0
PARITY_TIMEOUT_S = 900.0
# Engines, router and experts share the cores, so that the hottest copy works for a fifth of the time.
SCALING: dict[str, object] = {
    "autoscale.max_replicas": 2,
    "autoscale.target_busy_share": 0.11,
    "autoscale.up_busy_share": 0.14,
    "autoscale.down_busy_share": 0.1,
    "autoscale.window_s": 10.0,
    "autoscale.up_delay_s": 5.0,
    "autoscale.down_delay_s": 15.0,
}


@dataclass(slots=True, kw_only=True)
class Found:
    """What came of it; seconds are from the change of the load until the copies were there, or gone."""

    up_s: float | None = None
    steady_s: float = 0.0
    steady_changes: int = 0
    down_s: float | None = None
    parity_changes: int = 0
    parity_exit_code: int | None = None
    answers: int = 0
    failed: list[str] = field(default_factory=list)
    wrong: int = 0
    reasons: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        scaled = self.up_s is not None and self.down_s is not None and not self.steady_changes
        return scaled and self.parity_exit_code == 0 and self.parity_changes > 1 and not self.failed and not self.wrong


class HotSpot:
    """The load, in threads of its own: answers must be the same every time."""

    def __init__(self, address: str, found: Found) -> None:
        self._stub = pb_grpc.InferenceStub(grpc.insecure_channel(address))
        self._found = found
        self._expected = self._ask()
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def begin(self) -> None:
        self._stopped.clear()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(STREAMS)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Waits for the open requests."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._found.wrong += self._ask() != self._expected
                self._found.answers += 1
            except grpc.RpcError as error:
                self._found.failed.append(str(error)[:200])

    def _ask(self) -> Sequence[int]:
        prompt = pb.TokenIds(ids=[HOT_TOKEN] * PROMPT_TOKENS)
        request = pb.GenerateRequest(prompt_token_ids=prompt, max_tokens=1, temperature=0, ignore_eos=True)
        return list(self._stub.Generate(request, timeout=120).token_ids)


class Copies:
    """How many copies the groups have, as the status page says."""

    def __init__(self, running: RunningCluster) -> None:
        self._url = f"{running.http}/expertmesh/status"

    def groups(self) -> list[dict]:
        with urllib.request.urlopen(self._url, timeout=30) as answer:  # noqa: S310  (http only)
            return json.load(answer)["controller"]["groups"]

    def targets(self) -> list[int]:
        return [group["target"] for group in self.groups()]

    def wait_for(self, copies: int) -> float | None:
        """Seconds until the hot group has so many; None after CHANGE_TIMEOUT_S."""
        began_s = time.monotonic()
        while (taken_s := time.monotonic() - began_s) < CHANGE_TIMEOUT_S:
            hot = self.groups()[HOT_GROUP]
            if hot["copies"] == hot["target"] == copies:
                say(f"group {HOT_GROUP} has {copies} after {taken_s:.0f} s: {hot['last_change']}")
                return taken_s
            time.sleep(POLL_S)
        return None

    def watch(self, seconds: float, until: "subprocess.Popen[bytes] | None" = None) -> int:
        """Changes of any target within that time, or until the process has ended."""
        changes, before = 0, self.targets()
        ends_s = time.monotonic() + seconds
        while time.monotonic() < ends_s and (until is None or until.poll() is None):
            time.sleep(POLL_S)
            now = self.targets()
            changes += sum(old != new for old, new in zip(before, now, strict=True))
            before = now
        return changes


def main(arguments: list[str] | None = None) -> int:
    """Runs all of it; the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    parser = argparse.ArgumentParser(
        prog="scaling", description="Scales expert groups by a hot spot that comes and goes."
    )
    parser.add_argument("--steady", type=count, default=300, metavar="S", help="seconds of a load that stays (300)")
    parser.add_argument("--pulse", type=count, default=40, metavar="S", help="seconds of load, and of none (40)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go; without it they are shown only")
    given = parser.parse_args(arguments)
    try:
        found = run(_resolved(), steady_s=given.steady, pulse_s=given.pulse)
    except ExpertmeshError as error:
        print(f"scaling: {error}", file=sys.stderr)
        return 2
    section = as_markdown(found)
    print("\n" + section, flush=True)
    if given.out is not None:
        add_section(given.out, "scaling", section, asdict(found), date=f"{datetime.date.today():%Y-%m-%d}")
    return 0 if found.holds else 1


def run(resolved: Resolved, *, steady_s: float, pulse_s: float) -> Found:
    """Raises ExpertmeshError where the cluster does not start."""
    found = Found(steady_s=steady_s)
    with UpProcess(resolved) as cluster:
        say("starting the cluster")
        running = cluster.ready()
        copies, hot_spot = Copies(running), HotSpot(running.grpc, found)
        say("the hot spot begins")
        hot_spot.begin()
        found.up_s = copies.wait_for(2)
        say(f"the load stays for {steady_s} s")
        found.steady_changes = copies.watch(steady_s)
        say(f"{found.steady_changes} changes; the load ends")
        hot_spot.end()
        found.down_s = copies.wait_for(1)
        say("parity, while the hot spot comes and goes")
        _parity(cluster, copies, hot_spot, found, pulse_s=pulse_s)
        found.reasons = [f"group {group['group']}: {group['last_change']}" for group in copies.groups()]
    return found


def _parity(cluster: UpProcess, copies: Copies, hot_spot: HotSpot, found: Found, *, pulse_s: float) -> None:
    """Load on, load off, until the command has ended."""
    environment = {**clean_environment(), "EXPERTMESH_HOME": str(cluster.home)}
    command = [sys.executable, "-m", "deploy.cli", "parity", "--prompts", "16", "--tokens", "32"]
    ends_s = time.monotonic() + PARITY_TIMEOUT_S
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=sys.stderr) as process:
        while process.poll() is None and time.monotonic() < ends_s:
            hot_spot.begin()
            found.parity_changes += copies.watch(pulse_s, process)
            hot_spot.end()
            found.parity_changes += copies.watch(pulse_s, process)
        process.kill()
    found.parity_exit_code = process.returncode


def as_markdown(found: Found) -> str:
    """A section with a table."""
    rows = {
        "a second copy of the hot group, after the load began": _seconds(found.up_s),
        f"changes in {found.steady_s:.0f} s of the same load": str(found.steady_changes),
        "one copy again, after the load ended": _seconds(found.down_s),
        "changes of any group while `expertmesh parity` ran": str(found.parity_changes),
        "exit code of `expertmesh parity`": str(found.parity_exit_code),
        "answers under load, failed, wrong": f"{found.answers}, {len(found.failed)}, {found.wrong}",
    }
    lines = ["## Expert groups that scale by their load", "", f"`{command_of('scaling')}`", ""]
    machine = this_machine()
    lines += [f"{machine.cpu}, {machine.cores} cores, commit {machine.commit}", "", "| what | found |", "| --- | --- |"]
    lines += [f"| {what} | {value} |" for what, value in rows.items()]
    lines += ["", *(f"- {reason}" for reason in found.reasons), *(f"- failed: {one}" for one in found.failed[:5])]
    return "\n".join([*lines, "", "It holds." if found.holds else "**It does not hold.**"])


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.0f} s"


def _resolved() -> Resolved:
    http_port, grpc_port, metrics_port = free_ports(3)
    overrides = {
        **SCALING,
        "model.dtype": "float32",
        "model.max_model_len": 512,
        "gateway.http_port": http_port,
        "gateway.grpc_port": grpc_port,
        "metrics.port": metrics_port,
    }
    resolved = resolve(load(DEFAULT_CONFIG, overrides))
    check_machine(resolved)
    if resolved.served_name != "expertmesh-nano":
        raise ConfigError("the hot token is one of the embedded checkpoint's")
    return resolved


if __name__ == "__main__":
    sys.exit(main())
