"""Dispatch, event by event: who is asked, who is asked instead, and how a question ends."""

import numpy as np
import pytest
from dispatch_bench import Bench, logits_of, x_of

from experts.errors import FrameError
from experts.shape import MoEShape, RoutingMethod
from experts.wire import Header, Kind
from router.dispatch import Dispatcher

SHAPE = MoEShape(
    moe_layers=(0,),
    hidden_size=8,
    moe_intermediate_size=4,
    num_experts=8,
    top_k=2,
    num_model_groups=2,
    topk_group=2,
    method=RoutingMethod.GROUP_LIMITED_GREEDY,
    grouped=True,
)
X, LOGITS = x_of(6, SHAPE, 1), logits_of(6, SHAPE, 1)


@pytest.fixture
def bench() -> Bench:
    """One expert group with two copies."""
    bench = Bench(SHAPE, num_groups=1)
    bench.copies(2)
    return bench


@pytest.fixture
def right() -> bytes:
    """The bits of the answer to (X, LOGITS)."""
    plain = Bench(SHAPE, num_groups=1)
    plain.copies(1)
    plain.ask("a", X, LOGITS)
    plain.deliver_all()
    return plain.answers["a"].tobytes()


def test_the_least_loaded_copy_is_asked(bench: Bench) -> None:
    bench.ask("a", X, LOGITS)
    bench.ask("b", X[:1], LOGITS[:1])
    bench.ask("c", X[:1], LOGITS[:1])
    assert bench.sent == ["g0.0", "g0.1", "g0.1"]
    assert [bench.rows_at(replica) for replica in bench.replicas] == [6, 2]
    bench.deliver_all()
    bench.check_nothing_is_left()


def test_a_silent_copy_is_passed_over_until_it_answers_again(bench: Bench, right: bytes) -> None:
    bench.ask("a", X, LOGITS)
    silent = bench.held()
    bench.tick(0.9)
    assert bench.sent == ["g0.0"]
    bench.tick(0.2)
    assert bench.sent == ["g0.0", "g0.1"] and bench.dispatcher.counts["timeouts"] == 1
    bench.deliver_all()
    assert bench.answers["a"].tobytes() == right
    bench.ask("b", X, LOGITS)
    bench.deliver_all()
    assert bench.sent[2:] == ["g0.1"]
    for answer in silent:
        bench.arrive(answer)
    assert bench.dispatcher.counts["late_answers"] == 1
    bench.ask("c", X, LOGITS)
    assert bench.sent[3:] == ["g0.0"]


def test_the_first_answer_is_taken_even_from_a_copy_that_was_slow(bench: Bench, right: bytes) -> None:
    """Two copies that both need longer than dispatch_timeout_s must not starve a question by turns."""
    bench.ask("a", X, LOGITS)
    first = bench.held()
    bench.tick(1.1)
    second = bench.held()
    for _ in range(5):
        bench.tick(1.1)
    assert bench.sent == ["g0.0", "g0.1"]  # each once: a slow group is not buried under repeated questions
    bench.arrive(first[0])
    assert bench.answers["a"].tobytes() == right
    bench.check_nothing_is_left()
    bench.arrive(second[0])
    assert bench.dispatcher.counts["late_answers"] == 1


def test_with_three_copies_one_more_is_asked_after_each_silence() -> None:
    bench = Bench(SHAPE, num_groups=1)
    bench.copies(3)
    bench.ask("a", X, LOGITS)
    for expected in (1, 2, 3, 3):
        assert len(bench.sent) == expected == len(set(bench.sent))
        bench.tick(1.1)
    assert bench.dispatcher.counts["timeouts"] == 2


def test_a_nack_is_asked_elsewhere_at_once(bench: Bench, right: bytes) -> None:
    bench.refusing = {"g0.0"}
    bench.ask("a", X, LOGITS)
    bench.deliver_all()
    assert bench.sent == ["g0.0", "g0.1"] and bench.dispatcher.counts["nacks"] == 1
    assert bench.answers["a"].tobytes() == right
    bench.check_nothing_is_left()


def test_copies_that_all_refused_are_asked_again_under_the_next_placement(bench: Bench, right: bytes) -> None:
    bench.refusing = {"g0.0", "g0.1"}
    bench.ask("a", X, LOGITS)
    bench.deliver_all()
    assert len(bench.sent) == 2 and not bench.answers
    bench.refusing = set()
    bench.publish()
    bench.deliver_all()
    assert bench.answers["a"].tobytes() == right


