"""Which copies are slow, by played answers: a copy is a function from rows to seconds."""

import math
import random
from collections.abc import Callable, Sequence

import pytest

from router.pace import HALF_LIFE_S, LOST_S, MAX_OPEN, PROBE_S, CopyId, Paces

Seconds = Callable[[int], float]  # rows -> seconds that the copy takes
A, B, C, D = [("a", 1), ("b", 1), ("c", 1), ("d", 1)]


class Played:
    """Copies that are asked one frame at a time, each on its own; the clock goes on by the longest of them."""

    def __init__(self) -> None:
        self.paces = Paces()
        self.now_s = 100.0
        self.seq = 0

    def ask(self, copy: CopyId, num_rows: int = 4) -> int:
        self.seq += 1
        self.paces.on_sent(copy, self.seq, num_rows, now_s=self.now_s)
        return self.seq

    def answer(self, copy: CopyId, seq: int) -> None:
        self.paces.on_answer(copy, seq, now_s=self.now_s)

    def round(self, takes: dict[CopyId, float], num_rows: int = 4) -> None:
        """All are asked, and answer when they have done it."""
        asked = {copy: self.ask(copy, num_rows) for copy in takes}
        began_s = self.now_s
        for copy, seconds in sorted(takes.items(), key=lambda item: item[1]):
            self.now_s = began_s + seconds
            self.answer(copy, asked[copy])

    def rounds(self, number: int, takes: dict[CopyId, float]) -> None:
        for _ in range(number):
            self.round(takes)

    def slow(self, *copies: CopyId) -> set[CopyId]:
        return set(self.paces.slow(copies, now_s=self.now_s))


@pytest.fixture
def played() -> Played:
    return Played()


def test_nobody_is_slow_before_anything_is_known(played: Played) -> None:
    assert played.slow() == played.slow(A) == played.slow(A, B) == set()


def test_a_copy_alone_is_never_slow(played: Played) -> None:
    played.rounds(9, {A: 5.0})
    played.ask(A)
    played.now_s += 60
    assert played.slow(A) == set()


def test_three_answers_of_ten_times_the_peers_time_make_a_slow_copy(played: Played) -> None:
    played.rounds(20, {A: 0.04, B: 0.04})
    rounds = 0
    while not played.slow(A, B):
        played.round({A: 0.04, B: 0.4})
        rounds += 1
    assert rounds == 3 and played.slow(A, B) == {B}


def test_one_very_slow_answer_does_not(played: Played) -> None:
    played.rounds(20, {A: 0.04, B: 0.04})
    played.round({A: 0.04, B: 30.0})
    assert played.slow(A, B) == set()


def test_answers_that_come_together_after_one_hiccup_count_for_one(played: Played) -> None:
    played.rounds(20, {A: 0.04, B: 0.04})
    asked = [played.ask(B) for _ in range(50)]
    played.now_s += 2.0
    for seq in asked:
        played.answer(B, seq)
    assert played.slow(A, B) == set()


@pytest.mark.parametrize(("factor", "expected"), [(2.5, set()), (3.5, {B})])
def test_slow_is_more_than_three_times_the_peers(played: Played, factor: float, expected: set[CopyId]) -> None:
    played.rounds(200, {A: 0.05, B: 0.05 * factor})
    assert played.slow(A, B) == expected


def test_with_four_copies_the_median_decides(played: Played) -> None:
    played.rounds(100, {A: 0.04, B: 0.05, C: 0.06, D: 0.4})
    assert played.slow(A, B, C, D) == {D}


def test_the_quickest_is_never_slow_so_one_is_always_left(played: Played) -> None:
    played.rounds(100, {A: 0.02, B: 0.5, C: 8.0})
    assert played.slow(A, B, C) == {B, C}
    assert played.slow(B, C) == {C}
    assert played.slow(C) == set()


def test_when_all_get_slower_alike_nobody_is_passed_over(played: Played) -> None:
    played.rounds(100, {A: 0.02, B: 0.02})
    for _ in range(50):
        played.round({A: 0.4, B: 0.4})
        assert played.slow(A, B) == set()


