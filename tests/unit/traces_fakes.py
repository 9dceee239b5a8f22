"""What the tests of traces share: spans as they read them, and an attention replica over a vLLM that can die."""

import time
from collections.abc import AsyncGenerator, Mapping
from typing import cast

from gateway_fakes import FakeEngine
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext
from vllm.engine.protocol import EngineClient
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from cluster import traces
from cluster.attention import Attention
from cluster.gateway_failover import ContinuingEngine
from cluster.output_wire import unpack
from cluster.step import Trip
from cluster.traces_config import TracesConfig

NOWHERE = "http://127.0.0.1:9/v1/traces"
CLIENT_TRACE, CLIENT_SPAN = 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7
SAMPLED = f"00-{CLIENT_TRACE:032x}-{CLIENT_SPAN:016x}-01"
NOT_SAMPLED = SAMPLED[:-1] + "0"


def config(*, sample: float = 1.0, steps: float = 1.0, endpoint: str = NOWHERE) -> TracesConfig:
    return TracesConfig(endpoint=endpoint, sample_share=sample, step_share=steps)


def facts(span: ReadableSpan) -> Mapping[str, object]:
    return span.attributes or {}


def ids(span: ReadableSpan) -> SpanContext:
    assert span.context is not None
    return span.context


def events(span: ReadableSpan) -> list[tuple[str, dict[str, object]]]:
    return [(event.name, dict(event.attributes or {})) for event in span.events]


class Collected:
    """The spans of a process that is a gateway from now on, until they are asked for."""

    def __init__(self, *, sample: float = 1.0) -> None:
        self._exporter = InMemorySpanExporter()
        traces.set_up(config(sample=sample), "gateway", "gateway#a", model="nano", exporter=self._exporter)

    def all(self) -> list[ReadableSpan]:
        traces.shut_down()
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def one(self) -> ReadableSpan:
        (span,) = self.all()
        return span


class Replica(Attention):
    """An attention replica over another engine than vLLM's, which says how often it ended itself."""

    def __init__(self, engine: "Vllm") -> None:
        self._engine = cast("EngineClient", engine)  # type: ignore[assignment]
        self._requests = 0
        self.ended = 0

    def _end_soon(self) -> None:
        self.ended += 1


class Vllm(FakeEngine):
    """Dies after so many tokens, each time again; then it lives."""

    def __init__(self, *lives: int) -> None:
        super().__init__()
        self.lives = list(lives)
        self.prompts: list[dict[str, object]] = []

    async def generate(
        self, prompt: Mapping[str, object], params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        self.prompts.append(dict(prompt))
        life = self.lives.pop(0) if self.lives else 99
        async for output in super().generate(prompt, params, request_id):
            if life == 0:
                raise EngineDeadError
            life -= 1
            yield output


class Handle(FakeEngine):
    """A replica as the gateway calls it."""

    def __init__(self, vllm: Vllm) -> None:
        super().__init__()
        self.replica = Replica(vllm)

    async def generate(
        self, prompt: Mapping[str, object], params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        prompt_token_ids = cast("list[int]", prompt["prompt_token_ids"])
        async for packed in self.replica.generate(dict(prompt), params, request_id):
            plain = cast("bytes | RequestOutput", packed)  # without a reply_to nothing else comes
            yield unpack(plain, request_id=request_id, prompt_token_ids=prompt_token_ids)


class Continuing(FakeEngine):
    def __init__(self, vllm: Vllm) -> None:
        super().__init__()
        self.handle = Handle(vllm)
        self._engine = ContinuingEngine(self.handle)

    def generate(
        self, prompt: Mapping[str, object], params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        return self._engine.generate(prompt, params, request_id)


def trip(layer: int) -> Trip:
    now_ns = time.time_ns()
    return Trip(layer=layer, num_rows=3, begun_ns=now_ns, ended_ns=now_ns + 9, dispatch_s=1e-9, wait_s=5e-9)
