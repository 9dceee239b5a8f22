"""All that knows OpenTelemetry: a process's way to the collector, and its spans.

Nothing is set for the whole process, and no span is "the current one": vLLM, Ray and Serve have traces of their own.
"""

import math
import random
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.step import Trip
from cluster.traces_config import TracesConfig

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

EXPORT_TIMEOUT_S = 2.0  # for a batch, with all attempts; also what an end waits for each batch that is left
MAX_WAITING = 1024  # spans; later ones are dropped
_W3C = TraceContextTextMapPropagator()

Facts = Mapping[str, str | int | float]


class Recorded:
    """A span of a request that is sampled."""

    def __init__(self, span: Span) -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        """For those whose spans are to be this one's children."""
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, set_span_in_context(self._span, Context()))
        return carrier["traceparent"]

    def event(self, name: str, facts: Facts | None = None) -> None:
        self._span.add_event(name, facts)

    def end(self, facts: Facts, *, failure: str | None = None) -> None:
        """failure: why it counts as an error: a word, and never an exception's text, which may quote a prompt."""
        self._span.set_attributes(facts)
        if failure is not None:
            self._span.set_status(Status(StatusCode.ERROR, failure))
        self._span.end()


class Spans:
    """What one process traces, and where it goes."""

    def __init__(
        self,
        config: TracesConfig,
        part: str,
        member_id: str,
        *,
        model: str = "",
        exporter: SpanExporter | None = None,
    ) -> None:
        """part: gateway begins traces, engine has those that it picks itself; others have a part in a gateway's.

        exporter: None: to `config.endpoint`.
        """
        root_share = {"gateway": config.sample_share, "engine": 1.0}.get(part, 0.0)
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(root_share),
            resource=Resource.create({"service.name": f"expertmesh-{part}", "service.instance.id": member_id}),
            shutdown_on_exit=False,  # cluster/traces.py does it
        )
        exporter = exporter or OTLPSpanExporter(endpoint=config.endpoint, timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=MAX_WAITING))
        self._tracer = self._provider.get_tracer("expertmesh")
        self._model: Facts = {"gen_ai.request.model": model} if model else {}

    def begin(self, name: str, traceparent: str | None) -> Recorded | None:
        """A span in the trace that `traceparent` names, or in a new one; None where it is not sampled."""
        parent = Context() if traceparent is None else _W3C.extract({"traceparent": traceparent}, Context())
        span = self._tracer.start_span(name, parent, kind=SpanKind.SERVER, attributes=self._model)
        return Recorded(span) if span.is_recording() else None

    async def follow(
        self, outputs: AsyncGenerator["RequestOutput", None], traceparent: str, request_id: str
    ) -> AsyncGenerator["RequestOutput", None]:
        """An engine's outputs, and a span from the first request for one until their end."""
        facts: dict[str, str | int | float] = {"expertmesh.request_id": request_id}
        span = self.begin("attention.generate", traceparent)
        ending, failure = "cancelled", None  # how it ends where nobody asks for the last output
        num_outputs = 0
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    if not num_outputs and span is not None:
                        span.event("first_token")
                        facts["gen_ai.usage.input_tokens"] = len(output.prompt_token_ids or ())
                    num_outputs += 1
                    if output.finished:
                        ending = str(output.outputs[0].finish_reason)
                        failure = ending if ending in ("error", "abort") else None
                    yield output
        except Exception as error:
            ending = failure = type(error).__name__
            raise
        finally:
            if span is not None:
                span.end({**facts, "expertmesh.outputs": num_outputs, "expertmesh.ending": ending}, failure=failure)

    def step(self, begun_ns: int, trips: Sequence[Trip], reason: str | None) -> None:
        """The spans of a step that has ended just now, in a trace of its own; times on time.time_ns()."""
        facts = {"expertmesh.tokens": trips[0].num_rows, "expertmesh.layers": len(trips)}
        step = self._tracer.start_span("engine.step", Context(), attributes=facts, start_time=begun_ns)
        inside = set_span_in_context(step, Context())
        for trip in trips:
            self._tracer.start_span(
                "layer.trip", inside, kind=SpanKind.CLIENT, attributes=_facts_of(trip), start_time=trip.begun_ns
            ).end(trip.ended_ns)
        if reason is not None:
            step.set_status(Status(StatusCode.ERROR, reason))
        step.end()

    def close(self) -> None:
        """Sends what has ended; what ends later goes nowhere."""
        self._provider.shutdown()


class StepSpans:
    """Picks the steps that are traced (`cluster.step.StepTracer`)."""

    def __init__(self, spans: Spans, share: float) -> None:
        """share: of all steps, above 0."""
        self._spans = spans
        # Of the time between two events that come at random; in whole steps, each is traced with probability `share`.
        self._rate = -math.log1p(-share) if share < 1 else math.inf

    def gap(self) -> int:
        return 1 + int(random.expovariate(self._rate))

    def on_step(self, begun_ns: int, trips: Sequence[Trip], reason: str | None) -> None:
        self._spans.step(begun_ns, trips, reason)


def _facts_of(trip: Trip) -> Facts:
    return {
        "expertmesh.layer": trip.layer,
        "expertmesh.rows": trip.num_rows,
        "expertmesh.dispatch_s": trip.dispatch_s,
        "expertmesh.wait_s": trip.wait_s,
    }
