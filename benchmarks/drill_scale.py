"""Changes the number of copies of the expert groups of a running cluster, as its user would."""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import yaml

from benchmarks.drill_cluster import DrillError, View
from benchmarks.serving_process import ROOT, clean_environment
from deploy.config import DeploymentConfig
from deploy.local import RunningCluster

HOME = "EXPERTMESH_HOME"


def scale(view: View, replicas: int, *, timeout_s: float) -> None:
    """`expertmesh up` with a changed config on the running cluster; returns at its new full strength.

    Raises DrillError with what the command said where it fails, or what is missing after `timeout_s`.
    """
    deadline_s = time.monotonic() + timeout_s
    home = psutil.Process(view.owner_pid).environ()[HOME]
    running = RunningCluster(**json.loads((Path(home) / "cluster.json").read_text()))
    with tempfile.TemporaryDirectory(prefix="em-scale-") as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(yaml.safe_dump(with_replicas(running.config, replicas)))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "deploy.cli", "up", "--config", str(config)],
                cwd=ROOT,
                env={**clean_environment(), HOME: home},
                capture_output=True,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise DrillError(f"`expertmesh up` with a changed config did not end within {timeout_s:.0f} s") from None
    if done.returncode:
        raise DrillError(f"the cluster was not scaled: {done.stderr.strip() or done.stdout.strip()}")
    grown = replace(view, size=replace(view.size, replicas=replicas))
    grown.wait_until_whole((), timeout_s=max(deadline_s - time.monotonic(), 1.0))


def with_replicas(config: dict[str, object], replicas: int) -> dict[str, object]:
    """A config with another number of copies of every group."""
    whole = DeploymentConfig.model_validate(config)
    experts = whole.experts.model_copy(update={"replicas": replicas})
    return whole.model_copy(update={"experts": experts}).model_dump()
