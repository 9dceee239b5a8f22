"""The switch of the traces, and what requests and steps ask of them: nearly nothing where they are off.

A process traces from its `set_up` on, if the config names a collector. Only then cluster/spans.py is imported, and with
it OpenTelemetry. docs/traces.md says which spans there are.
"""

import atexit
from collections.abc import AsyncGenerator, Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal, cast

from cluster.traces_config import TracesConfig

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from vllm.outputs import RequestOutput

    from cluster.spans import Recorded, Spans
    from cluster.step import StepTracer

Part = Literal["gateway", "attention", "engine"]

# W3C's name of the header, and of ours in a prompt on its way to an attention replica.
TRACEPARENT = "traceparent"
_MAX_TRACEPARENT = 128  # characters; those of today's version have 55
_PARENT: ContextVar[str | None] = ContextVar("traceparent", default=None)  # of the request that a task works for

_spans: "Spans | None" = None  # of this process


def set_up(
    config: TracesConfig, part: Part, member_id: str, *, model: str = "", exporter: "SpanExporter | None" = None
) -> None:
    """Traces from now on, if the config says so. A second call ends what the first one began.

    model: the served name. exporter: in the place of one to the config's endpoint.
    """
    global _spans
    shut_down()
    if config.endpoint is None:
        return
    from cluster.spans import Spans

    _spans = Spans(config, part, member_id, model=model, exporter=exporter)
    atexit.unregister(shut_down)
    atexit.register(shut_down)


def set_up_steps(config: TracesConfig, member_id: str) -> "StepTracer | None":
    """The same for an engine's process; None where no step is ever traced."""
    if config.endpoint is None or not config.step_share:
        return None
    from cluster.spans import StepSpans

    set_up(config, "engine", member_id)
    assert _spans is not None
    return StepSpans(_spans, config.step_share)


def shut_down() -> None:
    """Sends what has ended, and traces no more. Takes seconds where the collector does not answer."""
    global _spans
    spans, _spans = _spans, None
    if spans is not None:
        spans.close()


def continue_from(headers: Iterable[tuple[str | bytes, str | bytes]]) -> None:
    """What this task begins from here on belongs to the client's trace, if its request names one.

    headers: of HTTP, or a gRPC call's metadata; names in lower case.
    """
    if _spans is None:
        return
    found = [value for name, value in headers if name in (TRACEPARENT, TRACEPARENT.encode())]
    value = found[0] if len(found) == 1 and len(found[0]) <= _MAX_TRACEPARENT else None
    _PARENT.set(value.decode("latin-1") if isinstance(value, bytes) else value)


def begin_generation() -> "Recorded | None":
    """The gateway's span of a generation; None where it is not traced."""
    return None if _spans is None else _spans.begin("gateway.generation", _PARENT.get())


def take_traceparent(prompt: dict[str, object]) -> str | None:
    """What the gateway has put into a prompt for us, and not for vLLM."""
    return cast("str | None", prompt.pop(TRACEPARENT, None))


def follow(
    outputs: AsyncGenerator["RequestOutput", None], traceparent: str | None, request_id: str
) -> AsyncGenerator["RequestOutput", None]:
    """The same outputs; where the gateway traces the request, under a span of the attention replica's."""
    if traceparent is None or _spans is None:
        return outputs
    return _spans.follow(outputs, traceparent, request_id)
