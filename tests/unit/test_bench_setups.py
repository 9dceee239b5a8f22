"""What benchmarks/bench_serving.py runs, and in which order; without any engine."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from benchmarks.bench_serving import make_prompts, measure_rounds
from benchmarks.serving_fleet import Fleet
from benchmarks.serving_options import parse
from benchmarks.serving_process import Child, ChildError, clean_environment, end_all
from benchmarks.serving_setups import Member, Setup, fitting, members_of, parse_setup, tensor_parallel_cores
from benchmarks.serving_stats import Trace, deal, differing, summarise
from experts.errors import ConfigError

GIB = 1 << 30


# Rounds.


class PlayedFleet:
    """Answers at once: a token is the sum of the prompt, and `wrong` setups add one in streams past the first."""

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong
        self.ran: list[str] = []

    def others(self, setup: Setup) -> list[object]:
        return []

    def run(self, setup: Setup, prompts: list[list[int]], num_tokens: int) -> list[Trace]:
        self.ran.append(f"{setup.name} {len(prompts)}")
        off = setup.name == self.wrong
        times_s = [1.0 + i for i in range(num_tokens)]
        return [
            Trace(
                begun_s=0.0,
                times_s=[times_s] * len(dealt),
                tokens=[[sum(prompt) + (off and i > 0)] for i, prompt in enumerate(dealt)],
            )
            for dealt in deal(prompts, setup.num_engines)
        ]


def test_every_round_has_every_setup_and_begins_with_another_one():
    options, fleet = parse(["--quick", "--streams", "1,4", "--setups", "vllm,D=4,D=4 x2"]), PlayedFleet()
    found = measure_rounds(cast(Fleet, fleet), options.setups, options, 100)
    first = ["vllm 1", "D=4 1", "vllm 4", "D=4 4", "D=4 x2 4"]
    assert fleet.ran == [*first, "D=4 1", "vllm 1", "D=4 4", "D=4 x2 4", "vllm 4"]
    assert {key: len(rounds) for key, rounds in found.items()} == dict.fromkeys(found, 2)
    assert ("D=4 x2", 1) not in found  # one stream cannot be shared
    assert all(m.identical == 1.0 for m in found["D=4 x2", 4])


def test_wrong_tokens_are_found_in_every_number_of_streams_that_has_them():
    options, fleet = parse(["--quick", "--streams", "1,4"]), PlayedFleet(wrong="D=4")
    cells = summarise(measure_rounds(cast(Fleet, fleet), options.setups, options, 100), against=("vllm",))
    assert [(cell.setup, cell.streams, cell.identical) for cell in differing(cells)] == [("D=4", 4, 0.25)]


def test_prompts_are_the_same_for_every_setup_and_others_in_every_round():
    options = parse(["--quick"])
    first, again, later = (make_prompts(options, 50, 3, number) for number in (1, 1, 2))
    assert first == again
    assert first != later
    assert [len(prompt) for prompt in first] == [32] * 3
    assert {token for prompt in first for token in prompt} <= set(range(3, 50))


# Setups.


def test_a_split_has_its_groups_a_router_and_its_engines():
    setup = parse_setup("D=2 x2")
    assert [member.name for member in setup.members] == [
        "D=2 experts-0",
        "D=2 experts-1",
        "D=2 router",
        "D=2 x2 attention-0",
        "D=2 x2 attention-1",
    ]
    assert [member.name for member in setup.engines] == ["D=2 x2 attention-0", "D=2 x2 attention-1"]
    assert parse_setup("D=2x2") == setup


@pytest.mark.parametrize("name", ["D=0", "D=4 x0", "D=", "tp2", ""])
def test_an_unknown_setup_is_refused(name: str):
    with pytest.raises(ConfigError, match="choose vllm"):
        parse_setup(name)


def test_setups_with_the_same_number_of_groups_share_their_groups_and_router_but_no_engine():
    assert len(members_of([parse_setup("D=4"), parse_setup("D=4 x2")])) == 4 + 1 + 1 + 2


def gib_each(member: Member) -> int:
    return 3 * GIB if member.kind == "vllm-tp2" else GIB


def test_what_frees_the_most_memory_is_left_out_first_and_never_the_baseline():
    setups = [Setup(name="vllm"), Setup(name="vllm-tp2"), parse_setup("D=2"), parse_setup("D=8")]
    kept, dropped = fitting(setups, gib_each, 100 * GIB)
    assert (len(kept), dropped) == (4, ())
    kept, dropped = fitting(setups, gib_each, 8 * GIB)
    assert [setup.name for setup in kept] == ["vllm", "vllm-tp2", "D=2"]
    assert [setup.name for setup in dropped] == ["D=8"]
    kept, _ = fitting(setups, gib_each, GIB)
    assert [setup.name for setup in kept] == ["vllm"]
    with pytest.raises(ConfigError, match="smaller checkpoint"):
        fitting(setups, gib_each, GIB // 2)


def test_the_ranks_of_tensor_parallel_get_halves_of_the_cores():
    assert tensor_parallel_cores([0, 1], 2) == "0|1"
    assert tensor_parallel_cores([7, 5, 4, 6], 4) == "4,5|6,7"
    with pytest.raises(ConfigError, match="--baseline-threads is 3"):
        tensor_parallel_cores([0, 1, 2, 3], 3)
    with pytest.raises(ConfigError, match="there are 1 cores"):
        tensor_parallel_cores([0], 2)


# The command line.


def test_a_run_keeps_nothing_unless_told_where():
    assert parse([]).out is None
    assert parse(["--quick", "--out", "here"]).out == Path("here")


def test_options_given_win_over_those_of_a_quick_run():
    options = parse(["--quick", "--streams", "2,4,2", "--setups", "vllm, D=4x2"])
    assert options.streams == (2, 4)
    assert [setup.name for setup in options.setups] == ["vllm", "D=4 x2"]
    assert options.rounds == 2


@pytest.mark.parametrize("wrong", [["--streams", "0"], ["--setups", "D=x"], ["--rounds", "-1"]])
def test_a_wrong_option_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse(wrong)
    assert wrong[0] in capsys.readouterr().err


# Processes.

CHILD = """
import sys, time
from benchmarks.serving_child import serve

