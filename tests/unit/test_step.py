"""The step of an engine: one deadline, one reason, and nothing of it in the next one."""

import time

from cluster.step import CURRENT, Step


def test_a_fresh_step_is_clean() -> None:
    step = Step()
    assert not step.poisoned and step.take() is None
    assert not CURRENT.poisoned


def test_the_first_reason_is_kept() -> None:
    step = Step()
    step.poison("first")
    step.poison("second")
    assert step.poisoned and step.take() == "first"


def test_taking_the_reason_leaves_a_clean_step() -> None:
    step = Step()
    step.poison("reason")
    step.take()
    assert not step.poisoned and step.take() is None


def test_a_new_step_forgets_the_poison_of_the_one_before() -> None:
    step = Step()
    step.poison("reason")
    step.begin()
    assert not step.poisoned and step.take() is None


def test_the_deadline_runs_from_the_first_layer_of_the_step() -> None:
    step = Step()
    first = step.deadline_s(10.0)
    assert abs(first - time.monotonic() - 10.0) < 1.0
    time.sleep(0.01)
    assert step.deadline_s(10.0) == first == step.deadline_s(99.0)
    step.begin()
    assert step.deadline_s(10.0) > first


def test_taking_the_reason_ends_the_deadline_too() -> None:
    step = Step()
    first = step.deadline_s(10.0)
    time.sleep(0.01)
    step.take()
    assert step.deadline_s(10.0) > first


def test_dropped_rows_are_of_one_step() -> None:
    step = Step()
    for end in (step.begin, step.take):
        step.dropped_rows += 3
        end()
        assert step.dropped_rows == 0
