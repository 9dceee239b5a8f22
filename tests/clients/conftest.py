"""The clusters that clients are tested against: one that runs already, or our own."""

import os
import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from asking import Server
from plain import models
from ray_cluster import started_cluster

MODEL_LEN = 512


def configured(home: Path, key: str | None) -> dict:
    """Sections of a small deployment's config file; with a key it asks for that."""
    gateway: dict[str, object] = {"auth": "none"}
    if key is not None:
        keys_file = home / "keys"
        keys_file.touch(mode=0o600)
        keys_file.write_text(f"{key}\n")
        gateway = {"auth": "keys", "keys_file": str(keys_file)}
    return {
        "model": {"checkpoint": "embedded", "dtype": "float32", "max_model_len": MODEL_LEN},
        "attention": {"kv_cache_mib": 64},
        "experts": {"groups": 2},
        "gateway": gateway,
    }


def serving(home: Path, key: str | None) -> Iterator[Server]:
    """The cluster that EXPERTMESH_TEST_HTTP, _GRPC and _KEY name; without them one is started."""
    found = os.environ.get("EXPERTMESH_TEST_HTTP")
    if found is not None:
        address = os.environ["EXPERTMESH_TEST_GRPC"]
        yield _named(Server(http=found, grpc=address, model="", key=os.environ.get("EXPERTMESH_TEST_KEY")))
        return
    with started_cluster(home, configured(home, key)) as cluster:
        yield _named(Server(http=cluster.http, grpc=cluster.grpc, model="", key=key))


def _named(server: Server) -> Server:
    (model,) = models(server)
    return replace(server, model=model)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A cluster that asks for a key."""
    yield from serving(tmp_path_factory.mktemp("home"), secrets.token_urlsafe(24))


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A cluster as `make serve` starts it: without keys, for this machine only."""
    yield from serving(tmp_path_factory.mktemp("home"), None)
