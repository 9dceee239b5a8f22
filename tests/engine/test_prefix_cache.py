"""No KV block that was computed from zeros is ever found again by a prefix cache."""

from collections.abc import Iterator

import pytest
from engine_runs import Checkpoints, EngineProcess, Outcome, make_prompts, plain_arguments, remote_arguments
from local_plane import PlaneProcess

# On a CPU vLLM has a prefix cache for models without latent attention only.
PRESET = "mixtral"
[PROMPT] = make_prompts(1, seed=2, shortest=150, longest=150)
MAX_TOKENS = 4


@pytest.fixture(scope="module")
def plane(checkpoints: Checkpoints) -> Iterator[PlaneProcess]:
    with PlaneProcess(checkpoints(PRESET), dtype="float32", num_groups=2) as plane:
        yield plane


@pytest.fixture(scope="module")
def expected(plain: EngineProcess, checkpoints: Checkpoints) -> list[Outcome]:
    plain.load(plain_arguments(checkpoints(PRESET)))
    return plain.generate([PROMPT], max_tokens=MAX_TOKENS)


@pytest.fixture
def engine(remote: EngineProcess, plane: PlaneProcess) -> EngineProcess:
    """With an empty cache."""
    remote.load(remote_arguments(plane.model, enable_prefix_caching=True))
    return remote


def test_a_prefix_cache_finds_what_was_computed(engine: EngineProcess, expected: list[Outcome]) -> None:
    assert engine.generate([PROMPT], max_tokens=MAX_TOKENS) == expected
    assert engine.generate([PROMPT], max_tokens=MAX_TOKENS) == expected
    assert engine.do("cached_tokens", request_id="batch-0") > 100


def test_a_poisoned_prompt_is_computed_again(
    engine: EngineProcess, plane: PlaneProcess, expected: list[Outcome]
) -> None:
    plane.do("stop_group 1")
    engine.add("poisoned", PROMPT, max_tokens=MAX_TOKENS)
    assert engine.step()["poisoned"].finish_reason == "error"
    plane.do("start_group 1")
    assert engine.generate([PROMPT], max_tokens=MAX_TOKENS) == expected
    assert engine.do("cached_tokens", request_id="batch-0") == 0


def test_a_prompt_that_is_aborted_within_its_poisoned_step_is_computed_again(
    engine: EngineProcess, plane: PlaneProcess, expected: list[Outcome]
) -> None:
    plane.do("stop_group 1")
    engine.add("aborted", PROMPT, max_tokens=MAX_TOKENS)
    engine.do("abort_within_step", request_id="aborted")
    plane.do("start_group 1")
    assert engine.generate([PROMPT], max_tokens=MAX_TOKENS) == expected
    assert engine.do("cached_tokens", request_id="batch-0") == 0
