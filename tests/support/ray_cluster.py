"""A cluster that the command line started, as a user would start it, and what tests do with it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import yaml

from benchmarks.drill_cluster import is_engine
from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc

START_TIMEOUT_S = 420
STOP_TIMEOUT_S = 90
WARNING = re.compile("warning|error|exception", re.IGNORECASE)
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What a test may do with the running cluster."""

    home: Path
    http: str
    grpc: str
    printed: str  # what `up` said to try
    owner_pid: int

    def run(self, *arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """The `expertmesh` command on this cluster."""
        return expertmesh(self.home, *arguments, timeout_s=timeout_s)

    def status(self) -> dict:
        with urllib.request.urlopen(f"{self.http}/expertmesh/status", timeout=10) as answer:
            return json.load(answer)

    def members(self, kind: str) -> list[dict]:
        return [member for member in self.status()["controller"]["members"] if member["kind"] == kind]

    def engine_pids(self) -> set[int]:
        """Processes of the attention engines: the children of the attention replicas."""
        return {child.pid for member in self.members("attention") for child in _children(member["pid"], is_engine)}

    def expert_pids(self, group: int) -> set[int]:
        """Processes of a group's copies, those among them that are not members yet."""
        title = re.compile(rf"ray::ServeReplica:expertmesh:experts-{group}\b")  # blanks follow, or a method's name
        return {child.pid for child in _children(self.owner_pid, lambda p: bool(title.match(" ".join(p.cmdline()))))}

    def generate(self, ids: list[int], num_tokens: int, *, timeout_s: float = 120) -> list[int]:
        """Greedy tokens over gRPC. Raises grpc.RpcError."""
        request = pb.GenerateRequest(
            prompt_token_ids=pb.TokenIds(ids=ids), max_tokens=num_tokens, temperature=0, ignore_eos=True
        )
        with grpc.insecure_channel(self.grpc) as channel:
            return list(pb_grpc.InferenceStub(channel).Generate(request, timeout=timeout_s).token_ids)

    def wait_for_engines(self, count: int, *, without: int = -1, timeout_s: float = 240) -> None:
        """Until `count` attention engines run, none of them with the pid `without`, and their replicas are healthy."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                status = self.status()
                if status["controller"] and status["deployments"]["attention"]["status"] == "HEALTHY":
                    pids = self.engine_pids()
                    if len(pids) == count and without not in pids:
                        return
            except urllib.error.HTTPError:
                pass  # 503: Serve does not answer in time while replicas of it start on a busy machine
            time.sleep(0.5)
        raise AssertionError(f"no {count} engines without pid {without} after {timeout_s} s:\n{self.evidence()}")

    def wait_for(self, kind: str, count: int, *, without: int, timeout_s: float = 60) -> None:
        """Until `count` members of a kind are alive, none of them with the pid `without`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                pids = [member["pid"] for member in self.members(kind)]
                if len(pids) == count and without not in pids:
                    return
            except urllib.error.HTTPError:
                pass  # likewise
            time.sleep(0.3)
        raise AssertionError(f"no {count} {kind} members without pid {without} after {timeout_s} s:\n{self.evidence()}")

    def evidence(self) -> str:
        """What a failed test shows of the cluster: its status, its processes, and the ends of its warnings."""
        try:
            status = json.dumps(self.status())
        except OSError as error:
            status = repr(error)
        processes = [f"{p.pid} {p.ppid()} {p.status()} {p.name()}" for p in _children(self.owner_pid)]
        logs = Path(json.loads((self.home / "cluster.json").read_text())["log_dir"])
        ends = [
            f"{file.name}: {line[:300]}"
            for file in sorted(logs.rglob("*"))
            if file.is_file() and file.suffix in (".log", ".err", ".out")
            for line in file.read_text(errors="replace").splitlines()[-400:]
            if WARNING.search(line)
        ]
        memory = f"{psutil.virtual_memory().percent} % of the memory in use"
        return "\n".join([status, memory, *processes, *ends[-60:]])


def _children(pid: int, wanted: Callable[[psutil.Process], bool] = lambda _: True) -> list[psutil.Process]:
    """Descendants that are wanted; those that end meanwhile are left out."""
    found = []
    try:
        for child in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if wanted(child):
                    found.append(child)
    except psutil.NoSuchProcess:
        pass  # killed, and its lease has not run out yet
    return found


def expertmesh(home: Path, *arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        cwd=ROOT,
        env=os.environ | {"EXPERTMESH_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started_cluster(home: Path, config: dict) -> Iterator[Cluster]:
    """A cluster of its own on free ports; gone without a trace afterwards.

    config: sections of the config file, but for the ports.
    """
    gateway = {"auth": "none", "http_port": free_port(), "grpc_port": free_port(), **config.get("gateway", {})}
    config = config | {"gateway": gateway, "metrics": {"port": free_port()}}
    (home / "config.yaml").write_text(yaml.safe_dump(config))
    with (home / "up.log").open("w") as log:
        owner = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", "up", "--config", str(home / "config.yaml")],
            cwd=ROOT,
            env=os.environ | {"EXPERTMESH_HOME": str(home)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    started: set[int] = set()
    try:
        running = _wait_until_ready(home, owner)
        started = {process.pid for process in psutil.Process(owner.pid).children(recursive=True)}
        yield Cluster(
            home=home,
            http=running["http"],
            grpc=running["grpc"],
            printed=(home / "up.log").read_text(),
            owner_pid=owner.pid,
        )
        started |= {process.pid for process in psutil.Process(owner.pid).children(recursive=True)}
    finally:
        owner.send_signal(signal.SIGTERM)
        owner.wait(STOP_TIMEOUT_S)
    left = [process for process in map(_alive, started) if process is not None]
    assert not left, f"processes left behind: {left}"
    assert owner.returncode == 0
    assert not Path(running["log_dir"]).exists()
    assert not (home / "cluster.json").exists()


def _wait_until_ready(home: Path, owner: subprocess.Popen) -> dict:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if owner.poll() is not None:
            raise AssertionError(f"`expertmesh up` ended with {owner.returncode}:\n{(home / 'up.log').read_text()}")
        if (home / "cluster.json").exists():
            return json.loads((home / "cluster.json").read_text())
        time.sleep(0.5)
    raise AssertionError(f"not ready after {START_TIMEOUT_S} s:\n{(home / 'up.log').read_text()}")


def _alive(pid: int) -> str | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{pid} {process.name()}"
    except psutil.NoSuchProcess:
        return None
