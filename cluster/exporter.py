"""One page of metrics for each Ray node: every process publishes its own on a Unix socket, and one process of the node
gathers them on a port.

Which one is settled by a file lock: whoever holds it serves the port. The kernel frees the lock of a process that
dies, however it dies, and another one takes over within a second. So a node needs no process of its own for this, and
it does not matter which parts of the cluster it hosts.
"""

import fcntl
import http.server
import logging
import os
import secrets
import socket
import socketserver
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from prometheus_client import Metric
from prometheus_client.registry import Collector
from pydantic import Field

from cluster.exposition import END, gather, merge, render
from experts.config import Settings
from experts.counting import gauge

log = logging.getLogger(__name__)

TRY_EVERY_S = 1.0  # for the lock, and for the port where it is taken
CLIENT_TIMEOUT_S = 5.0  # for a peer that does not read, or does not say what it wants
MAX_CLIENTS = 8
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

EXPORTER_PROCESSES = gauge(
    "expertmesh_exporter_processes",
    "processes",
    "Processes of the node, by whether they gave their metrics to this scrape (answered, silent).",
    ("state",),
)


class MetricsConfig(Settings):
    enabled: bool = True
    host: str = "127.0.0.1"  # address that the exporter of a node listens on
    port: int = Field(default=9464, ge=1, le=65535)


@dataclass(frozen=True, slots=True, kw_only=True)
class Publisher:
    """How a process publishes its metrics (`experts.counting.Publish`); plain values, so that it travels anywhere."""

    folder: str  # of the node's sockets and the lock
    host: str
    port: int
    enabled: bool = True

    @classmethod
    def of(cls, config: MetricsConfig, runtime_dir: str | Path) -> Self:
        return cls(folder=f"{runtime_dir}/metrics", host=config.host, port=config.port, enabled=config.enabled)

    def __call__(self, member_id: str, collector: Collector, *, exports: bool = True) -> "Page | None":
        """Publishes from now on, until the process ends; None where metrics are off or cannot be published.

        exports: whether this process may serve the node's port. Not for one that has another beside it and whose
        thread is always busy.
        """
        if not self.enabled:
            return None
        try:
            page = Page(member_id, collector, folder=Path(self.folder), exporter=Exporter(self) if exports else None)
        except OSError as error:  # what is counted must not keep anything from being served
            log.warning("metrics are not published", extra={"folder": self.folder, "reason": str(error)})
            return None
        page.start()
        return page


OFF = Publisher(folder="", host="", port=0, enabled=False)


class Page(threading.Thread):
    """Answers whoever connects to the process's socket with all its families, and takes part in the election."""

    def __init__(self, member_id: str, collector: Collector, *, folder: Path, exporter: "Exporter | None") -> None:
        """Raises OSError where no socket can be made."""
        super().__init__(name="metrics", daemon=True)
        deployment, _, replica = member_id.partition("#")
        self._labels = {"deployment": deployment, "replica": replica}
        self._collector = collector
        self._exporter = exporter
        self._stopped = threading.Event()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = folder / f"{deployment}-{secrets.token_hex(4)}.sock"
        self._listener = _listen(self._path)

    def run(self) -> None:
        while not self._stopped.is_set():
            if self._exporter is not None:
                self._exporter.try_to_serve()
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as error:
                if not self._stopped.wait(TRY_EVERY_S):
                    log.warning("metrics not given", extra={"reason": str(error)})
                continue
            with client:
                self._answer(client)

    def stop(self) -> None:
        """Ends the thread within TRY_EVERY_S, and leaves port, lock and socket, as the end of a process does."""
        self._stopped.set()
        self.join()
        self._path.unlink(missing_ok=True)
        self._listener.close()
        if self._exporter is not None:
            self._exporter.close()

    def _answer(self, client: socket.socket) -> None:
        try:
            client.settimeout(CLIENT_TIMEOUT_S)
            client.sendall(render(self._collector, self._labels) + END)
        except OSError:
            pass  # it did not wait
        except Exception as error:  # a bug in a collector must not end the others' metrics with this thread
            log.exception("metrics not rendered", exc_info=error)


class Exporter:
    """Serves the node's port, if this process gets the lock and the port."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._lock: int | None = None
        self._server: _HttpServer | None = None
        self._said = ""

    @property
    def serving(self) -> bool:
        return self._server is not None

    def try_to_serve(self) -> None:
        """To be called once in a while; takes no time."""
        if self._server is not None:
            return
        folder, address = Path(self._publisher.folder), (self._publisher.host, self._publisher.port)
        try:
            if self._lock is None:
                self._lock = _lock(folder / "exporter.lock")
            if self._lock is None:
                return
            self._server = _HttpServer(address, folder)
        except OSError as error:
            if str(error) != self._said:  # once, and not every second
                self._said = str(error)
                log.warning("metrics are not served", extra={"address": address, "reason": str(error)})
            return
        threading.Thread(target=self._server.serve_forever, name="metrics-exporter", daemon=True).start()
        log.info("metrics are served", extra={"address": address})

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class _HttpServer(http.server.ThreadingHTTPServer):
    """GET /metrics, for a few clients at a time."""

    def __init__(self, address: tuple[str, int], folder: Path) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.folder = folder
        self._places = threading.BoundedSemaphore(MAX_CLIENTS)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks for the host's name, which may take seconds

    def process_request(self, request, client_address) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request, client_address) -> None:
        log.info("metrics not delivered", exc_info=True)  # a client that left, most likely


class _Handler(http.server.BaseHTTPRequestHandler):
    server_version, sys_version = "expertmesh", ""
    timeout = CLIENT_TIMEOUT_S

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404)
            return
        assert isinstance(self.server, _HttpServer)
        pages, silent = gather(self.server.folder)
        body = merge([*pages, render(_Answered(len(pages), silent), {})])
        self.send_response(200)
        self.send_header("Content-Type", _CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """A scrape is nothing to write down."""


@dataclass(frozen=True, slots=True)
class _Answered:
    answered: int
    silent: int

    def collect(self) -> Iterable[Metric]:
        yield EXPORTER_PROCESSES.by_label({"answered": self.answered, "silent": self.silent})


def _listen(path: Path) -> socket.socket:
    """Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        beside = path.with_suffix(".new")
        listener.bind(str(beside))
        listener.listen(MAX_CLIENTS)
        beside.rename(path)  # only now: a socket that refuses is taken for a dead process's
        listener.settimeout(TRY_EVERY_S)
    except OSError:
        listener.close()
        raise
    return listener


def _lock(path: Path) -> int | None:
    """A file descriptor that holds the lock until it is closed; None where another process does. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor
