"""Debian's real Prometheus as a child process, which scrapes one page."""

import json
import os
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prometheus:
    """A running server."""

    http: str

    def query(self, expression: str) -> list[dict]:
        """The samples of an instant query, each with `metric` and `value`; raises for one that is refused."""
        url = f"{self.http}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]["result"]

    def number(self, expression: str) -> float | None:
        """The one sample of an instant query; None where there is none."""
        found = self.query(expression)
        assert len(found) < 2, f"{expression} has {len(found)} samples"
        return float(found[0]["value"][1]) if found else None


def binary() -> str | None:
    """Of Debian's package `prometheus`; None where it is not installed."""
    return shutil.which("prometheus")


@contextmanager
def scraping(folder: Path, *, port: int, target: str, rules: Path | None = None) -> Iterator[Prometheus]:
    """A server on a free port that scrapes target (`host:port`) every second, and keeps its data in folder.

    rules: a file of rules, evaluated every second.
    """
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [] if rules is None else [str(rules)],
        "scrape_configs": [{"job_name": "expertmesh", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [
        binary() or "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    # Without the environment's proxies, which would be asked for a page of this machine.
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        server = Prometheus(http=f"http://127.0.0.1:{port}")
        _wait_until_ready(server, process, folder)
        yield server
    finally:
        process.terminate()
        process.wait(STOP_TIMEOUT_S)


def _wait_until_ready(server: Prometheus, process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{server.http}/-/ready", timeout=5):
                return
        except OSError:  # an HTTPError is one, too
            time.sleep(0.1)
    raise AssertionError(f"Prometheus is not ready:\n{(folder / 'prometheus.log').read_text()[-2000:]}")
