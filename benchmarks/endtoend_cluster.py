"""A cluster as `expertmesh up` starts it, in a process of its own: Ray must not be imported before it is set up."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import yaml

from benchmarks.serving_fleet import Engines
from benchmarks.serving_process import OWN_GROUP, ROOT, ChildError, clean_environment
from benchmarks.serving_setups import Setup
from deploy.config import Resolved, check_machine, memory_needed, pinned, resolve
from deploy.local import RunningCluster
from experts.errors import ConfigError

RESERVED_BYTES = 1 << 30  # for this process, the clients and the rest of the machine
START_TIMEOUT_S, END_TIMEOUT_S = 600.0, 60.0
POLL_S = 0.05
SHOWN_LINES = 12


class UpProcess:
    """`expertmesh up` with a config and a home of its own: a context manager that leaves nothing running."""

    def __init__(self, resolved: Resolved) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="em-"))
        self._log = self._home / "up.log"
        config = self._home / "config.yaml"
        config.write_text(yaml.safe_dump(pinned(resolved).model_dump()))
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "deploy.cli", "up", "--config", str(config)],
                cwd=ROOT,
                env={**clean_environment(), "EXPERTMESH_HOME": str(self._home)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=OWN_GROUP,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        family = self.family
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs(family, timeout=END_TIMEOUT_S)
        for process in alive:
            process.kill()
        self._process.wait()
        shutil.rmtree(self._home, ignore_errors=True)

    @property
    def home(self) -> Path:
        """EXPERTMESH_HOME of the cluster: where the command line finds it."""
        return self._home

    def ready(self) -> RunningCluster:
        """Waits until the cluster answers. Raises ChildError where it does not start."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            try:
                return RunningCluster(**json.loads((self._home / "cluster.json").read_text()))
            except (OSError, ValueError):  # not there yet, or not yet whole
                time.sleep(POLL_S)
            if self._process.poll() is not None:
                raise ChildError(f"the cluster did not start; it said at last:\n{self._last_words()}")
        raise ChildError(f"the cluster was not ready after {START_TIMEOUT_S:.0f} s:\n{self._last_words()}")

    def _last_words(self) -> str:
        return "\n".join(f"    {line}" for line in self._log.read_text(errors="replace").splitlines()[-SHOWN_LINES:])

    @property
    def family(self) -> list[psutil.Process]:
        """The process and its descendants that are alive: Ray's and all replicas."""
        try:
            own = psutil.Process(self._process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def cluster_of(engines: Engines, setup: Setup) -> Resolved:
    """A deployment with the D and the engines of `setup`, on free ports. Raises ConfigError."""
    config = engines.of_groups(setup.num_groups)
    http_port, grpc_port = free_ports(2)
    gateway = config.gateway.model_copy(update={"http_port": http_port, "grpc_port": grpc_port})
    threads = setup.engines[0].share_of(config.attention.threads)
    attention = config.attention.model_copy(update={"replicas": setup.num_engines, "threads": threads})
    resolved = resolve(config.model_copy(update={"gateway": gateway, "attention": attention}))
    check_machine(resolved)
    return resolved


def check_memory(resolved: Resolved, engines: Engines, setup: Setup) -> None:
    """The cluster and the engines without one are in memory together. Raises ConfigError where that is too much."""
    cluster_bytes, engine_bytes = memory_needed(resolved), sum(map(engines.bytes_of, setup.members))
    free_bytes = psutil.virtual_memory().available - RESERVED_BYTES
    if cluster_bytes + engine_bytes > free_bytes:
        raise ConfigError(
            f"the cluster needs about {_gib(cluster_bytes)} GiB, the engines beside it {_gib(engine_bytes)} GiB, and "
            f"{_gib(free_bytes)} GiB may be used: choose a smaller checkpoint, or end other programs"
        )


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all are held until the last is found, so that they differ."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f}"
