"""What a real data plane counts: a router and its expert groups over sockets, and an engine's client at it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import values
from local_plane import LocalPlane
from peers import Asker, Reference, closed_by_peer, raw, wait_until
from played_router import Engine
from prometheus_client import Metric

from cluster.metrics import ENGINE
from cluster.step import Step
from experts.metrics import ExpertMetrics
from experts.placement import Replica
from router.balance import expert_load, group_rows
from router.gate import route
from router.metrics import RouterMetrics

NUM_GROUPS = 4


class Counted:
    """A plane with the metrics of its members, and every expert that its gate has chosen so far."""

    def __init__(self, nano: Path) -> None:
        self.plane = LocalPlane(nano, dtype="float32", num_groups=NUM_GROUPS, max_rows=64).start()
        assert self.plane.router is not None and self.plane.routing is not None
        self.router = self.plane.router
        wait_until(lambda: len(self.router.connected_groups) == NUM_GROUPS)
        self.reference = Reference(self.plane)
        self.shape = self.reference.shape
        self._router_metrics = RouterMetrics(self.plane.routing, self.router)
        self._expert_metrics = {replica: self._metrics_of(replica) for replica in self.plane.groups}
        self.asker = Asker(self.plane)
        self.chosen: dict[int, list[torch.Tensor]] = {layer: [] for layer in self.shape.moe_layers}

    def ask(self, num_tokens: int, layer: int) -> None:
        question = self.reference.question(num_tokens, seed=layer)
        self.asker.send(question, layer=layer)
        answer = self.asker.receive()
        assert isinstance(answer, torch.Tensor)
        self.reference.check(answer, question, layer=layer)
        self.chosen[layer].append(route(question.logits, self.shape).topk_idx)

    def of_router(self) -> list[Metric]:
        self._router_metrics.fold(1.0)
        return list(self._router_metrics.collect())

    def of_experts(self, name: str) -> dict[tuple[str, ...], float]:
        """Of all groups together, whose labels differ."""
        found: dict[tuple[str, ...], float] = {}
        for metrics in self._expert_metrics.values():
            metrics.fold(1.0)
            found |= values(metrics.collect(), name)
        return found

    def _metrics_of(self, replica: Replica) -> ExpertMetrics:
        held = self.shape.home_experts(replica.group, NUM_GROUPS)
        server = self.plane.groups[replica]
        return ExpertMetrics(server, group=replica.group, held=held, layers=self.shape.moe_layers)


@pytest.fixture
def counted(nano: Path) -> Iterator[Counted]:
    counted = Counted(nano)
    with counted.plane:
        yield counted
        counted.asker.close()


def test_questions_are_counted_at_the_router_and_where_they_are_computed(counted: Counted) -> None:
    for layer in counted.shape.moe_layers:
        for num_tokens in (1, 7, 64):
            counted.ask(num_tokens, layer)
    num_questions = 3 * len(counted.shape.moe_layers)
    router = counted.of_router()
    rows, tokens, tokens_of_experts = {}, {}, {}
    for layer, parts in counted.chosen.items():
        topk_idx = torch.cat(parts)
        tokens[(str(layer),)] = 72
        loads = group_rows(topk_idx, num_experts=counted.shape.num_experts, num_groups=NUM_GROUPS).tolist()
        rows |= {(str(group), str(layer)): load for group, load in enumerate(loads)}
        of_layer = expert_load(topk_idx, num_experts=counted.shape.num_experts).tolist()
        for expert, load in enumerate(of_layer):
            group = expert // (counted.shape.num_experts // NUM_GROUPS)
            tokens_of_experts[str(expert), str(group), str(layer)] = load
    assert values(router, "expertmesh_routed_tokens_total") == tokens
    assert values(router, "expertmesh_routed_rows_total") == rows
    assert counted.of_experts("expertmesh_expert_rows_total") == rows
    assert counted.of_experts("expertmesh_expert_tokens_total") == tokens_of_experts
    assert values(router, "expertmesh_fanout_groups_sum") == {(): sum(rows.values())}
    assert values(router, "expertmesh_combine_seconds_count") == {(): num_questions}
    computed = counted.of_experts("expertmesh_expert_compute_seconds_count")
    assert values(router, "expertmesh_dispatch_seconds_count") == computed
    assert counted.of_experts("expertmesh_expert_wait_seconds_count") == computed
    assert all(seconds > 0 for seconds in counted.of_experts("expertmesh_expert_compute_seconds_sum").values())


def test_nothing_is_left_in_the_gauges_once_all_is_answered(counted: Counted) -> None:
    counted.ask(5, counted.shape.moe_layers[0])
    router = counted.of_router()
    assert set(values(router, "expertmesh_rows_in_flight").values()) == {0}
    assert len(values(router, "expertmesh_rows_in_flight")) == NUM_GROUPS
    assert values(router, "expertmesh_parked_rows") == values(router, "expertmesh_open_questions") == {(): 0}
    assert values(router, "expertmesh_placement_version")[()] == counted.router.dispatcher.placement.version
    assert set(values(router, "expertmesh_reroutes_total").values()) == {0}


def test_rows_without_a_copy_are_parked_and_their_question_fails(counted: Counted) -> None:
    first = next(iter(counted.plane.groups))
    counted.plane.stop_group(first)
    wait_until(lambda: first.group not in counted.router.connected_groups)
    counted.asker.send(counted.reference.question(64), budget_s=0.5)
    wait_until(lambda: values(counted.of_router(), "expertmesh_parked_rows")[()] > 0)
    assert values(counted.of_router(), "expertmesh_open_questions") == {(): 1}
    assert isinstance(counted.asker.receive(), str)
    router = counted.of_router()
    assert values(router, "expertmesh_failed_questions_total") == {(): 1}
    assert values(router, "expertmesh_parked_rows") == values(router, "expertmesh_open_questions") == {(): 0}


def test_a_refused_link_is_counted_by_its_reason(counted: Counted) -> None:
    with raw(counted.router.address) as sock:
        sock.sendall(bytes(5000))
        assert closed_by_peer(sock)
    assert values(counted.of_router(), "expertmesh_links_refused_total")[("handshake",)] == 1


def test_an_engine_counts_its_waits_and_what_it_asks_again(counted: Counted) -> None:
    ENGINE.end_step(0, poisoned=False)
    before = values(ENGINE.collect(), "expertmesh_answer_wait_seconds_count")[()]
    retries = ENGINE.question_retries
    engine = Engine(counted.plane, Step(), step_timeout_s=10.0)
    engine.client.connect(timeout_s=5)
    question = counted.reference.question(3)
    counted.reference.check(engine.layer(question), question)
    assert ENGINE.question_retries == retries
    counted.plane.stop_router()
    counted.plane.start_router()
    counted.reference.check(engine.layer(question), question)
    assert ENGINE.question_retries == retries + 1
    ENGINE.end_step(3, poisoned=False)
    assert values(ENGINE.collect(), "expertmesh_answer_wait_seconds_count")[()] == before + 2
