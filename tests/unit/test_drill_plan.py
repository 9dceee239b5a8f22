"""The script and the requests of benchmarks/drill.py, and its command line."""

from collections import Counter

import pytest

from benchmarks.drill import without_history
from benchmarks.drill_faults import _HOW
from benchmarks.drill_options import parse
from benchmarks.drill_plan import KINDS, make_plan
from benchmarks.drill_requests import GREEDY, Mix, make_ask, make_probe
from cluster.proto.expertmesh.v1 import inference_pb2 as pb

MIX = Mix(seed=3, prompts=[[5, 6], [7, 8, 9]], num_tokens=(10, 20))


def test_a_script_has_each_kind_as_often_as_asked_and_is_the_same_for_a_seed():
    plan = make_plan(KINDS, times=5, seed=1)
    assert Counter(fault.kind for fault in plan) == dict.fromkeys(KINDS, 5)
    assert plan == make_plan(KINDS, times=5, seed=1)
    assert plan != make_plan(KINDS, times=5, seed=2)
    assert all(0 <= fault.pick < 1 for fault in plan)


def test_every_kind_of_fault_can_be_applied():
    assert _HOW.keys() == set(KINDS)


def test_a_request_depends_on_its_index_alone():
    assert make_ask(MIX, 17) == make_ask(MIX, 17)
    assert len({make_ask(MIX, index).name for index in range(50)}) == 50


def test_the_requests_are_a_mix_of_everything():
    asks = [make_ask(MIX, index) for index in range(200)]
    seeded = [ask for ask in asks if "seed" in ask.sampling]
    penalised = [ask for ask in asks if ask.sampling["frequency_penalty"]]
    assert {ask.surface for ask in asks} == {"gRPC", "HTTP"}
    assert 60 < len(seeded) < 140
    assert {("seed" in ask.sampling) for ask in penalised} == {True, False}
    assert {ask.sampling["ignore_eos"] for ask in asks} == {True, False}
    assert {ask.sampling["max_tokens"] for ask in asks} == set(range(10, 21))
    assert all(ask.sampling["temperature"] > 0 for ask in seeded)
    assert all(ask.sampling["temperature"] == 0 for ask in asks if ask not in seeded)


def test_every_parameter_is_one_of_the_grpc_message():
    for index in range(20):
        ask = make_ask(MIX, index)
        request = pb.GenerateRequest(**ask.sampling)  # type: ignore[arg-type]
        assert request.max_tokens == ask.sampling["max_tokens"]
        assert all(request.HasField(name) for name in GREEDY)  # nothing is left to a default


def test_a_probe_is_greedy_and_marked():
    probe = make_probe(MIX, 4)
    assert probe.is_probe
    assert probe.sampling["temperature"] == 0
    assert not make_ask(MIX, 4).is_probe


def test_the_command_line_has_the_drill_of_the_issue_as_its_default():
    options = parse([])
    assert (options.minutes, options.num_streams, options.times) == (10, 200, 5)
    assert options.size.members == {"experts": 8, "router": 2, "attention": 2}
    assert options.kinds == KINDS
    assert not options.is_single


def test_a_short_drill_can_be_asked_for():
    options = parse(["--replicas=1", "--tokens=8,16", "--faults=experts-kill,router-kill"])
    assert options.kinds == ("experts-kill", "router-kill")
    assert options.num_tokens == (8, 16)
    assert options.is_single


@pytest.mark.parametrize("wrong", ["--faults moon", "--tokens 9,3", "--minutes 0", "--times 0"])
def test_what_makes_no_sense_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse(wrong.split())
    assert wrong.split()[0] in capsys.readouterr().err


def test_the_shown_command_names_no_folder_of_this_machine():
    assert without_history(["--seed", "2", "--history", "/h", "--times=3", "--history=/h"]) == [
        "--seed",
        "2",
        "--times=3",
    ]