def test_a_few_milliseconds_are_never_slow(played: Played) -> None:
    played.rounds(300, {A: 0.0003, B: 0.015})
    assert played.slow(A, B) == set()


def test_a_copy_that_has_stopped_is_slow_before_it_answers(played: Played) -> None:
    played.rounds(50, {A: 0.001, B: 0.001})
    played.ask(B)
    played.now_s += 0.019
    assert played.slow(A, B) == set()
    played.now_s += 0.002
    assert played.slow(A, B) == {B}


def test_a_copy_that_answers_one_frame_after_the_other_is_not_silent(played: Played) -> None:
    """Eight frames wait for it; each takes its time, and the last one waits for all the others."""
    played.rounds(50, {A: 0.015, B: 0.015})
    asked = [played.ask(B) for _ in range(8)]
    for seq in asked:
        played.now_s += 0.015
        assert played.slow(A, B) == set()
        played.answer(B, seq)


def test_when_all_are_silent_nobody_is_passed_over(played: Played) -> None:
    played.rounds(50, {A: 0.001, B: 0.001})
    played.ask(A)
    played.ask(B)
    played.now_s += 0.5
    assert played.slow(A, B) == set()


def test_a_copy_that_goes_on_after_a_stop_is_used_at_once(played: Played) -> None:
    played.rounds(50, {A: 0.001, B: 0.001})
    asked = [played.ask(B) for _ in range(8)]
    played.now_s += 3.0
    assert played.slow(A, B) == {B}
    for seq in asked:
        played.answer(B, seq)
    assert played.slow(A, B) == set()


def test_a_new_copy_starts_as_good_as_its_peers(played: Played) -> None:
    played.rounds(50, {A: 0.05, B: 0.06})
    played.round({C: 0.9})
    assert played.slow(A, B, C) == set()
    played.rounds(3, {C: 0.9})
    assert played.slow(A, B, C) == {C}


def test_a_refused_frame_says_nothing(played: Played) -> None:
    played.rounds(50, {A: 0.001, B: 0.001})
    seq = played.ask(B)
    played.paces.on_void(B, seq)
    played.now_s += 5
    played.answer(B, seq)
    assert played.slow(A, B) == set()


def test_a_link_that_breaks_takes_the_past_with_it(played: Played) -> None:
    played.rounds(100, {A: 0.02, B: 0.5})
    assert played.slow(A, B) == {B}
    played.paces.on_down(B)
    assert played.slow(A, B) == set()


def _mixed(random_: random.Random) -> int:
    return random_.choice([1, 3, 8, 30, 64, 300, 1024])


@pytest.mark.parametrize(
    "seconds",
    [lambda rows: 0.03 + 0.001 * rows, lambda rows: 0.02 * rows, lambda rows: 0.05],
    ids=["base and rows", "rows", "base"],
)
def test_copies_that_get_other_sizes_are_compared_fairly(played: Played, seconds: Seconds) -> None:
    """A gets mostly prefills and B mostly single tokens; then B becomes five times slower."""
    random_ = random.Random(1)

    def round_of(factor: float) -> None:
        many, few = (1024, 1) if random_.random() < 0.8 else (_mixed(random_), _mixed(random_))
        played.round({A: seconds(many)}, many)
        played.round({B: factor * seconds(few)}, few)

    for count in range(400):
        round_of(1.0)
        assert count < 50 or played.slow(A, B) == set()
    for _ in range(20):
        round_of(5.0)
    assert played.slow(A, B) == {B}


def test_equal_copies_under_noise_are_practically_never_passed_over(played: Played) -> None:
    random_ = random.Random(2)
    slow = 0
    for _ in range(20_000):
        played.round({copy: 0.05 * random_.lognormvariate(0, 0.5) for copy in (A, B)})
        slow += bool(played.slow(A, B))
    assert slow <= 2


# Frames that are asked again elsewhere.


def overdue_after_s(played: Played, seq: int, copies: Sequence[CopyId] = (A, B)) -> float:
    began_s = played.now_s
    while not played.paces.is_overdue(B, seq, copies, now_s=played.now_s):
        played.now_s += 0.001
        if played.now_s - began_s > 20:
            return math.inf
    return played.now_s - began_s


