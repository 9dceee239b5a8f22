"""One real cluster for all tests that need Ray."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from ray_cluster import ROOT, STOP_TIMEOUT_S, Cluster, alive, free_port, wait_until_ready


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two attention replicas, four expert groups, float32, on ports of its own; gone without a trace afterwards."""
    home = tmp_path_factory.mktemp("home")
    config = {
        "model": {"checkpoint": "embedded", "dtype": "float32", "max_model_len": 512},
        "gateway": {"http_port": free_port(), "grpc_port": free_port()},
        "attention": {"replicas": 2, "kv_cache_mib": 64, "step_timeout_s": 25},
        "experts": {"groups": 4},
    }
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
        running = wait_until_ready(home, owner)
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
    left = [process for process in map(alive, started) if process is not None]
    assert not left, f"processes left behind: {left}"
    assert owner.returncode == 0
    assert not Path(running["log_dir"]).exists()
    assert not (home / "cluster.json").exists()
