"""A cluster of its own on this machine: a local Ray, Serve on it, the application, and all of it gone at the end."""

import json
import logging
import math
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil

from deploy.config import DeploymentConfig, Resolved, pinned, state_dir
from deploy.waiting import Say, StartError, last_sentence, wait_until_running
from experts.handshake import write_secret

TOKEN_FILE = "ray_token"  # noqa: S105  (a file name, in the runtime folder)
SHUTDOWN_TIMEOUT_S = 10.0  # for Serve to end its replicas one by one; what is left then is ended with Ray


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningCluster:
    """What other commands must know of the cluster that `up` started; kept in a file while it runs."""

    pid: int  # of the process that owns it
    http: str  # base URL
    grpc: str  # host:port
    model: str  # served name
    checkpoint: str
    dtype: str
    num_groups: int
    attention_replicas: int
    max_model_len: int
    log_dir: str
    runtime_dir: str
    ray_address: str  # host:port
    ray_cpus: int  # that replicas can book from Ray
    config: dict[str, object]  # the whole DeploymentConfig, its checkpoint a folder
    started_s: float  # of the process, since 1970: a pid may come again

    @staticmethod
    def file() -> Path:
        return state_dir() / "cluster.json"

    @classmethod
    def find(cls) -> Self | None:
        """The running cluster, or None; a file whose process is gone counts as none."""
        try:
            cluster = cls(**json.loads(cls.file().read_text()))
            started_s = psutil.Process(cluster.pid).create_time()
        except (OSError, ValueError, TypeError, psutil.Error):
            return None
        return cluster if started_s == cluster.started_s else None

    def write(self) -> None:
        self.file().parent.mkdir(parents=True, exist_ok=True)
        self.file().write_text(json.dumps(asdict(self), indent=2))


class LocalCluster:
    """Owns Ray's processes: a context manager that leaves nothing running."""

    def __init__(self, resolved: Resolved, *, say: Say) -> None:
        self._resolved = resolved
        self._say = say
        # Short, since it holds Unix sockets, whose paths may have 107 bytes.
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="em-"))
        self._started_s = time.monotonic()
        # Bookkeeping only: so many that everything finds a place, its replacement too, and more replicas later.
        self._ray_cpus = 2 * math.ceil(booked_cpus(resolved.config)) + 1
        self._ray_address = ""

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException as error:
            self.stop(keep_logs=isinstance(error, StartError))
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> RunningCluster:
        gateway = self._resolved.config.gateway
        return RunningCluster(
            pid=os.getpid(),
            http=f"{'http' if gateway.tls_cert_file is None else 'https'}://{gateway.http_host}:{gateway.http_port}",
            grpc=f"{gateway.grpc_host}:{gateway.grpc_port}",
            model=self._resolved.served_name,
            checkpoint=str(self._resolved.checkpoint.path),
            dtype=self._resolved.dtype,
            num_groups=self._resolved.config.experts.groups,
            attention_replicas=self._resolved.config.attention.replicas,
            max_model_len=self._resolved.config.model.max_model_len,
            log_dir=str(self.runtime_dir / "ray" / "session_latest" / "logs"),
            runtime_dir=str(self.runtime_dir),
            ray_address=self._ray_address,
            ray_cpus=self._ray_cpus,
            config=pinned(self._resolved).model_dump(),
            started_s=psutil.Process().create_time(),
        )

    def stop(self, *, keep_logs: bool = False) -> None:
        """Ends Serve and Ray, and removes the runtime folder; Ray's logs are kept where the start failed."""
        import ray
        from ray.serve.context import _get_global_client

        children = psutil.Process().children(recursive=True)
        with _undisturbed():
            try:
                if ray.is_initialized() and (client := _get_global_client()) is not None:
                    client.shutdown(timeout_s=SHUTDOWN_TIMEOUT_S)
            finally:
                ray.shutdown()
                _end(children)  # also where Ray has not come up as far as that it could end them itself
        for secret in ("secret", TOKEN_FILE):
            (self.runtime_dir / secret).unlink(missing_ok=True)
        if keep_logs and (self.runtime_dir / "ray").exists():
            self._say(f"logs are kept in {self.runtime_dir / 'ray' / 'session_latest' / 'logs'}")
        else:
            shutil.rmtree(self.runtime_dir, ignore_errors=True)

    def _start(self) -> None:
        write_secret(self.runtime_dir / "secret")
        prepare_ray_environment(self.runtime_dir)
        import ray
        from ray import serve
        from ray.serve.context import _get_global_client

        # Imported here: they need Ray's environment to be set.
        from deploy.app import serve_config

        self._say("starting Ray")
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            ray.init(
                num_cpus=self._ray_cpus,
                include_dashboard=False,
                namespace="serve",
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=128 << 20,
                _temp_dir=str(self.runtime_dir / "ray"),
            )
        except Exception as error:  # Ray has no error of its own for a start that failed
            raise StartError(f"Ray did not start: {last_sentence(str(error))}; is this machine overloaded?") from error
        self._ray_address = ray.get_runtime_context().gcs_address
        if _in_main_thread():
            # Ray's own handler of SIGTERM ends the process on the spot, and would leave everything else running.
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self._say("starting Serve")
        serve.start(proxy_location="Disabled")
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(serve_config(self._resolved, str(self.runtime_dir)))
        wait_until_running(client, started_s=self._started_s, say=self._say)


def prepare_ray_environment(runtime_dir: Path) -> None:
    """Makes the cluster's token, and sets what Ray and all its workers inherit."""
    descriptor = os.open(runtime_dir / TOKEN_FILE, os.O_WRONLY | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    os.environ |= ray_environment(runtime_dir)


def ray_environment(runtime_dir: Path) -> dict[str, str]:
    """Full priority, a token of the cluster's own, our packages, no telemetry."""
    root = str(Path(__file__).parents[1])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        "RAY_worker_niceness": "0",  # the default of 15 leaves the data plane behind every other process
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(runtime_dir / TOKEN_FILE),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "VLLM_CACHE_ROOT": str(runtime_dir / "vllm"),
        "VLLM_CONFIG_ROOT": str(runtime_dir / "vllm"),
        "HF_HUB_OFFLINE": "1",
    }


def booked_cpus(config: DeploymentConfig) -> float:
    """CPUs that all replicas book from Ray, the controller and Serve's own actors included."""
    _, copies = config.expert_copies
    groups = config.experts.groups * copies * config.experts.num_cpus
    rest = sum(part.replicas * part.num_cpus for part in (config.router, config.gateway))
    return groups + config.attention.most_replicas * config.attention.num_cpus + rest + 1


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C or `down` must not leave half of the cluster behind."""
    numbers = (signal.SIGINT, signal.SIGTERM) if _in_main_thread() else ()
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end(processes: list[psutil.Process]) -> None:
    """Makes sure that what we started is gone: an engine's child can outlive a Serve replica that was killed."""
    _, alive = psutil.wait_procs(processes, timeout=5)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=5)
