"""A Ray cluster of several raylets on this machine, with the labels of the worker groups of `k8s/`."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from ray_cluster import ROOT, free_port

from deploy.local import prepare_ray_environment

START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 60
HEAD_ATTEMPTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What one raylet offers."""

    role: str  # its label moe-role
    num_cpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The running raylets."""

    gcs: str  # host:port
    dashboard: str  # URL
    environment: Mapping[str, str]  # of whoever wants to talk to them

    def run(self, *command: str, timeout_s: float = 120) -> str:
        """A command of Ray's or ours beside the cluster; what it printed. Raises AssertionError where it fails."""
        done = subprocess.run(
            [str(Path(sys.executable).with_name(command[0])), *command[1:]],
            cwd=ROOT,
            env={**self.environment},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout


@contextmanager
def started_nodes(folder: Path, nodes: list[Node]) -> Iterator[Nodes]:
    """A head that runs nothing, and a raylet for each node. folder: short, since it holds Unix sockets."""
    before = dict(os.environ)
    try:
        prepare_ray_environment(folder)
        environment = dict(os.environ)
    finally:
        os.environ.clear()
        os.environ.update(before)
    try:
        gcs, dashboard = _start_head(folder, environment)
        for number, node in enumerate(nodes):
            worker = [f"--address={gcs}", f"--num-cpus={node.num_cpus}", f"--labels=moe-role={node.role}"]
            _ray_start(folder / f"node-{number}.log", environment, worker)
        environment |= {"RAY_ADDRESS": gcs}
        yield Nodes(gcs=gcs, dashboard=f"http://127.0.0.1:{dashboard}", environment=environment)
    finally:
        _end(environment)


def _start_head(folder: Path, environment: Mapping[str, str]) -> tuple[str, int]:
    """The address of the GCS, and the dashboard's port.

    Tried twice: `ray start` waits 30 s for one answer of the GCS, and on a busy machine it did not come.
    """
    try:
        return _start_head_in(folder / "ray", folder / "head.log", environment)
    except AssertionError as error:
        print(f"a second head, since the first did not start: {error}")
        _end(environment)
        return _start_head_in(folder / "ray2", folder / "head2.log", environment)


def _start_head_in(folder: Path, log: Path, environment: Mapping[str, str]) -> tuple[str, int]:
    gcs, dashboard = f"127.0.0.1:{free_port()}", free_port()
    head = ["--head", f"--port={gcs.partition(':')[2]}", f"--dashboard-port={dashboard}", "--num-cpus=0"]
    head += ["--dashboard-host=127.0.0.1", "--include-dashboard=true", f"--temp-dir={folder}"]
    head += [f"--ray-client-server-port={free_port()}", "--labels=moe-role=head"]
    _ray_start(log, environment, head)
    return gcs, dashboard


def _ray_start(log: Path, environment: Mapping[str, str], options: list[str]) -> None:
    """Returns when the raylet serves. Raises AssertionError with the log where it does not."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *options]
    # Ports that every raylet of one machine would have in common.
    command += ["--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={free_port()}"]
    command += ["--object-store-memory=134217728", f"--dashboard-agent-grpc-port={free_port()}"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, env={**environment}, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent)
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None, f"`ray start` ended with {process.returncode}:\n{log.read_text()}"
        assert time.monotonic() < deadline_s, f"no raylet within {START_TIMEOUT_S} s:\n{log.read_text()}"
        time.sleep(0.2)


def _end(environment: Mapping[str, str]) -> None:
    """At once: nobody is served any more, and a raylet that ends politely waits for its replicas to drain."""
    token = environment["RAY_AUTH_TOKEN_PATH"]
    started = [process for process in psutil.process_iter() if _token_of(process) == token]
    # Ray's agents write their title over their environment.
    ours = {child for process in started for child in (process, *_children(process))}
    for process in ours:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(ours, timeout=STOP_TIMEOUT_S)
    assert not alive, f"processes left behind: {alive}"


def _token_of(process: psutil.Process) -> str | None:
    """Whose cluster it is of: all that a `ray start` started has its environment, also where `ray start` has ended."""
    try:
        return process.environ().get("RAY_AUTH_TOKEN_PATH")
    except psutil.Error:
        return None


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []
