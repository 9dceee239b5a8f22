"""Pages of metrics: what one process says, how they are gathered from sockets and joined."""

import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from metrics_child import ROWS, Collected, samples
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from cluster.exporter import Page
from cluster.exposition import gather, merge, render


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="em-") as name:  # a short path: it holds sockets
        yield Path(name) / "metrics"


@pytest.fixture
def live(folder: Path) -> Iterator[Page]:
    page = Page("router#live", Collected(), folder=folder, exporter=None)
    page.start()
    yield page
    page.stop()


def test_a_page_says_everything_and_whose_it_is() -> None:
    text = render(Collected(), {"deployment": "router", "replica": "ab12"}).decode()
    found = {s.name: s for family in text_string_to_metric_families(text) for s in family.samples}
    assert found["expertmesh_test_rows_total"].labels == {"deployment": "router", "replica": "ab12", "group": "1"}
    assert found["expertmesh_test_rows_total"].value == 2**53
    assert found["expertmesh_test_seconds_count"].value == 1
    assert found["expertmesh_test_open"].labels["name"] == 'a "name"\n# HELP of two lines'


def test_pages_are_joined_family_by_family() -> None:
    of = {name: render(Collected(rows), {"replica": name}) for name, rows in (("a", 3), ("b", 4))}
    text = merge([of["a"], of["b"], b"", merge([])]).decode()
    found = samples(text)
    assert found["expertmesh_test_seconds_count", "a"] == found["expertmesh_test_seconds_count", "b"] == 1
    lines = text.splitlines()
    assert sum(line.startswith("# HELP expertmesh_test_rows_total ") for line in lines) == 1
    alone = [line for page in of.values() for line in page.decode().splitlines() if not line.startswith("#")]
    assert sorted(line for line in lines if not line.startswith("#")) == sorted(alone)


def test_a_family_without_samples_is_kept_and_harms_no_other() -> None:
    class Nothing:
        def collect(self) -> Iterable[Metric]:
            yield ROWS.family([])

    text = merge([render(Nothing(), {}), render(Collected(), {"replica": "a"}), render(Nothing(), {})]).decode()
    assert samples(text)["expertmesh_test_rows_total", "a"] == 2**53


def test_the_sockets_of_dead_processes_are_removed_and_the_rest_is_gathered(folder: Path, live: Page) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(folder / "experts-0-dead.sock"))
    dead.close()
    gathered = gather(folder)
    assert (len(gathered.pages), gathered.silent) == (1, 0)
    assert [path.name.rpartition("-")[0] for path in folder.glob("*.sock")] == ["router"]


@pytest.mark.parametrize("said", [b"", b"# HELP a b\n# TYPE a gauge\na 1\n", b"# HELP a b\n# TYPE a gauge\na 1\n# EO"])
def test_a_page_that_was_cut_off_is_left_out_whole(folder: Path, said: bytes) -> None:
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "half.sock"))
        listener.listen()

        def die_while_answering() -> None:
            client, _ = listener.accept()
            client.sendall(said)
            client.close()

        dying = threading.Thread(target=die_while_answering)
        dying.start()
        assert gather(folder) == ([], 1)
        dying.join()


def test_a_process_that_says_nothing_costs_a_scrape_its_time_limit_and_no_more(folder: Path, live: Page) -> None:
    with ExitStack() as sockets:
        for i in range(5):  # stopped processes: the kernel still connects for them
            listener = sockets.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(folder / f"stopped{i}.sock"))
            listener.listen()
        begun_s = time.monotonic()
        gathered = gather(folder, timeout_s=0.3)
        assert time.monotonic() - begun_s < 2.0
        assert (len(gathered.pages), gathered.silent) == (1, 5)
    assert len(list(folder.glob("stopped*.sock"))) == 5, "they may go on"


def test_a_process_that_nobody_can_connect_to_is_silent(folder: Path) -> None:
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as waiting:
        path = str(folder / "full.sock")
        listener.bind(path)
        listener.listen(0)
        while True:  # until its queue is full
            client = waiting.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            try:
                client.connect(path)
            except BlockingIOError:
                break
        assert gather(folder, timeout_s=0.3) == ([], 1)
