"""The engine processes, checkpoints and reference answers that the tests of this folder share."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
from engine_runs import (
    VOCABULARY,
    Checkpoints,
    EngineProcess,
    Kind,
    Reference,
    RemoteRun,
    Run,
    plain_arguments,
    remote_arguments,
    run,
)
from local_plane import PlaneProcess

from deploy.make_checkpoint import make_checkpoint

# Shards of this size: some hold experts only, some both.
_FIELDS: Mapping[str, object] = {"vocab_size": VOCABULARY, "num_hidden_layers": 3, "max_shard_size": "2MB"}


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[Kind, EngineProcess]]:
    """Both at once, so that they import vLLM at the same time."""
    logs = tmp_path_factory.mktemp("logs")
    with (
        EngineProcess("plain", log=logs / "plain.log") as plain,
        EngineProcess("remote", log=logs / "remote.log") as remote,
    ):
        yield {"plain": plain, "remote": remote}


@pytest.fixture(scope="session")
def plain(engines: Mapping[Kind, EngineProcess]) -> EngineProcess:
    """A process whose vLLM knows nothing of us."""
    return engines["plain"]


@pytest.fixture(scope="session")
def remote(engines: Mapping[Kind, EngineProcess]) -> EngineProcess:
    """A process as an attention replica's."""
    return engines["remote"]


@pytest.fixture(scope="session")
def checkpoints(engines: object, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Random checkpoints by preset, of 3 layers; made while the engines import vLLM."""

    @cache
    def checkpoint(preset: str) -> Path:
        return make_checkpoint(tmp_path_factory.mktemp(preset), preset=preset, **_FIELDS)  # type: ignore[arg-type]

    return checkpoint


@pytest.fixture(scope="session")
def reference(plain: EngineProcess, checkpoints: Checkpoints) -> Reference:
    """Each run once."""

    @cache
    def reference_run(preset: str, dtype: str) -> Run:
        plain.load(plain_arguments(checkpoints(preset), dtype=dtype))
        return run(plain)

    # The cache tells a default from the same value that is given, so all are given.
    return lambda preset, dtype="float32": reference_run(preset, dtype)


@pytest.fixture(scope="session")
def remote_run(remote: EngineProcess, checkpoints: Checkpoints) -> RemoteRun:
    """Each run once; its plane is gone then."""

    @cache
    def distributed_run(preset: str, num_groups: int, dtype: str) -> Run:
        with PlaneProcess(checkpoints(preset), dtype=dtype, num_groups=num_groups) as plane:
            remote.load(remote_arguments(plane.model))
            return run(remote)

    return lambda preset, num_groups=4, dtype="float32": distributed_run(preset, num_groups, dtype)
