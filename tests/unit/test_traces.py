"""Traces of requests: which spans there are, what hangs on what, and that nothing is there where they are off."""

import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence

import grpc.aio
import pytest
from gateway_fakes import FakeEngine, Front, a_front
from opentelemetry.trace import StatusCode
from pydantic import ValidationError
from smg_grpc_proto.generated import vllm_engine_pb2_grpc
from traces_fakes import (
    CLIENT_SPAN,
    CLIENT_TRACE,
    NOT_SAMPLED,
    SAMPLED,
    Collected,
    Continuing,
    Replica,
    Vllm,
    events,
    facts,
    ids,
)
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm_engine_fakes import asked

from cluster import traces
from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.traces_config import TracesConfig
from experts.errors import GroupUnavailable, RequestError

TEXT = "xyzzy-plugh"
NO_TRACEPARENT = ["", "nonsense", SAMPLED + "0" * 200, SAMPLED.replace("4bf9", "zzzz"), "00-" + "0" * 32 + SAMPLED[35:]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    yield from a_front(tmp_path_factory.mktemp("model"))


@pytest.fixture
def front(running: Front) -> Iterator[Front]:
    """On exit nothing is traced any more."""
    running.use(FakeEngine())
    yield running
    traces.shut_down()


def rpc(front: Front, metadata: Sequence[tuple[str, str]] = (), **fields: object) -> None:
    async def call() -> None:
        await front.stub.Generate(pb.GenerateRequest(**fields), metadata=metadata)  # type: ignore[arg-type, misc]

    front.loop.run_until_complete(call())


def test_where_traces_are_off_nothing_of_opentelemetry_is_imported() -> None:
    program = """
import sys
import cluster.engine_link, cluster.gateway_failover, cluster.gateway_run, cluster.metrics
from cluster import traces
from cluster.traces_config import TracesConfig
traces.set_up(TracesConfig(), "gateway", "gateway#a")
assert traces.set_up_steps(TracesConfig(), "attention#a") is None
traces.continue_from([("traceparent", "x")])
with cluster.metrics.GATEWAY.request("http"):
    pass
print([name for name in sys.modules if name.startswith(("opentelemetry", "cluster.spans"))])
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_traces_are_off_unless_a_whole_address_is_given() -> None:
    assert TracesConfig().endpoint is None
    for endpoint in ("127.0.0.1:4318", "http://", "http://collector:4318", "grpc://collector:4317/v1/traces"):
        with pytest.raises(ValidationError, match=r"such as http://127\.0\.0\.1:4318/v1/traces"):
            TracesConfig(endpoint=endpoint)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_generation_over_http_has_a_span_with_its_facts(front: Front, stream: bool) -> None:
    collected = Collected()
    front.request(
        "POST", "/v1/completions", json={"prompt": "hello", "stream": stream}, headers={"x-request-id": "mine"}
    )
    span = collected.one()
    assert (span.name, span.parent, span.status.status_code) == ("gateway.generation", None, StatusCode.UNSET)
    assert facts(span) == {
        "gen_ai.request.model": "nano",
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 3,
        "expertmesh.request_id": str(facts(span)["expertmesh.request_id"]),
        "expertmesh.surface": "http",
        "expertmesh.outcome": "ok",
    }
    assert "mine" in str(facts(span)["expertmesh.request_id"])
    assert events(span) == [("first_token", {})]
    assert span.resource.attributes["service.name"] == "expertmesh-gateway"
    assert span.resource.attributes["service.instance.id"] == "gateway#a"


def test_generations_over_grpc_have_spans_too_and_other_requests_have_none(front: Front) -> None:
    collected = Collected()
    front.generate(prompt="hello", request_id="mine")
    front.stream(prompt="hello")
    front.check("")
    front.request("GET", "/v1/models")
    one, other = collected.all()
    assert facts(one)["expertmesh.request_id"] == "mine"
    assert {facts(span)["expertmesh.surface"] for span in (one, other)} == {"grpc"}
    assert ids(one).trace_id != ids(other).trace_id


def test_a_clients_trace_is_continued_over_http(front: Front) -> None:
    collected = Collected(sample=0.0)
    front.post("/v1/completions", prompt="hello")  # does not say it, so the share decides
    for value in (SAMPLED, NOT_SAMPLED):
        front.request("POST", "/v1/completions", json={"prompt": "hello"}, headers={"Traceparent": value})
    span = collected.one()
    assert span.parent is not None
    assert (span.parent.trace_id, span.parent.span_id) == (CLIENT_TRACE, CLIENT_SPAN)
    assert ids(span).trace_id == CLIENT_TRACE


def test_a_clients_trace_is_continued_over_grpc(front: Front) -> None:
    collected = Collected(sample=0.0)
    rpc(front, prompt="hello")
    rpc(front, [("traceparent", NOT_SAMPLED)], prompt="hello")
    rpc(front, [("traceparent", SAMPLED)], prompt="hello")
    rpc(front, prompt="hello")
    span = collected.one()
    assert span.parent is not None and span.parent.span_id == CLIENT_SPAN
    assert (ids(span).trace_id, facts(span)["expertmesh.surface"]) == (CLIENT_TRACE, "grpc")


def test_every_grpc_service_continues_it(front: Front) -> None:
    async def call(channel: grpc.aio.Channel) -> None:
        stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        async for _ in stub.Generate(asked(stream=True), metadata=[("traceparent", SAMPLED)]):  # type: ignore[call-arg]
            pass

    collected = Collected(sample=0.0)
    front.loop.run_until_complete(call(front.channel))
    assert ids(collected.one()).trace_id == CLIENT_TRACE


@pytest.mark.parametrize("value", NO_TRACEPARENT, ids=lambda value: value[:40])
def test_what_is_no_traceparent_begins_a_trace_of_its_own(front: Front, value: str) -> None:
    collected = Collected()
    answer = front.request("POST", "/v1/completions", json={"prompt": "hello"}, headers={"traceparent": value})
    assert answer.status_code == 200
    span = collected.one()
    assert span.parent is None and ids(span).trace_id != CLIENT_TRACE


def test_two_traceparents_name_none(front: Front) -> None:
    collected = Collected()
    front.request("POST", "/v1/completions", json={"prompt": "a"}, headers=[("traceparent", SAMPLED)] * 2)
    assert collected.one().parent is None


def test_only_what_no_client_is_to_blame_for_is_an_error(front: Front) -> None:
    collected = Collected()
    front.post("/v1/completions", prompt="hello", max_tokens=-1)
    front.engine.then = GroupUnavailable("expert group 1 is gone")
    front.post("/v1/completions", prompt="hello")
    refused, failed = collected.all()
    assert (facts(refused)["expertmesh.outcome"], refused.status.status_code) == ("invalid_value", StatusCode.UNSET)
    assert (facts(failed)["expertmesh.outcome"], failed.status.status_code) == ("unavailable", StatusCode.ERROR)
    assert failed.status.description == "unavailable"


def test_a_client_that_leaves_early_ends_its_span(front: Front) -> None:
    collected = Collected()
    front.engine.delay_s = 0.05
    front.leave_early(prompt="hello")
    assert facts(collected.one())["expertmesh.outcome"] == "cancelled"


def test_no_prompt_no_answer_and_no_key_is_in_any_span(front: Front) -> None:
    front.engine.words = list(TEXT)
    collected = Collected()
    key = {"authorization": f"Bearer {TEXT}"}
    for fault in (None, RequestError(f"cannot be said: {TEXT}"), ValueError(TEXT)):
        front.engine.then = fault
        for stream in (False, True):
            chat = {"messages": [{"role": "user", "content": TEXT}], "stream": stream}
            front.request("POST", "/v1/chat/completions", json=chat, headers=key)
        front.stream(prompt=TEXT)
    front.request("POST", "/v1/completions", json={"prompt": TEXT, TEXT: TEXT}, headers=key | {"tracestate": TEXT})
    spans = collected.all()
    assert len(spans) == 10
    assert not [span for span in spans if TEXT in span.to_json()]


def test_the_attention_replicas_span_is_a_child_of_the_gateways(front: Front) -> None:
    vllm = Vllm()
    front.use(Continuing(vllm))
    collected = Collected()
    front.stream(prompt="hello", request_id="mine")
    gateway, attention = collected.all()
    assert (gateway.name, attention.name) == ("gateway.generation", "attention.generate")
    assert attention.parent is not None and attention.parent.span_id == ids(gateway).span_id
    assert ids(attention).trace_id == ids(gateway).trace_id
    assert [name for name, _ in events(attention)] == ["first_token"]
    assert str(facts(attention)["expertmesh.request_id"]).startswith("mine-")
    assert facts(attention)["expertmesh.ending"] == "length"
    assert facts(attention)["expertmesh.outputs"] == 3
    assert facts(attention)["gen_ai.usage.input_tokens"] == 5
    assert vllm.prompts[0].keys() == {"prompt_token_ids"}


def test_an_unsampled_request_tells_the_replica_nothing(front: Front) -> None:
    seen: list[Mapping[str, object]] = []

    class Seeing(FakeEngine):
        def generate(
            self, prompt: Mapping[str, object], params: SamplingParams, request_id: str
        ) -> AsyncGenerator[RequestOutput, None]:
            seen.append(prompt)
            return super().generate(prompt, params, request_id)

    front.use(Seeing())
    collected = Collected(sample=0.0)
    front.stream(prompt="hello")
    assert not collected.all()
    assert [prompt.keys() for prompt in seen] == [{"prompt_token_ids"}]


def test_a_lost_replica_is_an_event_and_both_replicas_spans_are_in_the_trace(front: Front) -> None:
    vllm = Vllm(2)
    front.use(engine := Continuing(vllm))
    collected = Collected()
    chunks, _ = front.stream(prompt="hello")
    assert "".join(chunk.text for chunk in chunks) == "abc" and engine.handle.replica.ended == 1
    gateway, lost, other = collected.all()
    assert events(gateway) == [
        ("first_token", {}),
        ("attention.lost", {"expertmesh.attempt": 0, "expertmesh.tokens": 2}),
        ("attention.asked_again", {"expertmesh.attempt": 1, "expertmesh.tokens": 2}),
        ("attention.continued", {"expertmesh.attempt": 1, "expertmesh.tokens": 2}),
    ]
    assert facts(gateway)["gen_ai.usage.output_tokens"] == 3
    assert {span.parent.span_id for span in (lost, other) if span.parent} == {ids(gateway).span_id}
    assert (lost.status.status_code, facts(lost)["expertmesh.ending"]) == (StatusCode.ERROR, "EngineDeadError")
    assert other.status.status_code is StatusCode.UNSET


def test_a_replica_that_does_not_trace_keeps_the_gateways_word_from_its_engine(front: Front) -> None:
    vllm = Vllm()

    async def listen() -> int:
        prompt: dict[str, object] = {"prompt_token_ids": [1], traces.TRACEPARENT: SAMPLED}
        return len([output async for output in Replica(vllm).generate(prompt, SamplingParams(), "mine")])

    assert front.loop.run_until_complete(listen()) == 1
    assert vllm.prompts[0].keys() == {"prompt_token_ids"}
