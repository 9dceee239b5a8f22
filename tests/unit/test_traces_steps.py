"""Traces of steps: which are picked, and the spans of their layers."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest
from local_plane import LocalPlane
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from peers import LAYER, Reference, wait_until
from played_router import Engine
from traces_fakes import config, facts, ids, trip

from cluster.engine_link import EngineLinkOptions
from cluster.exporter import OFF
from cluster.router_client import TracedRouterClient
from cluster.spans import Spans, StepSpans
from cluster.step import Step, Trip


class EverySecond:
    """Picks every second step."""

    def __init__(self) -> None:
        self.heard: list[tuple[list[int], str | None]] = []

    def gap(self) -> int:
        return 2

    def on_step(self, begun_ns: int, trips: Sequence[Trip], reason: str | None) -> None:
        assert begun_ns <= trips[0].begun_ns
        self.heard.append(([trip.layer for trip in trips], reason))


def test_only_picked_steps_have_room_for_trips() -> None:
    step, tracer = Step(), EverySecond()
    step.begin()
    assert step.trips is None
    step.trace_with(tracer)
    for number in range(6):
        step.begin()
        assert (step.trips is not None) == (number % 2 == 1)
        if step.trips is not None:
            step.trips.extend([trip(number), trip(number + 10)])
        if number == 3:
            step.poison("late")
        step.take()
        assert step.trips is None
    assert tracer.heard == [([1, 11], None), ([3, 13], "late"), ([5, 15], None)]


def test_a_step_without_trips_is_not_traced() -> None:
    step, tracer = Step(), EverySecond()
    step.trace_with(tracer)
    for _ in range(4):
        step.begin()
        step.take()
    assert not tracer.heard


def test_so_many_steps_are_traced_as_the_share_says() -> None:
    spans = Spans(config(), "engine", "attention#a", exporter=InMemorySpanExporter())
    rare, every = StepSpans(spans, 0.1), StepSpans(spans, 1.0)
    assert {every.gap() for _ in range(100)} == {1}
    gaps = [rare.gap() for _ in range(20_000)]
    assert min(gaps) == 1 and 9.5 < sum(gaps) / len(gaps) < 10.5
    spans.close()


@pytest.fixture(scope="module")
def plane(nano: Path) -> Iterator[LocalPlane]:
    with LocalPlane(nano, dtype="float32", num_groups=2, max_rows=16) as plane:
        plane.start()
        router = plane.router
        assert router is not None
        wait_until(lambda: set(router._links) == set(plane.groups))
        yield plane


def traced(engine: Engine) -> Engine:
    plain = engine.client
    engine.client = TracedRouterClient(plain._router, plain._limits, engine.step, step_timeout_s=plain._step_timeout_s)
    return engine


def test_a_traced_step_has_a_span_for_each_layers_trip(plane: LocalPlane) -> None:
    reference, exporter = Reference(plane), InMemorySpanExporter()
    spans = Spans(config(), "engine", "attention#a", exporter=exporter)
    engine = traced(Engine(plane, Step(), step_timeout_s=4.0))
    engine.layer(reference.question(1))  # before anything is traced
    engine.step.trace_with(StepSpans(spans, 1.0))
    engine.step.begin()
    for layer in reference.shape.moe_layers:
        question = reference.question(5, seed=layer)
        reference.check(engine.layer(question, layer), question, layer=layer)
    assert engine.step.take() is None
    engine.client._lose_link()
    spans.close()
    *trips, step = exporter.get_finished_spans()
    assert (step.name, step.parent) == ("engine.step", None)
    assert facts(step) == {"expertmesh.tokens": 5, "expertmesh.layers": len(reference.shape.moe_layers)}
    assert [facts(span)["expertmesh.layer"] for span in trips] == list(reference.shape.moe_layers)
    for span in trips:
        assert span.name == "layer.trip" and facts(span)["expertmesh.rows"] == 5
        assert span.parent is not None and span.parent.span_id == ids(step).span_id
        assert span.start_time and span.end_time and step.start_time and step.end_time
        assert step.start_time <= span.start_time <= span.end_time <= step.end_time
        dispatch_s, wait_s = (cast("float", facts(span)[f"expertmesh.{name}_s"]) for name in ("dispatch", "wait"))
        assert dispatch_s > 0 and wait_s > 0
        assert dispatch_s + wait_s < (span.end_time - span.start_time) / 1e9 + 1e-3


def test_a_poisoned_step_is_traced_as_far_as_it_came(plane: LocalPlane) -> None:
    exporter = InMemorySpanExporter()
    spans = Spans(config(), "engine", "attention#a", exporter=exporter)
    engine = traced(Engine(plane, Step(), step_timeout_s=0.2, address="unix:/tmp/no-such-router.sock"))
    engine.step.trace_with(StepSpans(spans, 1.0))
    engine.step.begin()
    question = Reference(plane).question(2)
    assert not engine.layer(question).any() and not engine.layer(question, LAYER + 1).any()
    assert engine.step.take() is not None
    spans.close()
    trip_span, step = exporter.get_finished_spans()
    assert facts(trip_span)["expertmesh.layer"] == LAYER
    assert step.status.status_code is StatusCode.ERROR
    assert step.status.description is not None and "the router did not answer" in step.status.description


def test_an_engine_hears_of_the_traces_in_plain_values() -> None:
    options = EngineLinkOptions(
        checkpoint="c",
        router_address="unix:r",
        secret_file="s",
        num_groups=2,
        max_rows=16,
        member_id="attention#a",
        step_timeout_s=1.0,
        start_timeout_s=1.0,
        publisher=OFF,
        traces=config(steps=0.5),
    )
    assert EngineLinkOptions.of(json.loads(json.dumps(options.as_dict()))) == options