def test_copies_that_all_refused_are_asked_again_after_a_while(bench: Bench, right: bytes) -> None:
    bench.refusing = {"g0.0", "g0.1"}
    bench.ask("a", X, LOGITS)
    bench.deliver_all()
    bench.refusing = set()
    bench.tick(0.5)
    assert len(bench.sent) == 2
    bench.tick(0.6)
    bench.deliver_all()
    assert bench.answers["a"].tobytes() == right


def test_who_refused_once_is_asked_again_when_the_other_copy_goes_down(bench: Bench, right: bytes) -> None:
    bench.refusing = {"g0.0"}
    bench.ask("a", X, LOGITS)
    bench.deliver()  # the refusal; now the other copy owes the answer
    bench.refusing = set()
    bench.publish()
    bench.down(bench.replicas[1])
    bench.deliver_all()
    assert bench.answers["a"].tobytes() == right


def test_rows_of_a_replica_that_goes_down_are_sent_elsewhere_at_once(bench: Bench, right: bytes) -> None:
    bench.ask("a", X, LOGITS)
    bench.down(bench.replicas[0])
    assert bench.sent == ["g0.0", "g0.1"] and bench.dispatcher.counts["reroutes"] == 1
    bench.deliver_all()
    assert bench.answers["a"].tobytes() == right
    bench.check_nothing_is_left()


def test_a_link_that_breaks_in_the_middle_of_a_send_sends_the_rows_once_elsewhere(bench: Bench, right: bytes) -> None:
    bench.breaking = {bench.replicas[0]}
    bench.ask("a", X, LOGITS)
    assert bench.sent == ["g0.1"]
    bench.deliver_all()
    assert bench.answers["a"].tobytes() == right
    bench.check_nothing_is_left()


def test_all_links_that_break_in_the_middle_of_a_send_park_the_rows_once(bench: Bench, right: bytes) -> None:
    bench.breaking = set(bench.replicas)
    bench.ask("a", X, LOGITS)
    assert bench.sent == [] and len(bench.dispatcher._parked) == 1
    bench.up(bench.replicas[1])
    bench.deliver_all()
    assert bench.sent == ["g0.1"]
    assert bench.answers["a"].tobytes() == right
    bench.check_nothing_is_left()


def test_a_break_while_other_askers_rows_are_moved_moves_those_too(bench: Bench, right: bytes) -> None:
    for asker in "abc":
        bench.ask(asker, X, LOGITS)
    bench.add(0, "g0.2")
    bench.publish()
    bench.breaking = {bench.replicas[1]}
    bench.down(bench.replicas[0])  # its rows go to g0.1 or g0.2; g0.1 breaks at that
    bench.tick(1.1)
    bench.deliver_all()
    assert [bench.answers[asker].tobytes() for asker in "abc"] == [right] * 3
    bench.check_nothing_is_left()


def test_without_a_copy_a_question_waits_and_is_answered_when_one_comes_up(right: bytes) -> None:
    bench = Bench(SHAPE, num_groups=1)
    bench.ask("a", X, LOGITS)
    bench.tick(3.0)
    assert not bench.failures
    bench.copies(1)
    bench.deliver_all()
    assert bench.answers["a"].tobytes() == right


def test_without_a_copy_a_question_ends_at_its_deadline_with_a_sentence_that_names_the_group() -> None:
    bench = Bench(SHAPE, num_groups=2)
    bench.add(0, "g0")
    bench.publish()
    bench.ask("a", X, LOGITS, budget_s=2.5)
    bench.deliver_all()
    bench.tick(2.4)
    assert not bench.failures
    bench.tick(0.2)
    assert bench.failures["a"] == (5, "no live copy of expert group 1 within 2.5 s; try again")
    assert bench.dispatcher.counts["failures"] == 1
    bench.check_nothing_is_left()


def test_a_group_that_stays_silent_is_named_at_the_deadline() -> None:
    bench = Bench(SHAPE, num_groups=2)
    bench.copies(1)
    bench.ask("a", X, LOGITS, budget_s=2)
    lost = bench.held()
    for answer in lost:
        if answer.replica.group == 0:
            bench.arrive(answer)
    bench.tick(2.1)
    assert bench.failures["a"].reason == "expert group 1 did not answer within 2 s; try again"
    bench.check_nothing_is_left()
    bench.arrive(next(answer for answer in lost if answer.replica.group == 1))
    assert bench.dispatcher.counts["late_answers"] == 1 and not bench.answers


