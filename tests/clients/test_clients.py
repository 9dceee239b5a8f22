"""Clients from their packages get what plain HTTP gets: text for text, token for token, refusal for refusal."""

import subprocess
from collections.abc import Callable
from typing import cast

import pytest
from asking import Asked, Server
from plain import Json, answers
from roster import CLIENTS

CANCEL_S = 1.0
LOGPROB_TOLERANCE = 1e-4  # sums may differ in their last bits with what else is computed
# What else a script reports; tests of its own look at it.
ALSO = {"refused", "services", "error_on_stream", "cancelled", "cancel_took_s"}
INPUTS = (
    "text_input stream sampling_parameters exclude_input_in_output return_finish_reason return_cumulative_logprob "
    "return_logprobs return_num_input_tokens return_num_output_tokens"
)


@pytest.fixture(scope="module")
def expected(server: Server) -> Json:
    """Every answer, from plain HTTP; what only gRPC clients ask for is said in terms of it."""
    asked = Asked.read()
    plain = answers(server, asked)
    completion, tokens = str(plain["completion"]), cast("list[str]", plain["completion_tokens"])
    again = ("completion_as_words", "streamed_completion", "after_error", "after_cancel")
    return (
        plain
        | dict.fromkeys(again, completion)
        | dict.fromkeys(("live", "ready", "model_ready", "decoupled"), True)
        | {
            "streamed_seeded": plain["completion_seeded"],
            "with_prompt": asked.prompt + completion,
            "finish_reason": "length" if len(tokens) == asked.max_tokens else "stop",
            "num_output_tokens": len(tokens),
            "inputs": sorted(INPUTS.split()),
            "health": "SERVING",
        }
    )


@pytest.fixture(scope="module")
def told(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Json]:
    """A client's name -> what its script got, which runs once."""
    known: dict[str, Json | BaseException] = {}

    def told_by(name: str) -> Json:
        if name not in known:
            try:
                known[name] = CLIENTS[name].run(server, tmp_path_factory.mktemp(name))
            except (AssertionError, subprocess.TimeoutExpired) as error:
                known[name] = error
        found = known[name]
        if isinstance(found, BaseException):
            raise found
        return found

    return told_by


@pytest.mark.parametrize(
    ("name", "answer"), [(name, answer) for name, client in CLIENTS.items() for answer in sorted(client.tells)]
)
def test_a_client_gets_what_plain_http_gets(
    name: str, answer: str, told: Callable[[str], Json], expected: Json
) -> None:
    if answer.endswith("logprobs"):
        assert told(name)[answer] == pytest.approx(expected[answer], abs=LOGPROB_TOLERANCE)
    else:
        assert told(name)[answer] == expected[answer]


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_tells_nothing_that_is_not_compared(name: str, told: Callable[[str], Json]) -> None:
    assert told(name).keys() - ALSO == CLIENTS[name].tells


@pytest.mark.parametrize(("name", "why"), [(name, why) for name, client in CLIENTS.items() for why in client.refusals])
def test_a_refusal_is_the_clients_own_error(name: str, why: str, told: Callable[[str], Json], server: Server) -> None:
    refused = cast("dict[str, list[str]]", told(name)["refused"])
    if why == "wrong_key" and server.key is None:
        assert why not in refused  # a cluster that runs already, without keys: nothing to refuse
    else:
        assert CLIENTS[name].refusals[why] in refused[why]


def test_the_answers_are_worth_comparing(expected: Json) -> None:
    assert expected["stop_reason"] == "stop"
    assert str(expected["chat"]).startswith(str(expected["stopped"]))
    assert len(set(cast("list[str]", expected["choices"]))) == Asked.read().n
    assert expected["chat"] != expected["seeded"]
    assert expected["refused"] == {
        why: [status]
        for why, status in (("unknown_model", "404"), ("too_long", "400"), ("wrong_key", "401"))
        if why in cast("dict[str, list[str]]", expected["refused"])
    }


def test_reflection_lists_every_service(told: Callable[[str], Json]) -> None:
    services = cast("list[str]", told("grpc-requests")["services"])
    assert {"expertmesh.v1.Inference", "inference.GRPCInferenceService", "grpc.health.v1.Health"} <= set(services)


def test_an_error_on_a_stream_names_the_model(told: Callable[[str], Json]) -> None:
    assert "no-such-model" in cast("str", told("tritonclient")["error_on_stream"])


def test_a_cancelled_stream_ends_as_cancelled_and_at_once(told: Callable[[str], Json]) -> None:
    found = told("tritonclient")
    assert found["cancelled"] == ["StatusCode.CANCELLED"]
    assert cast("float", found["cancel_took_s"]) < CANCEL_S
