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
    gcs, dashboard = f"127.0.0.1:{free_port()}", free_port()
    head = ["--head", f"--port={gcs.partition(':')[2]}", f"--dashboard-port={dashboard}", "--num-cpus=0"]
    head += ["--dashboard-host=127.0.0.1", "--include-dashboard=true", f"--temp-dir={folder / 'ray'}"]
    head += [f"--ray-client-server-port={free_port()}", "--labels=moe-role=head"]
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.append(_ray_start(folder / "head.log", environment, head))
        _wait_for(folder / "head.log", started[0])
        for number, node in enumerate(nodes):
            worker = [f"--address={gcs}", f"--num-cpus={node.num_cpus}", f"--labels=moe-role={node.role}"]
            started.append(_ray_start(folder / f"node-{number}.log", environment, worker))
            _wait_for(folder / f"node-{number}.log", started[-1])
        environment |= {"RAY_ADDRESS": gcs}
        yield Nodes(gcs=gcs, dashboard=f"http://127.0.0.1:{dashboard}", environment=environment)
    finally:
        _end(started)


def _ray_start(log: Path, environment: Mapping[str, str], options: list[str]) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *options]
    # Ports that every raylet of one machine would have in common.
    command += ["--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={free_port()}"]
    command += ["--object-store-memory=134217728", f"--dashboard-agent-grpc-port={free_port()}"]
    with log.open("wb") as file:
        return subprocess.Popen(command, env={**environment}, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent)


def _wait_for(log: Path, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None, f"`ray start` ended with {process.returncode}:\n{log.read_text()}"
        assert time.monotonic() < deadline_s, f"no raylet within {START_TIMEOUT_S} s:\n{log.read_text()}"
        time.sleep(0.2)


def _end(started: list[subprocess.Popen[bytes]]) -> None:
    """At once: nobody is served any more, and a raylet that ends politely waits for its replicas to drain."""
    children = [child for process in started for child in _descendants(process.pid)]
    for process in (*started, *children):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for process in started:
        process.wait(STOP_TIMEOUT_S)
    _, alive = psutil.wait_procs(children, timeout=STOP_TIMEOUT_S)
    assert not alive, f"processes left behind: {alive}"


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
