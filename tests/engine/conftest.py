"""The engine processes, checkpoints and reference answers that the tests of this folder share."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
from engine_runs import (
    MAX_TOKENS,
    PROMPTS,
    VOCABULARY,
    Checkpoints,
    EngineProcess,
    Kind,
    Outcome,
    Reference,
    plain_arguments,
)

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
    """What an unmodified engine answers to PROMPTS; it stays loaded until the next one is asked for."""

    @cache
    def outcomes(preset: str, dtype: str = "float32") -> list[Outcome]:
        plain.load(plain_arguments(checkpoints(preset), dtype=dtype))
        return plain.generate(PROMPTS, max_tokens=MAX_TOKENS)

    return outcomes