@pytest.mark.parametrize(("seconds", "expected_s"), [(0.001, 0.05), (0.1, 0.3)])
def test_a_frame_is_overdue_after_three_times_the_peers_time_but_not_before_the_floor(
    played: Played, seconds: float, expected_s: float
) -> None:
    played.rounds(50, {A: seconds, B: seconds})
    assert overdue_after_s(played, played.ask(B)) == pytest.approx(expected_s, abs=0.002)


def test_a_size_that_was_never_seen_gets_time_in_proportion_to_its_rows(played: Played) -> None:
    played.rounds(50, {A: 0.05, B: 0.05})  # 4 rows
    assert overdue_after_s(played, played.ask(B, num_rows=64)) == pytest.approx(16 * 0.15, rel=0.01)


def test_without_a_measure_no_frame_is_overdue(played: Played) -> None:
    assert overdue_after_s(played, played.ask(B)) == math.inf


# A slow copy is tried again.


def made_slow(played: Played) -> None:
    played.rounds(100, {A: 0.03, B: 0.6})
    assert played.slow(A, B) == {B}


def probe_until_quick(played: Played, seconds: float, *, limit_s: float) -> tuple[float, int]:
    """Seconds until B is not slow any more, and how often it was asked."""
    began_s, probes = played.now_s, 0
    while played.slow(A, B) and played.now_s - began_s < limit_s:
        played.round({A: 0.03})
        if played.paces.is_probe_due(B, now_s=played.now_s):
            probes += 1
            played.round({B: seconds})
    return played.now_s - began_s, probes


def test_a_slow_copy_that_is_quick_again_is_found_within_two_seconds(played: Played) -> None:
    made_slow(played)
    seconds, _ = probe_until_quick(played, 0.03, limit_s=10)
    assert seconds < 2 and not played.slow(A, B)


def test_a_copy_that_stays_slow_is_tried_about_once_a_second(played: Played) -> None:
    made_slow(played)
    seconds, probes = probe_until_quick(played, 0.6, limit_s=60)
    assert seconds >= 60 and 30 <= probes <= 60 / PROBE_S


def test_a_copy_that_owes_an_answer_is_not_tried_again_unless_that_seems_lost(played: Played) -> None:
    made_slow(played)
    played.ask(B)
    played.now_s += LOST_S - 0.1
    assert not played.paces.is_probe_due(B, now_s=played.now_s)
    played.now_s += 0.2
    assert played.paces.is_probe_due(B, now_s=played.now_s)
    played.ask(B)
    assert not played.paces.is_probe_due(B, now_s=played.now_s)


# Memory.


def test_what_is_kept_has_a_bound(played: Played) -> None:
    for _ in range(3 * MAX_OPEN):
        played.ask(A, num_rows=random.Random(played.seq).randrange(1, 2048))
    assert len(played.paces._copies[A].open) == MAX_OPEN
    played.answer(A, 3 * MAX_OPEN)  # not timed, so nothing to learn
    assert played.paces._copies[A].pace is None


def test_frames_that_were_lost_are_forgotten_when_much_later_ones_are_answered(played: Played) -> None:
    played.ask(A)
    played.now_s += LOST_S + 1
    played.answer(A, played.ask(A))
    assert not played.paces._copies[A].open


def test_copies_that_have_left_are_forgotten(played: Played) -> None:
    played.rounds(3, {A: 0.1, B: 0.1})
    played.paces.keep({B})
    assert set(played.paces._copies) == {B}


def test_the_average_follows_with_its_half_life(played: Played) -> None:
    played.rounds(200, {A: 0.03})
    before = played.paces._copies[A].pace
    assert before is not None
    asked = [(played.now_s + 0.001 * count) for count in range(1, round(1000 * HALF_LIFE_S) + 1)]
    for answered_s in asked:  # each took twice as long, and one comes every millisecond
        played.seq += 1
        played.paces.on_sent(A, played.seq, 4, now_s=answered_s - 0.06)
        played.paces.on_answer(A, played.seq, now_s=answered_s)
    assert played.paces._copies[A].pace == pytest.approx(before + math.log(2) / 2, abs=0.01)