def test_a_second_answer_is_dropped_and_counted(bench: Bench) -> None:
    bench.ask("a", X, LOGITS)
    (answer,) = bench.held()
    bench.arrive(answer)
    bench.arrive(answer)
    assert bench.dispatcher.counts["late_answers"] == 1
    bench.check_nothing_is_left()


def test_an_answer_of_another_incarnation_or_replica_is_dropped(bench: Bench) -> None:
    bench.ask("a", X, LOGITS)
    (answer,) = bench.held()
    assert answer.partial is not None
    other = answer.header._replace(incarnation=1)
    assert bench.dispatcher.on_partial(answer.replica, other, answer.partial, now_s=0.0) is None
    assert bench.dispatcher.on_partial(bench.replicas[1], answer.header, answer.partial, now_s=0.0) is None
    assert bench.dispatcher.counts["late_answers"] == 2
    bench.arrive(answer)
    assert "a" in bench.answers


def test_an_answer_of_the_wrong_shape_is_a_frame_error_and_the_rows_can_go_elsewhere(
    bench: Bench, right: bytes
) -> None:
    bench.ask("a", X, LOGITS)
    (answer,) = bench.held()
    assert answer.partial is not None
    with pytest.raises(FrameError):
        bench.dispatcher.on_partial(answer.replica, answer.header, answer.partial[:-1], now_s=0.0)
    bench.down(answer.replica)
    bench.deliver_all()
    assert bench.answers["a"].tobytes() == right


def test_two_askers_interleave_without_mixing() -> None:
    bench = Bench(SHAPE, num_groups=2, seed=3)
    bench.copies(1)
    others = x_of(4, SHAPE, 2), logits_of(4, SHAPE, 2)
    bench.ask("a", X, LOGITS)
    bench.ask("b", *others)
    bench.deliver_all()
    for asker, (x, logits) in {"a": (X, LOGITS), "b": others}.items():
        alone = Bench(SHAPE, num_groups=2)
        alone.copies(1)
        alone.ask("x", x, logits)
        alone.deliver_all()
        assert bench.answers[asker].tobytes() == alone.answers["x"].tobytes()


def test_a_second_question_before_the_answer_is_a_frame_error(bench: Bench) -> None:
    bench.ask("a", X, LOGITS)
    with pytest.raises(FrameError, match="second question"):
        bench.ask("a", X, LOGITS)


def test_what_the_gate_refuses_is_a_frame_error_of_the_asker(bench: Bench) -> None:
    def gate(*_: object) -> tuple[np.ndarray, np.ndarray]:
        raise ValueError("scale=2.5 on a path without one")

    dispatcher: Dispatcher[str] = Dispatcher(gate, bench, num_experts=8, num_groups=1, dispatch_timeout_s=1.0)
    with pytest.raises(FrameError, match="scale"):
        dispatcher.on_question("a", Header(Kind.QUESTION, num_rows=6, num_extra=8), X, LOGITS, now_s=0.0)


def test_an_asker_that_is_gone_leaves_nothing_behind(bench: Bench) -> None:
    bench.ask("a", X, LOGITS)
    bench.dispatcher.on_asker_gone("a")
    bench.check_nothing_is_left()
    bench.deliver_all()
    assert not bench.answers


def test_an_older_placement_is_ignored(bench: Bench) -> None:
    newest = bench.dispatcher.placement
    bench.dispatcher.on_placement(type(newest)(version=newest.version, num_groups=1), now_s=bench.now_s)
    assert bench.dispatcher.placement is newest


def test_rows_that_are_sent_again_are_gathered_once() -> None:
    bench = Bench(SHAPE, num_groups=2)
    bench.copies(2)
    bench.ask("a", X, LOGITS)
    (job,) = bench.dispatcher._jobs.values()
    some = [errand for errand in job.errands if len(errand.rows.tokens) < len(X)]
    assert some
    for errand in some:
        assert np.array_equal(errand.x(), X[errand.rows.tokens])
        assert errand.x() is errand.x()
