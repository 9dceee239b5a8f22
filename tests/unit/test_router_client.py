"""The engine's side of a question: it never raises, it ends in time, and a poisoned step poisons nothing else."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from local_plane import LocalPlane
from peers import LAYER, Reference, wait_until
from played_router import Engine

from cluster.step import Step
from experts.errors import LinkError


@pytest.fixture(scope="module")
def plane(nano: Path) -> Iterator[LocalPlane]:
    """Two groups; tests start and stop what they need."""
    with LocalPlane(nano, dtype="float32", num_groups=2, max_rows=16) as plane:
        yield plane.start()


@pytest.fixture(scope="module")
def reference(plane: LocalPlane) -> Reference:
    return Reference(plane)


@pytest.fixture
def step() -> Step:
    return Step()


@pytest.fixture
def engine(plane: LocalPlane, step: Step) -> Iterator[Engine]:
    ensure_all_is_up(plane)
    engine = Engine(plane, step, step_timeout_s=4.0)
    yield engine
    engine.client._lose_link()


def ensure_all_is_up(plane: LocalPlane) -> None:
    for group in {0, 1} - {replica.group for replica in plane.groups}:
        plane.start_group(group)
    if plane.router is None:
        plane.start_router()
    router = plane.router
    assert router is not None
    wait_until(lambda: set(router._links) == set(plane.groups))


def test_layers_of_a_step_are_answered_right(engine: Engine, reference: Reference) -> None:
    for turn in range(3):
        engine.step.begin()
        for layer in reference.shape.moe_layers:
            question = reference.question(1 + 5 * turn, seed=layer)
            reference.check(engine.layer(question, layer), question, layer=layer)
        assert engine.step.take() is None


def test_an_answer_is_the_callers_own_memory(engine: Engine, reference: Reference) -> None:
    first = engine.layer(reference.question(3))
    kept = first.clone()
    engine.layer(reference.question(3, seed=1))
    assert torch.equal(first, kept)
    first *= 2  # vLLM scales it in place


def test_with_no_router_at_all_the_step_is_poisoned_within_its_timeout(
    plane: LocalPlane, step: Step, reference: Reference
) -> None:
    engine = Engine(plane, step, step_timeout_s=0.4, address="unix:/tmp/no-such-router.sock")
    question = reference.question(2)
    began_s = time.monotonic()
    answer = engine.layer(question)
    assert 0.3 < time.monotonic() - began_s < 1.5
    assert not answer.any() and answer.shape == question.x.shape
    assert step.poisoned
    began_s = time.monotonic()
    assert not engine.layer(question).any()
    assert time.monotonic() - began_s < 0.1  # the rest of a poisoned step waits for nothing
    reason = step.take()
    assert reason is not None and "the router did not answer within 0.4 s" in reason and "No such file" in reason
    assert not step.poisoned


def test_a_router_that_dies_between_question_and_answer_and_comes_back_answers_right(
    plane: LocalPlane, engine: Engine, reference: Reference
) -> None:
    question = reference.question(4)
    reference.check(engine.layer(question), question)
    engine.step.begin()
    # Held up at the experts, so that the router surely dies with the question in flight.
    for server in plane.groups.values():
        server.post(lambda: time.sleep(0.4))
    engine.client.ask(LAYER, question.x, question.logits, scale=1.0)
    plane.stop_router()
    back = threading.Timer(0.3, plane.start_router)
    back.start()
    answer = engine.client.answer(question.x)
    back.join()
    assert engine.step.take() is None
    reference.check(answer, question)


def test_a_router_that_was_restarted_between_steps_is_asked_again(
    plane: LocalPlane, engine: Engine, reference: Reference
) -> None:
    engine.layer(reference.question(1))
    plane.stop_router()
    plane.start_router()
    engine.step.begin()
    question = reference.question(2)
    reference.check(engine.layer(question), question)
    assert engine.step.take() is None


def test_a_hung_group_ends_the_step_with_the_routers_sentence_and_the_next_step_is_clean(
    plane: LocalPlane, step: Step, reference: Reference
) -> None:
    ensure_all_is_up(plane)
    engine = Engine(plane, step, step_timeout_s=0.6)
    hung = next(server for replica, server in plane.groups.items() if replica.group == 1)
    question = reference.question(4)
    reference.check(engine.layer(question), question)
    step.begin()
    hung.post(lambda: time.sleep(1.0))
    time.sleep(0.05)
    assert not engine.layer(question).any()
    reason = step.take()
    assert reason is not None and reason.startswith("expert group 1 did not answer within 0.5")
    time.sleep(1.0)  # the late answer comes now
    reference.check(engine.layer(question), question)
    assert step.take() is None


def test_a_group_that_is_down_is_waited_for_until_it_comes_up(
    plane: LocalPlane, engine: Engine, reference: Reference
) -> None:
    dead = next(replica for replica in plane.groups if replica.group == 0)
    plane.stop_group(dead)
    back = threading.Timer(0.3, lambda: plane.start_group(0))
    back.start()
    question = reference.question(3)
    answer = engine.layer(question)
    back.join()
    assert engine.step.take() is None
    reference.check(answer, question)


def test_another_copy_answers_when_one_hangs_or_dies(plane: LocalPlane, engine: Engine, reference: Reference) -> None:
    plane.stop_router()
    plane.start_router(dispatch_timeout_s=0.3)
    first = next(replica for replica in plane.groups if replica.group == 0)
    second = plane.start_group(0)
    assert plane.router is not None
    ensure_all_is_up(plane)
    question = reference.question(5)
    expected = engine.layer(question)
    reference.check(expected, question)
    for replica in (first, second):
        plane.groups[replica].post(lambda: time.sleep(1.5))
        time.sleep(0.05)
        before = plane.router.dispatcher.counts["timeouts"]
        for _ in range(6):
            engine.step.begin()
            assert torch.equal(engine.layer(question), expected)
        # The hung one is waited for once or twice, and then passed over.
        assert plane.router.dispatcher.counts["timeouts"] - before <= 2
        time.sleep(1.5)
    plane.stop_group(first)
    assert torch.equal(engine.layer(question), expected)
    assert engine.step.take() is None


def test_a_question_beyond_the_limits_poisons_its_step_only(
    plane: LocalPlane, step: Step, reference: Reference
) -> None:
    ensure_all_is_up(plane)
    engine = Engine(plane, step, step_timeout_s=0.5)
    assert not engine.layer(reference.question(17)).any()
    reason = step.take()
    assert reason is not None and "the limit is 16" in reason
    question = reference.question(16)
    reference.check(engine.layer(question), question)


def test_the_start_of_an_engine_waits_for_its_router_and_says_why_not(plane: LocalPlane, step: Step) -> None:
    ensure_all_is_up(plane)
    Engine(plane, step, step_timeout_s=1).client.connect(timeout_s=2)
    missing = Engine(plane, step, step_timeout_s=1, address="unix:/tmp/no-such-router.sock")
    with pytest.raises(LinkError, match=r"no router within 0\.2 s: .*No such file"):
        missing.client.connect(timeout_s=0.2)


def test_the_step_knows_how_many_rows_a_router_with_a_capacity_dropped(nano: Path, step: Step) -> None:
    with LocalPlane(nano, dtype="float32", num_groups=2, max_rows=16, capacity_factor=0.5) as plane:
        plane.start()
        ensure_all_is_up(plane)
        engine = Engine(plane, step, step_timeout_s=4.0)
        engine.layer(Reference(plane).question(12))
        assert plane.router is not None
        counts = plane.router.dispatcher.counts
        # Twelve tokens at two groups: half of their mean is at most six rows for each.
        assert step.dropped_rows == counts["dropped_rows"] >= counts["rows"] // 2 - 1 > 0
        engine.client._lose_link()