def handle(request):
    time.sleep(request["sleep_s"])
    return 1 / request["divisor"]

print("a library prints")
serve(lambda: ("ready", handle))
"""


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    (tmp_path / "a_child.py").write_text(CHILD)
    environment = clean_environment()
    environment["PYTHONPATH"] += f":{tmp_path}"
    child = Child("one", "a_child", [], environment=environment, log=tmp_path / "log")
    yield child
    end_all([child])


def test_a_process_answers_line_by_line_and_shows_its_memory(child: Child):
    assert child.answer(timeout_s=60) == "ready"
    child.tell({"divisor": 4, "sleep_s": 0})
    assert child.answer(timeout_s=60) == 0.25
    assert [process.name for process in child.memory()] == ["one"]
    assert child.memory()[0].pss_bytes > 1 << 20


def test_a_process_that_fails_says_why(child: Child):
    child.answer(timeout_s=60)
    child.tell({"divisor": 0, "sleep_s": 0})
    with pytest.raises(ChildError, match=r"(?s)the process one failed with ZeroDivisionError.*Traceback"):
        child.answer(timeout_s=60)


def test_a_process_ends_with_its_input_even_while_it_computes(child: Child):
    child.answer(timeout_s=60)
    child.tell({"divisor": 1, "sleep_s": 300})
    with pytest.raises(ChildError, match="did not answer within 0 s"):
        child.answer(timeout_s=0.1)
    started_s = time.monotonic()
    end_all([child])
    assert time.monotonic() - started_s < 5
    assert child.family == []
