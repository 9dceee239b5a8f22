"""Traces on their way to a collector: OTLP over HTTP, and a collector that takes nothing."""

import socket
import time
from collections.abc import AsyncGenerator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import cast

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from traces_fakes import CLIENT_SPAN, CLIENT_TRACE, NOWHERE, SAMPLED, Vllm, config, trip
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from cluster import traces
from cluster.metrics import GATEWAY
from cluster.spans import Spans


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP, and nothing else."""

    def __init__(self) -> None:
        received = self.received = cast("list[ExportTraceServiceRequest]", [])

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
                raw = self.rfile.read(int(self.headers["content-length"]))
                received.append(ExportTraceServiceRequest.FromString(raw))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}/v1/traces"
        Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def spans(self) -> dict[str, list[tuple[str, bytes, bytes, bytes]]]:
        """By service.name: name, trace, span, parent."""
        found: dict[str, list[tuple[str, bytes, bytes, bytes]]] = {}
        for message in self.received:
            for of_process in message.resource_spans:
                resource = {each.key: each.value.string_value for each in of_process.resource.attributes}
                for scope in of_process.scope_spans:
                    assert scope.scope.name == "expertmesh"
                    found.setdefault(resource["service.name"], []).extend(
                        (span.name, span.trace_id, span.span_id, span.parent_span_id) for span in scope.spans
                    )
        return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector
        collector.shutdown()


async def outputs_of(vllm: Vllm) -> AsyncGenerator[RequestOutput, None]:
    async for output in vllm.generate({"prompt_token_ids": [1]}, SamplingParams(), "mine"):
        yield output


async def test_a_collector_gets_the_spans_of_all_parts(collector: Collector) -> None:
    asked_for = config(endpoint=collector.endpoint)
    gateway, attention, engine = (Spans(asked_for, part, f"{part}#a") for part in ("gateway", "attention", "engine"))
    generation = gateway.begin("gateway.generation", SAMPLED)
    assert generation is not None
    assert attention.begin("attention.generate", None) is None  # no trace begins there
    async for _ in attention.follow(outputs_of(Vllm()), generation.traceparent, "mine"):
        pass
    generation.end({"expertmesh.outcome": "ok"})
    engine.step(time.time_ns(), [trip(1), trip(2)], None)
    for spans in (gateway, attention, engine):
        spans.close()
    found = collector.spans()
    ((name, trace, generation_id, parent),) = found["expertmesh-gateway"]
    assert (name, trace, parent) == (
        "gateway.generation",
        CLIENT_TRACE.to_bytes(16, "big"),
        CLIENT_SPAN.to_bytes(8, "big"),
    )
    ((name, trace, _, parent),) = found["expertmesh-attention"]
    assert (name, trace, parent) == ("attention.generate", CLIENT_TRACE.to_bytes(16, "big"), generation_id)
    *trips, step = found["expertmesh-engine"]
    assert step[0] == "engine.step" and step[3] == b"" and step[1] != trace
    assert [(name, trace, parent) for name, trace, _, parent in trips] == [("layer.trip", step[1], step[2])] * 2


def test_a_gateways_spans_reach_the_collector_when_it_ends(collector: Collector) -> None:
    traces.set_up(config(endpoint=collector.endpoint), "gateway", "gateway#a")
    with GATEWAY.request("http"):
        pass
    traces.shut_down()
    assert [name for name, *_ in collector.spans()["expertmesh-gateway"]] == ["gateway.generation"]


@pytest.mark.parametrize("listens", [False, True], ids=["nobody listens", "it never answers"])
def test_a_collector_that_takes_nothing_disturbs_no_request_and_holds_up_the_end_for_seconds_only(
    listens: bool, hanging: str
) -> None:
    traces.set_up(config(endpoint=hanging if listens else NOWHERE), "gateway", "gateway#a")
    began_s = time.monotonic()
    for _ in range(20):
        with GATEWAY.request("http"):
            pass
    assert time.monotonic() - began_s < 1
    traces.shut_down()
    assert time.monotonic() - began_s < 10


@pytest.fixture
def hanging() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/traces"
