"""Debian's real Prometheus reads a page as the exporter of a node serves it."""

import socket
import tempfile
import time
from pathlib import Path

import pytest
from metrics_child import Collected
from prometheus import binary, scraping

from cluster.exporter import Publisher


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.skipif(binary() is None, reason="there is no `prometheus` on PATH: apt-get install prometheus")
def test_prometheus_answers_for_a_page_of_two_processes(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="em-") as folder:  # a short path: it holds sockets
        publisher = Publisher(folder=f"{folder}/metrics", host="127.0.0.1", port=free_port())
        pages = [publisher("router#a", Collected(3)), publisher("experts-0#b", Collected(4))]
        with scraping(tmp_path, port=free_port(), target=f"127.0.0.1:{publisher.port}") as prometheus:
            deadline_s = time.monotonic() + 30
            while prometheus.number('sum(expertmesh_test_rows_total{group="0"})') != 7:
                assert time.monotonic() < deadline_s, prometheus.query("up")
                time.sleep(0.3)
            assert prometheus.number('expertmesh_test_seconds_count{deployment="router",replica="a"}') == 1
            assert prometheus.number('expertmesh_exporter_processes{state="answered"}') == 2
        for page in pages:
            assert page is not None
            page.stop()
