"""Slow, stopped and recovered copies, with answers that take time: who is asked, and how long a question takes."""

import heapq
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from dispatch_bench import Bench, Rows, logits_of, x_of
from numpy.typing import NDArray

from experts.shape import MoEShape, RoutingMethod
from experts.wire import DType
from router.transport import Answer, Expert

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
TICK_S = 0.01
QUICK_S = 0.02


class Timed:
    """A bench with two copies whose answers take `seconds[member id]()`; None: until it is set again."""

    def __init__(self, *, num_groups: int = 1, num_copies: int = 2) -> None:
        self.bench = Bench(SHAPE, num_groups=num_groups)
        self.bench.copies(num_copies)
        self._compute_once()
        self.seconds: dict[str, Callable[[], float | None]] = {}
        self.arrivals: list[tuple[float, int, Answer]] = []
        self.stopped: list[Answer] = []
        self.asked = 0

    def _compute_once(self) -> None:
        """All ask the same, thousands of times: the copies' sums and the gate's choice are kept by their inputs."""
        sums: dict[tuple[str, bytes, bytes], Rows] = {}
        for name, expert in self.bench._faulty.experts.items():

            def kept(layer: int, x: Rows, pairs: NDArray[np.int32], name: str = name, expert: Expert = expert) -> Rows:
                key = name, x.tobytes(), pairs.tobytes()
                if key not in sums:
                    sums[key] = expert(layer, x, pairs)
                return sums[key]

            self.bench._faulty.experts[name] = kept
        routed = self.bench._gate(0, LOGITS, DType.FLOAT32, 1.0)
        self.bench.dispatcher._gate = lambda *_: routed

    def take(self, name: str, seconds: float | None) -> None:
        """What the copy needs from now on for a frame."""
        self.seconds[name] = lambda: seconds

    def resume(self, name: str) -> None:
        self.take(name, QUICK_S)
        answers, self.stopped = self.stopped, []
        for answer in answers:
            heapq.heappush(self.arrivals, (self.bench.now_s, self.asked, answer))
            self.asked += 1

    def step(self, num_askers: int = 1) -> float:
        """All ask at once; seconds until all are answered."""
        began_s = self.bench.now_s
        names = [f"{self.asked}.{asker}" for asker in range(num_askers)]
        for name in names:
            self.bench.ask(name, X, LOGITS)
            self._leave()
        while not all(name in self.bench.answers for name in names):
            self._go_on()
        answers = {self.bench.answers.pop(name).tobytes() for name in names}
        assert answers == {RIGHT}
        return self.bench.now_s - began_s

    def steps(self, number: int, num_askers: int = 1) -> Counter[str]:
        """How often each copy was asked."""
        before = len(self.bench.sent)
        for _ in range(number):
            self.step(num_askers)
        return Counter(self.bench.sent[before:])

    def _go_on(self) -> None:
        next_tick_s = self.bench.now_s + TICK_S
        if self.arrivals and self.arrivals[0][0] <= next_tick_s:
            at_s, _, answer = heapq.heappop(self.arrivals)
            self.bench.now_s = max(at_s, self.bench.now_s)
            self.bench.arrive(answer)
        else:
            self.bench.tick(TICK_S)
        self._leave()
        assert not self.bench.failures

    def _leave(self) -> None:
        """What was sent is on its way from now on."""
        for answer in self.bench.held():
            self.asked += 1
            seconds = self.seconds.get(answer.replica.member_id, lambda: QUICK_S)()
            if seconds is None:
                self.stopped.append(answer)
            else:
                heapq.heappush(self.arrivals, (self.bench.now_s + seconds, self.asked, answer))


def _right() -> bytes:
    plain = Bench(SHAPE, num_groups=1)
    plain.copies(1)
    plain.ask("a", X, LOGITS)
    plain.deliver_all()
    return plain.answers["a"].tobytes()


RIGHT = _right()


@pytest.fixture
def timed() -> Timed:
    timed = Timed()
    timed.steps(30, num_askers=2)
    return timed


