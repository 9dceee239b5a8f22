"""Requests whose steps lack rows are marked with their number, exactly those, and nobody inherits it unmarked."""

import json
from collections import Counter
from collections.abc import Iterator

import pytest
from engine_runs import MAX_TOKENS, PROMPTS, Checkpoints, EngineProcess, make_prompts, remote_arguments
from local_plane import PlaneProcess

# On a CPU vLLM has a prefix cache for models without latent attention only.
CACHED_PRESET = "mixtral"
[LONG_PROMPT] = make_prompts(1, seed=2, shortest=150, longest=150)


class Served:
    """An engine on a plane."""

    def __init__(self, engine: EngineProcess, plane: PlaneProcess) -> None:
        self.engine, self._plane = engine, plane
        self._before = self.counted()

    def counted(self) -> int:
        """Rows that the router has ever dropped."""
        return json.loads(self._plane.do("counts")).get("dropped_rows", 0)

    def step(self) -> int:
        """How many rows were dropped in one step."""
        self.engine.step()
        self._before, before = self.counted(), self._before
        return self._before - before


@pytest.fixture(scope="module")
def served(remote: EngineProcess, checkpoints: Checkpoints) -> Iterator[Served]:
    with PlaneProcess(checkpoints("nano"), dtype="float32", num_groups=4, capacity_factor=1.0) as plane:
        remote.load(remote_arguments(plane.model))
        yield Served(remote, plane)


def test_each_request_is_marked_with_the_rows_that_were_dropped_in_its_own_steps(served: Served) -> None:
    """Three requests that come and go at different times."""
    begins, lengths, expected = {0: 0, 1: 2, 2: 5}, {0: 4, 1: 9, 2: 3}, Counter[int]()
    for step in range(12):
        for request in [request for request, first in begins.items() if first == step]:
            served.engine.add(str(request), PROMPTS[request], max_tokens=lengths[request])
        dropped = served.step()
        for request, first in begins.items():
            if first <= step < first + lengths[request]:
                expected[request] += dropped
    assert all(expected[request] for request in begins) and len(set(expected.values())) == 3
    for request in begins:
        outcome = served.engine.do("outcome", request_id=str(request))
        assert (outcome["finish_reason"], outcome["dropped_rows"]) == ("length", expected[request])


def test_a_step_of_one_token_drops_nothing_and_leaves_its_request_unmarked(served: Served) -> None:
    [outcome] = served.engine.generate([PROMPTS[0][:1]], max_tokens=MAX_TOKENS)
    assert outcome.dropped_rows == 0 and served.counted() == served._before


def test_without_a_capacity_factor_nothing_is_dropped_and_nobody_is_marked(
    remote: EngineProcess, checkpoints: Checkpoints
) -> None:
    with PlaneProcess(checkpoints("nano"), dtype="float32", num_groups=4) as plane:
        remote.load(remote_arguments(plane.model))
        outcomes = remote.generate(PROMPTS, max_tokens=MAX_TOKENS)
        assert not any(outcome.dropped_rows for outcome in outcomes)
        assert Served(remote, plane).counted() == 0


def test_a_prefix_cache_never_finds_what_was_computed_without_rows(
    remote: EngineProcess, checkpoints: Checkpoints
) -> None:
    with PlaneProcess(checkpoints(CACHED_PRESET), dtype="float32", num_groups=2, capacity_factor=1.0) as plane:
        remote.load(remote_arguments(plane.model, enable_prefix_caching=True))
        for _ in range(2):
            [outcome] = remote.generate([LONG_PROMPT], max_tokens=4)
            assert outcome.dropped_rows > 0
            assert remote.do("cached_tokens", request_id="batch-0") == 0
