"""A step that cannot be computed ends exactly its own requests, with a reason, and the engine lives on."""

import time
from collections.abc import Iterator

import pytest
from engine_runs import (
    MAX_TOKENS,
    PROMPTS,
    STEP_TIMEOUT_S,
    Checkpoints,
    EngineProcess,
    Outcome,
    Reference,
    remote_arguments,
)
from local_plane import PlaneProcess

LATEST_S = STEP_TIMEOUT_S + 2  # a busy machine's scheduling comes on top
BEFORE = 4  # steps, so tokens, before something breaks


class Served:
    """An engine, its plane, and what the right answers are."""

    def __init__(self, engine: EngineProcess, plane: PlaneProcess, expected: list[Outcome]) -> None:
        self.engine, self.plane, self.expected = engine, plane, expected

    def begin(self, *requests: int) -> None:
        """Adds these prompts and takes the first steps, which are right."""
        for index in requests:
            self.engine.add(str(index), PROMPTS[index], max_tokens=MAX_TOKENS)
        for request_id, outcome in self.engine.step(BEFORE).items():
            assert outcome.tokens == self.expected[int(request_id)].tokens[:BEFORE]

    def failing_step(self) -> dict[str, Outcome]:
        """One step, which must be over in time."""
        started_s = time.monotonic()
        outcomes = self.engine.step()
        assert time.monotonic() - started_s < LATEST_S
        return outcomes

    def check_ended(self, outcomes: dict[str, Outcome], *requests: int, because: str) -> None:
        assert sorted(outcomes) == sorted(map(str, requests))
        for request_id, outcome in outcomes.items():
            assert outcome.finish_reason == "error"
            assert because in (outcome.stop_reason or "")
            # No token of the poisoned step: only those from before it.
            assert outcome.tokens == self.expected[int(request_id)].tokens[:BEFORE]

    def check_right(self) -> None:
        assert self.engine.generate(PROMPTS, max_tokens=MAX_TOKENS) == self.expected


@pytest.fixture(scope="module")
def served(remote: EngineProcess, checkpoints: Checkpoints, reference: Reference) -> Iterator[Served]:
    expected = reference("nano").outcomes
    with PlaneProcess(checkpoints("nano"), dtype="float32", num_groups=2) as plane:
        remote.load(remote_arguments(plane.model))
        yield Served(remote, plane, expected)


@pytest.fixture(autouse=True)
def whole_again(served: Served) -> Iterator[None]:
    """Whatever a test broke, the same engine gives the right answers after it."""
    yield
    served.check_right()


def test_a_group_that_is_gone_ends_the_steps_requests_with_its_name(served: Served) -> None:
    served.begin(0, 1, 2)
    served.plane.do("stop_group 1")
    served.check_ended(served.failing_step(), 0, 1, 2, because="no live copy of expert group 1 within")
    served.plane.do("start_group 1")


def test_a_request_that_comes_later_is_answered_right(served: Served) -> None:
    served.begin(0, 1)
    served.plane.do("stop_group 1")
    served.engine.tell("step", count=1)
    time.sleep(STEP_TIMEOUT_S / 2)
    served.plane.do("forget_group 1")  # as an expired lease: the reason stays the same
    served.check_ended(served.engine.stepped(), 0, 1, because="expert group 1")
    served.plane.do("start_group 1")
    served.engine.add("2", PROMPTS[2], max_tokens=MAX_TOKENS)
    assert served.engine.finish() == {"2": served.expected[2]}


def test_a_group_that_comes_back_in_time_costs_no_token(served: Served) -> None:
    served.begin(0, 1, 2)
    served.plane.do("stop_group 0")
    served.engine.tell("step", count=1000)
    time.sleep(0.5)
    served.plane.do("start_group 0")
    assert served.engine.stepped() == {str(index): served.expected[index] for index in (0, 1, 2)}


def test_a_group_that_hangs_ends_the_steps_requests_with_its_name(served: Served) -> None:
    served.begin(0, 1)
    served.plane.do(f"hang_group 0 {int(STEP_TIMEOUT_S) + 1}")
    served.check_ended(served.failing_step(), 0, 1, because="expert group 0 did not answer within")
    time.sleep(1.5)


def test_a_group_that_hangs_for_a_moment_costs_no_token(served: Served) -> None:
    served.begin(0, 1)
    served.plane.do("hang_group 0 1")
    assert served.engine.finish() == {str(index): served.expected[index] for index in (0, 1)}


def test_a_router_that_is_gone_ends_the_steps_requests(served: Served) -> None:
    served.begin(0, 1)
    served.plane.do("stop_router")
    served.check_ended(served.failing_step(), 0, 1, because="the router did not answer within 3 s")
    served.plane.do("start_router")


def test_a_router_that_comes_back_in_time_costs_no_token(served: Served) -> None:
    served.begin(0, 1)
    served.plane.do("stop_router")
    served.engine.tell("step", count=1000)
    time.sleep(0.5)
    served.plane.do("start_router")
    assert served.engine.stepped() == {str(index): served.expected[index] for index in (0, 1)}


def test_a_router_that_hangs_ends_the_steps_requests(served: Served) -> None:
    served.begin(0, 1)
    served.plane.do(f"hang_router {int(STEP_TIMEOUT_S) + 1}")
    served.check_ended(served.failing_step(), 0, 1, because="the router did not answer within 3 s")
    time.sleep(1.5)


def test_a_prompt_whose_own_step_is_poisoned_leaves_no_token(served: Served) -> None:
    served.plane.do("stop_group 1")
    served.engine.add("3", PROMPTS[3], max_tokens=MAX_TOKENS)
    [outcome] = served.failing_step().values()
    assert (outcome.tokens, outcome.finish_reason) == ([], "error")
    served.plane.do("start_group 1")
