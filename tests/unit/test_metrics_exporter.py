"""One page for a node: gathered from real sockets, served by one process of several, also while they die."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import metrics_child
import pytest
from metrics_child import ROWS, Collected, samples
from prometheus_client import Metric

from cluster.exporter import MetricsConfig, Page, Publisher
from cluster.exposition import END

ROOT = Path(__file__).parents[2]


class Broken:
    def collect(self) -> Iterable[Metric]:
        yield ROWS.family([((0,), 1)])
        raise RuntimeError("a collector with a bug")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="em-") as name:  # a short path: it holds sockets
        yield Path(name) / "metrics"


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def publisher(folder: Path, port: int) -> Publisher:
    return Publisher(folder=str(folder), host="127.0.0.1", port=port)


@pytest.fixture
def pages() -> Iterator[Callable[[Page | None], Page]]:
    """Stops what it is given."""
    with ExitStack() as opened:

        def keep(page: Page | None) -> Page:
            assert page is not None
            opened.callback(page.stop)
            return page

        yield keep


def scrape(port: int, path: str = "/metrics") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def eventually(port: int, holds: Callable[[dict[tuple[str, str], float]], bool], *, timeout_s: float = 60.0) -> float:
    """Scrapes until it holds; how long that took. A refused connection is no answer yet."""
    begun_s = time.monotonic()
    while time.monotonic() - begun_s < timeout_s:
        try:
            if holds(samples(scrape(port)[1])):
                return time.monotonic() - begun_s
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"nothing like that within {timeout_s:g} s")


def test_processes_of_a_node_are_one_page_on_one_port(
    publisher: Publisher, port: int, pages: Callable[[Page | None], Page]
) -> None:
    pages(publisher("router#r", Collected()))
    pages(publisher("experts-0#e", Collected()))
    pages(publisher("attention#a", Collected(), exports=False))
    answered = ("expertmesh_exporter_processes", "answered")
    eventually(port, lambda found: found[answered] == 3)
    found = samples(scrape(port)[1])
    assert {replica for name, replica in found if name == "expertmesh_test_seconds_count"} == {"r", "e", "a"}
    assert found["expertmesh_exporter_processes", "silent"] == 0


def test_a_collector_with_a_bug_is_left_out_and_the_others_are_served(
    publisher: Publisher, port: int, pages: Callable[[Page | None], Page]
) -> None:
    pages(publisher("router#r", Broken()))
    pages(publisher("experts-0#e", Collected()))
    silent = ("expertmesh_exporter_processes", "silent")
    for _ in range(2):  # the thread has survived it
        eventually(port, lambda found: found[silent] == 1 and ("expertmesh_test_seconds_count", "e") in found)


def test_a_page_that_leaves_hands_the_port_on(publisher: Publisher, port: int) -> None:
    first, second = publisher("router#r", Collected()), publisher("experts-0#e", Collected())
    assert first is not None and second is not None
    eventually(port, lambda found: len({replica for _, replica in found}) == 4)
    first.stop()
    eventually(port, lambda found: {replica for _, replica in found} == {"e", "answered", "silent"})
    second.stop()
    with pytest.raises(OSError):
        scrape(port)


def test_a_port_that_is_taken_is_asked_for_again_and_keeps_nothing_from_running(
    publisher: Publisher, port: int, pages: Callable[[Page | None], Page], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger="cluster.exporter")  # other libraries raise the level of all
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        pages(publisher("router#r", Collected()))
        time.sleep(2.5)
    eventually(port, lambda found: ("expertmesh_test_seconds_count", "r") in found)
    assert [record.message for record in caplog.records].count("metrics are not served") == 1


def test_only_metrics_are_served_and_only_to_be_read(
    publisher: Publisher, port: int, pages: Callable[[Page | None], Page]
) -> None:
    pages(publisher("router#r", Collected()))
    eventually(port, lambda found: True)
    assert scrape(port, "/")[0] == 404
    assert scrape(port, "/metrics?x=1")[0] == 200
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"POST /metrics HTTP/1.0\r\n\r\n")
        assert b" 501 " in client.recv(1000)


def test_clients_that_never_ask_do_not_keep_the_port_for_ever(
    publisher: Publisher, port: int, pages: Callable[[Page | None], Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.exporter._Handler.timeout", 0.5)
    pages(publisher("router#r", Collected()))
    eventually(port, lambda found: True)
    with ExitStack() as idle:
        for _ in range(20):
            idle.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        assert eventually(port, lambda found: ("expertmesh_test_seconds_count", "r") in found) < 10


def test_where_metrics_are_off_or_cannot_be_published_a_process_runs_without(folder: Path) -> None:
    off = Publisher.of(MetricsConfig(enabled=False), folder)
    assert off("router#r", Collected()) is None
    assert not folder.exists()
    too_long = Publisher(folder=str(folder / ("x" * 100)), host="127.0.0.1", port=1)
    assert too_long("router#r", Collected()) is None


def test_a_killed_exporter_is_replaced_by_another_process(publisher: Publisher, port: int) -> None:
    with ExitStack() as running:
        children = {name: running.enter_context(_child(publisher, name)) for name in ("one", "two", "three")}
        rows = "expertmesh_test_rows_total"
        eventually(port, lambda found: {(rows, name) for name in children} <= found.keys())
        for _ in range(2):
            holder = _holder(port, children)
            children.pop(holder).kill()
            took_s = eventually(port, lambda found: {n for _, n in found} == {*children, "answered", "silent"})
            assert took_s < 20, "about a second, and what a busy machine adds"


def test_every_scrape_is_whole_while_processes_die_and_stop(publisher: Publisher, port: int) -> None:
    page = publisher("router#keeps-the-port", Collected())
    assert page is not None
    try:
        eventually(port, lambda found: True)
        for round_ in range(2):
            with _child(publisher, f"dies{round_}") as dying, _child(publisher, f"stops{round_}") as stopping:
                eventually(port, lambda found: found["expertmesh_exporter_processes", "answered"] == 3)
                threading.Timer(0.05 * round_, dying.kill).start()
                threading.Timer(0.1, stopping.send_signal, [signal.SIGSTOP]).start()
                until_s = time.monotonic() + 1.5
                while time.monotonic() < until_s:
                    status, text = scrape(port)
                    found = samples(text)
                    assert status == 200
                    assert END.decode() not in text
                    assert found["expertmesh_test_seconds_count", "keeps-the-port"] == 1
                eventually(port, lambda found: found["expertmesh_exporter_processes", "silent"] == 1)
                stopping.send_signal(signal.SIGCONT)
            eventually(port, lambda found: found["expertmesh_exporter_processes", "answered"] == 1)
    finally:
        page.stop()


def _child(publisher: Publisher, name: str) -> "_Child":
    return _Child(
        [sys.executable, metrics_child.__file__, publisher.folder, str(publisher.port), name],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


class _Child(subprocess.Popen[bytes]):
    def __exit__(self, *error: object) -> None:
        self.kill()
        self.wait()


def _holder(port: int, children: dict[str, _Child]) -> str:
    """Whose process listens on the port, as the kernel says."""
    inode = next(
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()
        if f":{port:04X} 00000000:0000" in line
    )
    for name, child in children.items():
        links = (os.readlink(entry) for entry in Path(f"/proc/{child.pid}/fd").iterdir())
        if f"socket:[{inode}]" in links:
            return name
    raise AssertionError("nobody of them listens")