def test_a_copy_that_takes_ten_times_longer_gets_almost_no_rows_after_a_few_questions(timed: Timed) -> None:
    timed.take("g0.1", 10 * QUICK_S)
    timed.steps(4, num_askers=2)
    asked = timed.steps(200, num_askers=2)  # 4 s
    assert asked["g0.1"] <= 5 and asked["g0.0"] == 400
    assert timed.bench.dispatcher.counts["timeouts"] == 0


def test_a_stopped_copy_costs_the_questions_in_flight_the_hedge_time_and_the_next_ones_nothing(timed: Timed) -> None:
    timed.take("g0.1", None)
    assert timed.step(num_askers=8) <= 3 * QUICK_S + 2 * TICK_S + QUICK_S
    for _ in range(100):
        assert timed.step(num_askers=8) == pytest.approx(QUICK_S)
    assert timed.bench.dispatcher.counts["hedges"] == 4 == len(timed.stopped)


def test_a_copy_that_goes_on_after_a_stop_is_used_at_once(timed: Timed) -> None:
    timed.take("g0.1", None)
    timed.steps(100, num_askers=4)
    timed.resume("g0.1")
    timed.steps(1)
    asked = timed.steps(10, num_askers=4)
    assert asked["g0.1"] == 20


def test_a_copy_that_is_quick_again_is_used_again_within_two_seconds(timed: Timed) -> None:
    timed.take("g0.1", 30 * QUICK_S)
    timed.steps(500, num_askers=2)
    timed.take("g0.1", QUICK_S)
    began_s = timed.bench.now_s
    while timed.steps(5, num_askers=2)["g0.1"] < 5:
        assert timed.bench.now_s - began_s < 2.0
    assert timed.bench.dispatcher.counts["probes"] > 0


def test_a_trial_of_a_slow_copy_costs_no_question_any_time(timed: Timed) -> None:
    timed.take("g0.1", 30 * QUICK_S)
    timed.steps(100, num_askers=2)
    longest_s = max(timed.step(num_askers=2) for _ in range(500))
    assert timed.bench.dispatcher.counts["probes"] >= 5 and longest_s == pytest.approx(QUICK_S)


def test_equal_copies_under_noise_share_the_rows() -> None:
    timed = Timed()
    random_ = random.Random(3)
    for name in ("g0.0", "g0.1"):
        timed.seconds[name] = lambda: QUICK_S * random_.lognormvariate(0, 0.5)
    asked = timed.steps(300, num_askers=4)
    counts = timed.bench.dispatcher.counts
    assert abs(asked["g0.0"] - asked["g0.1"]) < 0.03 * 1200
    assert counts["probes"] <= 2 and counts["hedges"] < 0.03 * 1200 and not counts["timeouts"]


def test_with_one_copy_a_slow_one_is_waited_for() -> None:
    timed = Timed(num_copies=1)
    timed.steps(20)
    timed.take("g0.0", 50 * QUICK_S)
    assert timed.step() == pytest.approx(50 * QUICK_S)
    assert timed.bench.sent.count("g0.0") == 21


def test_when_all_copies_hang_for_a_moment_nothing_is_asked_twice(timed: Timed) -> None:
    """As when the machine is busy with something else: a second question would only add to that."""
    timed.take("g0.0", 0.8)
    timed.take("g0.1", 0.8)
    assert timed.step(num_askers=4) == pytest.approx(0.8)
    assert timed.bench.dispatcher.counts["hedges"] == 0


def test_with_two_of_three_copies_stopped_the_third_is_found(timed: Timed) -> None:
    timed = Timed(num_copies=3)
    timed.steps(30, num_askers=3)
    timed.take("g0.0", None)
    timed.take("g0.1", None)
    assert timed.step(num_askers=3) < 0.3
    assert timed.step(num_askers=3) == pytest.approx(QUICK_S)


def test_nothing_is_left_behind(timed: Timed) -> None:
    timed.take("g0.1", 10 * QUICK_S)
    timed.steps(100, num_askers=3)
    while timed.arrivals:
        timed._go_on()
    timed.bench.check_nothing_is_left()
    timed.take("g0.1", QUICK_S)
    timed.bench.down(timed.bench.replicas[1])
    timed.bench.up(timed.bench.replicas[1])
    assert timed.steps(1, num_askers=2) == {"g0.0": 1, "g0.1": 1}
