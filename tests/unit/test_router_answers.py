"""What an engine's client makes of a router's frames: right ones, old ones, wrong ones, and half ones."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_plane import LocalPlane
from peers import Reference
from played_router import Engine, PlayedRouter, answer_with, question_on

from cluster.step import Step
from experts.link import BlockingLink
from experts.wire import DType, Header, Kind


@pytest.fixture(scope="module")
def plane(nano: Path) -> Iterator[LocalPlane]:
    """Never started: only its secret and its model are used."""
    with LocalPlane(nano, dtype="float32", num_groups=2, max_rows=16) as plane:
        yield plane


@pytest.fixture(scope="module")
def reference(plane: LocalPlane) -> Reference:
    return Reference(plane)


@pytest.fixture
def step() -> Step:
    return Step()


def test_answers_to_other_questions_are_skipped(
    plane: LocalPlane, step: Step, reference: Reference, tmp_path: Path
) -> None:
    def scene(link: BlockingLink) -> None:
        asked = question_on(link)
        for seq in (asked.seq - 1, asked.seq + 1, 2**63):
            answer_with(link, Header(Kind.ANSWER, num_rows=9, seq=seq), 13.0)
        answer_with(link, Header(Kind.ANSWER, num_rows=2, seq=asked.seq), 1.0)

    router = PlayedRouter(plane, tmp_path, [scene])
    engine = Engine(plane, step, step_timeout_s=3, address=router.address)
    assert engine.layer(reference.question(2)).eq(1).all()
    router.join()


def test_the_dropped_rows_of_a_steps_answers_are_added_and_those_of_skipped_ones_are_not(
    plane: LocalPlane, step: Step, reference: Reference, tmp_path: Path
) -> None:
    def scene(link: BlockingLink) -> None:
        for dropped_rows in (2, 0, 3):
            asked = question_on(link)
            answer_with(link, Header(Kind.ANSWER, num_rows=9, num_extra=7, seq=asked.seq + 1), 13.0)
            answer_with(link, Header(Kind.ANSWER, num_rows=2, num_extra=dropped_rows, seq=asked.seq), 1.0)

    router = PlayedRouter(plane, tmp_path, [scene])
    engine = Engine(plane, step, step_timeout_s=3, address=router.address)
    for _ in range(3):
        engine.layer(reference.question(2))
    assert step.dropped_rows == 5 and not step.poisoned
    router.join()


def test_an_answer_that_does_not_fit_the_question_is_asked_again_over_a_new_link(
    plane: LocalPlane, step: Step, reference: Reference, tmp_path: Path
) -> None:
    def wrong_rows(link: BlockingLink) -> None:
        answer_with(link, Header(Kind.ANSWER, num_rows=3, seq=question_on(link).seq), 13.0)

    def wrong_dtype(link: BlockingLink) -> None:
        header = Header(Kind.ANSWER, dtype=DType.FLOAT16, num_rows=2, seq=question_on(link).seq)
        link.send(header, (bytes(2 * 64 * 2),), deadline_s=time.monotonic() + 2)

    def rubbish(link: BlockingLink) -> None:
        question_on(link)
        link._sock.sendall(b"\x80\x04" * 500)

    def cut(link: BlockingLink) -> None:
        question_on(link)
        link._sock.sendall(b"EXPM")

    def right(link: BlockingLink) -> None:
        answer_with(link, Header(Kind.ANSWER, num_rows=2, seq=question_on(link).seq), 1.0)

    router = PlayedRouter(plane, tmp_path, [wrong_rows, wrong_dtype, rubbish, cut, right])
    engine = Engine(plane, step, step_timeout_s=4, address=router.address)
    assert engine.layer(reference.question(2)).eq(1).all()
    assert step.take() is None
    router.join()


def test_a_repeated_question_has_only_the_time_that_is_left(
    plane: LocalPlane, step: Step, reference: Reference, tmp_path: Path
) -> None:
    budgets: list[int] = []

    def first(link: BlockingLink) -> None:
        budgets.append(question_on(link).budget_ms)
        time.sleep(0.5)

    def second(link: BlockingLink) -> None:
        asked = question_on(link)
        budgets.append(asked.budget_ms)
        answer_with(link, Header(Kind.ANSWER, num_rows=2, seq=asked.seq), 1.0)

    router = PlayedRouter(plane, tmp_path, [first, second])
    engine = Engine(plane, step, step_timeout_s=4, address=router.address)
    assert engine.layer(reference.question(2)).eq(1).all()
    router.join()
    assert budgets[0] <= 3600 and budgets[1] <= budgets[0] - 400


def test_a_router_that_only_drips_cannot_stretch_the_step(
    plane: LocalPlane, step: Step, reference: Reference, tmp_path: Path
) -> None:
    def drip_zeros(link: BlockingLink) -> None:
        asked = question_on(link)
        link.send(Header(Kind.FAILURE, num_extra=2048, seq=asked.seq), (), deadline_s=time.monotonic() + 1)
        try:
            for _ in range(2000):
                link._sock.sendall(b".")
                time.sleep(0.0005)
        except OSError:
            pass

    router = PlayedRouter(plane, tmp_path, [drip_zeros])
    engine = Engine(plane, step, step_timeout_s=0.4, address=router.address)
    began_s = time.monotonic()
    assert not engine.layer(reference.question(2)).any()
    assert time.monotonic() - began_s < 0.9
    assert step.take() is not None
    router.join()
