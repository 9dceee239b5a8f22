"""A process with nothing but metrics, for tests of how they are published."""

import sys
import threading
from collections.abc import Iterable

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from cluster.exporter import Publisher
from experts.counting import Histogram, counter, gauge, histogram

ROWS = counter("expertmesh_test_rows_total", "rows", "Rows of a test.", ("group",))
SECONDS = histogram("expertmesh_test_seconds", "seconds", "Times of a test.")
OPEN = gauge("expertmesh_test_open", "1", 'Said with "quotes" and a \\ backslash.', ("name",))


class Collected:
    """One of each kind."""

    def __init__(self, rows: int = 3) -> None:
        self.rows = rows
        self.times = Histogram((0.1, 1.0))
        self.times.observe(0.5)

    def collect(self) -> Iterable[Metric]:
        yield ROWS.family([((0,), self.rows), ((1,), 2**53)])
        yield SECONDS.one(self.times)
        yield OPEN.by_label({'a "name"\n# HELP of two lines': 1})


def samples(text: str) -> dict[tuple[str, str], float]:
    """By name and replica; parsing raises for what is not Prometheus' format."""
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families), "a family was written twice"
    return {(s.name, s.labels.get("replica", s.labels.get("state", ""))): s.value for f in families for s in f.samples}


def main() -> None:
    folder, port, name = sys.argv[1:]
    Publisher(folder=folder, host="127.0.0.1", port=int(port))(f"child#{name}", Collected())
    threading.Event().wait()


if __name__ == "__main__":
    main()
