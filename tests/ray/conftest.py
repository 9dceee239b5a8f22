"""The cluster that most tests here share."""

from collections.abc import Iterator

import pytest
from ray_cluster import Cluster, started_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two attention replicas, four expert groups, float32."""
    config = {
        "model": {"checkpoint": "embedded", "dtype": "float32", "max_model_len": 512},
        "attention": {"replicas": 2, "kv_cache_mib": 64, "step_timeout_s": 25},
        "experts": {"groups": 4},
    }
    with started_cluster(tmp_path_factory.mktemp("home"), config) as cluster:
        yield cluster
