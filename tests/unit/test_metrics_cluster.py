"""What engines, gateways and the controller count."""

import pytest
from families import values

from cluster import gateway_errors
from cluster.metrics import OUTCOMES, ControllerMetrics, EngineMetrics, GatewayMetrics
from experts.placement import Member, Placement, Replica


def test_a_step_without_tokens_is_none() -> None:
    engine = EngineMetrics()
    for num_tokens, poisoned in ((0, False), (5, False), (0, True), (7, True)):
        engine.begin_step()
        engine.end_step(num_tokens, poisoned=poisoned)
    engine.requests = lambda: (3, 4)
    families = list(engine.collect())
    assert values(families, "expertmesh_step_seconds_count") == {(): 2}
    assert values(families, "expertmesh_step_tokens_total") == {(): 12}
    assert values(families, "expertmesh_poisoned_steps_total") == {(): 1}
    assert values(families, "expertmesh_engine_requests") == {("running",): 3, ("waiting",): 4}


def test_waits_are_counted_with_the_step_that_they_belong_to() -> None:
    engine = EngineMetrics()
    engine.begin_step()
    engine.wait_notes.extend((0.25, 0.5))
    assert values(engine.collect(), "expertmesh_answer_wait_seconds_count") == {(): 0}
    engine.end_step(1, poisoned=True)
    assert values(engine.collect(), "expertmesh_answer_wait_seconds_sum") == {(): 0.75}
    assert not engine.wait_notes


def test_a_request_is_open_until_it_ends_and_then_counted_under_its_outcome() -> None:
    gateway = GatewayMetrics()
    with gateway.request("http"), gateway.request("grpc") as refused:
        assert values(gateway.collect(), "expertmesh_open_requests") == {(): 2}
        refused.outcome = "overloaded"
    with pytest.raises(GeneratorExit), gateway.request("grpc"):
        raise GeneratorExit
    with pytest.raises(ValueError), gateway.request("http"):
        raise ValueError
    families = list(gateway.collect())
    assert values(families, "expertmesh_open_requests") == {(): 0}
    counted = values(families, "expertmesh_requests_total")
    assert {ending: number for ending, number in counted.items() if number} == {
        ("ok", "http"): 1,
        ("overloaded", "grpc"): 1,
        ("cancelled", "grpc"): 1,
        ("internal_error", "http"): 1,
    }
    assert counted.keys() == {(outcome, surface) for outcome in OUTCOMES for surface in ("http", "grpc")}


def test_outcomes_are_the_codes_that_clients_are_told() -> None:
    codes = {answer.code for _, answer in (*gateway_errors._TABLE, (Exception, gateway_errors._OUR_FAULT))}
    assert set(OUTCOMES) == {"ok", "cancelled", gateway_errors.refusal_of_status(418, "", None).outcome, *codes}
    assert len(set(OUTCOMES)) == len(OUTCOMES)


def test_a_stream_has_one_first_token_and_then_the_times_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.metrics.time.monotonic", iter((50.0, 52.0, 52.5, 53.25)).__next__)
    gateway = GatewayMetrics()
    clock = gateway.stream()
    for _ in range(3):
        clock.on_tokens()
    assert (sum(gateway.first_token.counts), gateway.first_token.total) == (1, 2.0)
    assert (sum(gateway.inter_token.counts), gateway.inter_token.total) == (2, 1.25)


def test_the_controller_shows_members_copies_and_decisions() -> None:
    def member(kind: str, name: str) -> Member:
        return Member(kind=kind, member_id=name, incarnation=1, address="", node_id="n", pid=1)  # pyright: ignore

    controller = ControllerMetrics(2)
    copies = (
        Replica(member_id="a", group=0, address="", incarnation=1),
        Replica(member_id="b", group=0, address="", incarnation=2),
    )
    members = [member("experts", "a"), member("experts", "b"), member("router", "r")]
    controller.on_sweep(members, Placement(version=7, num_groups=2, replicas=copies))
    controller.on_scale_changes(1, {"up busy": 1, "down idle": 3})
    controller.on_scale_changes(1, {"up busy": 2})
    families = list(controller.collect())
    counted = values(families, "expertmesh_members")
    assert counted == {("experts",): 2, ("router",): 1, ("attention",): 0}
    assert values(families, "expertmesh_group_copies") == {("0",): 2, ("1",): 0}
    assert values(families, "expertmesh_placement_version") == {(): 7}
    decisions = values(families, "expertmesh_scale_decisions_total")
    assert decisions.pop(("up", "1", "busy")) == 2
    assert decisions.pop(("down", "1", "idle")) == 3
    assert set(decisions.values()) == {0}
