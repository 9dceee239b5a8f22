"""The cluster that most tests here share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from elastic import give
from ray_cluster import Cluster, started_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two attention replicas, four expert groups, a router and one that stands by, float32."""
    config = {
        "model": {"checkpoint": "embedded", "dtype": "float32", "max_model_len": 512},
        "attention": {"replicas": 2, "kv_cache_mib": 64, "step_timeout_s": 25},
        "router": {"replicas": 2},
        "experts": {"groups": 4},
        # Nothing is scaled until a test raises the bounds. Engines, router and experts share two cores here, so the
        # busiest copy works for a tenth to a fifth of the time.
        "autoscale": {
            "target_busy_share": 0.06,
            "up_busy_share": 0.07,
            "down_busy_share": 0.04,
            "up_delay_s": 3.0,
            "down_delay_s": 6.0,
            "window_s": 3.0,
        },
    }
    with started_cluster(tmp_path_factory.mktemp("home"), config) as cluster:
        yield cluster


@pytest.fixture
def config(cluster: Cluster, tmp_path: Path) -> Iterator[dict]:
    """The cluster's config, which a test may give to it changed; given back afterwards."""
    config = yaml.safe_load((cluster.home / "config.yaml").read_text())
    yield config
    give(cluster, tmp_path / "as_it_was.yaml", config)
