"""What benchmarks/drill.py makes of a history: who was wrong, when, and what a fault cost."""

from collections import Counter

import pytest

from benchmarks.drill import _to_repeat
from benchmarks.drill_history import HUNG, End, Expected, Stream
from benchmarks.drill_report import Report, as_markdown, as_plain
from benchmarks.drill_requests import Ask
from benchmarks.drill_verdict import Judged, Window, costs, judge, longest_gap, outcomes_by_fault, quiet_gaps
from benchmarks.serving_machine import Machine

MACHINE = Machine(
    cpu="A CPU", cores=2, flags=(), memory_gib=24.0, system="Linux", versions={}, commit="abc", busy_share=0.0
)
LENGTH, UNAVAILABLE = End(finish="length"), End(error="UNAVAILABLE", detail="no copy", is_retriable=True)


def stream(*times_s: float, tokens: list[int] | None = None, end: End = LENGTH, probe: bool = False) -> Stream:
    """Begun at 0, ended at its last time or at 1; token i is i unless told otherwise."""
    return Stream(
        ask=Ask(name="1", surface="gRPC", prompt=[1], sampling={}, is_probe=probe),
        begun_s=0.0,
        tokens=list(range(len(times_s))) if tokens is None else tokens,
        times_s=list(times_s),
        ended_s=times_s[-1] if times_s else 1.0,
        end=end,
    )


def expected(*tokens: int, finish: str = "length") -> Expected:
    return Expected(tokens=tokens, finish=finish)


def window(began_s: float, whole_s: float | None) -> Window:
    return Window(kind="experts-kill", victim="experts of group 1 (pid 5)", began_s=began_s, whole_s=whole_s)


def outcome(one: Stream, answer: Expected) -> str:
    return judge(one, answer, deadline_s=60).outcome


# One stream.


def test_the_same_tokens_and_the_same_end_are_right():
    assert outcome(stream(1, 2), expected(0, 1)) == "right"


def test_another_token_is_wrong_when_it_came():
    found = judge(stream(1, 2, 3, tokens=[0, 9, 2]), expected(0, 1, 2), deadline_s=60)
    assert (found.outcome, found.at_s) == ("wrong", 2)
    assert found.why == "token 1 is 9, and vLLM has 1"


@pytest.mark.parametrize("answer", [expected(0, 1, 2), expected(0), expected(0, 1, finish="stop")])
def test_too_few_too_many_and_another_end_are_wrong(answer: Expected):
    assert outcome(stream(1, 2), answer) == "wrong"


def test_a_refused_stream_is_known_by_its_error_and_its_time():
    assert outcome(stream(1, end=UNAVAILABLE), expected(0, 1)) == "refused"
    assert judge(stream(1, 61, end=UNAVAILABLE), expected(0, 1, 2), deadline_s=60).outcome == "failed"
    assert outcome(stream(1, end=End(error="INTERNAL")), expected(0, 1)) == "failed"


def test_a_failed_stream_with_a_wrong_token_is_wrong():
    assert outcome(stream(1, tokens=[9], end=UNAVAILABLE), expected(0, 1)) == "wrong"


def test_a_stream_that_was_given_up_is_hung_and_so_is_one_without_an_end():
    assert outcome(stream(1, end=End(error=HUNG)), expected(0, 1)) == "hung"
    cut_off = stream(1)
    cut_off.ended_s = None
    assert outcome(cut_off, expected(0, 1)) == "hung"


# Faults.


def test_a_stall_is_the_longest_gap_that_touches_the_fault():
    one = stream(1, 2, 5, 6, 9)
    assert longest_gap([one], 3, 4) == 3  # a gap round the whole fault
    assert longest_gap([one], 5.5, 5.6) == 1
    assert longest_gap([one], 5.5, 7) == 3
    assert longest_gap([one, stream(0, 10)], 3, 4) == 10
    assert longest_gap([one], 9, 20) is None
    assert longest_gap([stream(3)], 2, 4) is None


def test_gaps_without_a_fault_are_told_apart():
    assert quiet_gaps([stream(1, 2, 5, 7)], [window(3, 4)]) == (1.5, 2)
    assert quiet_gaps([stream(1, 5)], [window(3, None)]) is None


def judged(outcome: str, at_s: float) -> Judged:
    return Judged(stream=stream(1, 2), outcome=outcome, at_s=at_s)  # type: ignore[arg-type]


def test_a_bad_end_belongs_to_the_last_fault_before_it():
    windows = [window(10, 12), window(20, 25)]
    found = [judged("right", 11), judged("failed", 5), judged("wrong", 19.9), judged("hung", 30)]
    assert outcomes_by_fault(windows, found) == {-1: {"failed": 1}, 0: {"wrong": 1}, 1: {"hung": 1}}


def test_requests_in_flight_are_those_open_when_it_began():
    (cost,) = costs([window(1.5, 4)], [judged("right", 2), judged("right", 2)])
    assert (cost.in_flight, cost.stall_s, cost.whole_after_s) == (2, 1, 2.5)


# The report.


def report(
    *found: Judged, is_single: bool = False, problems: tuple[str, ...] = (), unsharp: tuple[str, ...] = ()
) -> Report:
    windows = [window(1.5, 4), window(10, 15)]
    return Report(
        title="Drill: 4 groups x 2",
        date="2026-01-02",
        command="python -m benchmarks.drill",
        machine=MACHINE,
        settings={"load": "8 streams at a time"},
        is_single=is_single,
        costs=costs(windows, found),
        before=outcomes_by_fault(windows, found).get(-1, Counter()),
        judged=found,
        undisturbed=(0.02, 0.1),
        unsharp=unsharp,
        problems=problems,
    )


def test_a_drill_holds_where_every_stream_is_right():
    found = report(judged("right", 2))
    assert found.holds
    text = as_markdown(found)
    assert "**Holds**: of 1 streams 0 failed, 0 refused, 0 wrong, 0 hung" in text
    row = next(line for line in text.splitlines() if line.startswith("| experts-kill"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["experts-kill", "2", "1", "0", "0", "0", "0", "1.00", "1.00", "3.75", "5.00"]


@pytest.mark.parametrize("bad", ["failed", "refused", "wrong", "hung"])
def test_one_bad_stream_is_enough(bad: str):
    found = report(judged("right", 2), judged(bad, 11))
    assert not found.holds
    assert found.costs[1].outcomes == {bad: 1}
    assert f"- {bad}: request 1 (gRPC)" in as_markdown(found)
    assert as_plain(found)["outcomes"] == {"right": 1, bad: 1}


def test_with_single_copies_a_refusal_is_allowed_and_a_failure_is_not():
    assert report(judged("refused", 2), is_single=True).holds
    assert not report(judged("failed", 2), is_single=True).holds


def test_a_probe_must_be_right_with_single_copies_too():
    lost = Judged(stream=stream(1, end=UNAVAILABLE, probe=True), outcome="refused", at_s=2)
    found = report(lost, is_single=True)
    assert not found.holds
    assert "0 of 1 probes right" in as_markdown(found)


def test_a_script_that_broke_off_and_a_reference_that_wavers_do_not_hold():
    assert not report(judged("right", 2), problems=("not at full strength after 300 s",)).holds
    assert not report(judged("right", 2), unsharp=("7",)).holds


def test_what_vllm_answers_twice_is_from_all_over_the_drill_and_whatever_differs():
    streams = [stream(1, 2) for _ in range(10)]
    streams[3] = stream(1, 2, tokens=[0, 9])
    assert _to_repeat(streams, [expected(0, 1)] * 10, 2) == [0, 3, 5]
