"""docs/metrics.md names exactly the metrics that there are, as they are, and who has them."""

import re
from collections import Counter, deque
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

import cluster.exporter
import cluster.metrics
import experts.counting
import experts.metrics
import router.metrics
from cluster.exposition import render
from cluster.metrics import AttentionMetrics, ControllerMetrics, EngineMetrics, GatewayMetrics
from experts.counting import Spec
from experts.metrics import BatchNote, ExpertMetrics
from experts.placement import Placement, Replica
from experts.shape import MoEShape
from experts.wire import DType
from router.metrics import RouterMetrics
from router.routing_counts import RoutingCounts

PAGE = Path(__file__).parents[2] / "docs/metrics.md"
MODULES = (experts.counting, experts.metrics, router.metrics, cluster.metrics, cluster.exporter)
SPECS = {spec.name: spec for module in MODULES for spec in vars(module).values() if isinstance(spec, Spec)}
SHAPE = MoEShape(moe_layers=(1, 2), hidden_size=8, moe_intermediate_size=8, num_experts=8, top_k=2)


def explained() -> dict[str, list[str]]:
    """The table: name -> [type, labels, unit, meaning, process]."""
    rows: dict[str, list[str]] = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("| `expertmesh_"):
            name, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            assert name.strip("`") not in rows, f"{name} is explained twice"
            rows[name.strip("`")] = cells
    return rows


class ExpertServerStub:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.batch_notes: deque[BatchNote] = deque()


def router_of_two_groups() -> RouterMetrics:
    routing = RoutingCounts(SHAPE, num_groups=2, sample_every=1)
    chosen = np.array([[0, 1], [2, 5], [6, 7]], np.int32), np.ones((3, 2), np.float32)
    for layer in SHAPE.moe_layers:
        routing.counted(lambda *_: chosen)(layer, np.zeros((3, 8), np.float32), DType.FLOAT32, 1.0)
    copies = [Replica(member_id=f"experts-{g}#{g}a", group=g, address="", incarnation=g) for g in range(2)]
    dispatcher = SimpleNamespace(
        dispatch_notes=[deque(), deque([0.25, 0.5])],
        in_flight=[(copies[0], 5), (copies[0], 2)],
        parked_rows=0,
        open_questions=1,
        counts=Counter({"timeouts": 4}),
        placement=Placement(version=1, num_groups=2, replicas=tuple(copies)),
    )
    server = SimpleNamespace(dispatcher=dispatcher, combine_notes=deque([0.125]), refused=Counter())
    metrics = RouterMetrics(routing, server)  # pyright: ignore[reportArgumentType]
    metrics.fold(1.0)
    return metrics


def controller_of_two_groups() -> ControllerMetrics:
    controller = ControllerMetrics(2)
    controller.on_sweep([], Placement(version=1, num_groups=2))
    return controller


def collectors() -> dict[str, Collector]:
    """One of every process, none of which has had much to do."""
    return {
        "expert replica": ExpertMetrics(ExpertServerStub(), group=0, held=range(4), layers=SHAPE.moe_layers),
        "router": router_of_two_groups(),
        "engine": EngineMetrics(),
        "attention replica": AttentionMetrics(lambda: 0),
        "gateway": GatewayMetrics(),
        "controller": controller_of_two_groups(),
        "exporter": cast("Collector", cluster.exporter._Answered(3, 0)),
    }


def families_of(collector: Collector) -> dict[str, Metric]:
    """What a scrape reads, by the names of our table."""
    read = text_string_to_metric_families(render(collector, {}).decode())
    return {family.name + ("_total" if family.type == "counter" else ""): family for family in read}


def test_every_metric_is_explained_and_no_other() -> None:
    assert explained().keys() == SPECS.keys()


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_metrics_type_labels_unit_and_meaning_are_as_explained(name: str) -> None:
    kind, labels, unit, meaning, _ = explained()[name]
    spec = SPECS[name]
    assert (kind, unit, meaning) == (spec.kind, spec.unit, spec.meaning)
    assert tuple(re.findall(r"`(\w+)`", labels)) == spec.labels


def test_names_are_built_alike() -> None:
    for spec in SPECS.values():
        assert re.fullmatch(r"expertmesh_[a-z_]+", spec.name)
        assert (spec.kind == "counter") == spec.name.endswith("_total"), spec.name
        assert (spec.unit == "seconds") == ("_seconds" in spec.name), spec.name
        assert spec.meaning.endswith("."), spec.name
        assert not {"replica", "deployment", "request"} & set(spec.labels), spec.name


def test_every_process_gives_what_the_table_says_and_nothing_else() -> None:
    given = {process: families_of(collector).keys() for process, collector in collectors().items()}
    told = {name: set(cells[-1].split(", ")) for name, cells in explained().items()}
    assert {name: {process for process, names in given.items() if name in names} for name in told} == told
    assert set().union(*given.values()) == told.keys()


@pytest.mark.parametrize("process", sorted(collectors()))
def test_every_metric_has_a_sample_from_the_start_with_the_labels_that_are_explained(process: str) -> None:
    for name, family in families_of(collectors()[process]).items():
        spec = SPECS[name]
        assert family.type == spec.kind
        assert family.samples, f"a query for {name} would find nothing"
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(spec.labels), name


def test_queries_in_the_page_name_metrics_that_there_are() -> None:
    histograms = {name for name, spec in SPECS.items() if spec.kind == "histogram"}
    served = (SPECS.keys() - histograms) | {f"{n}_{end}" for n in histograms for end in ("bucket", "sum", "count")}
    queries = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "?" in line]
    assert queries
    for line in queries:
        assert set(re.findall(r"\bexpertmesh_\w+", line)) <= served, line


def test_rows_in_flight_are_by_copy() -> None:
    samples = families_of(router_of_two_groups())["expertmesh_rows_in_flight"].samples
    assert {(s.labels["group"], s.labels["copy"]): s.value for s in samples} == {("0", "0a"): 7, ("1", "1a"): 0}


def test_a_router_counts_the_times_that_were_noted() -> None:
    families = families_of(router_of_two_groups())
    dispatched = {
        s.labels["group"]: s.value for s in families["expertmesh_dispatch_seconds"].samples if "sum" in s.name
    }
    assert dispatched == {"0": 0, "1": 0.75}
    combined = families["expertmesh_combine_seconds"].samples
    assert [sample.value for sample in combined if "sum" in sample.name] == [0.125]


def test_reroutes_are_by_cause() -> None:
    samples = families_of(router_of_two_groups())["expertmesh_reroutes_total"].samples
    assert {s.labels["cause"]: s.value for s in samples} == {"link_lost": 0, "nack": 0, "slow": 0, "silence": 4}


def test_fanout_counts_each_token_once_a_layer() -> None:
    samples = families_of(router_of_two_groups())["expertmesh_fanout_groups"].samples
    by_name = {s.name.removeprefix("expertmesh_fanout_groups_") + s.labels.get("le", ""): s.value for s in samples}
    assert by_name == {"bucket1.0": 4, "bucket2.0": 6, "bucket+Inf": 6, "count": 6, "sum": 2 * (1 + 2 + 1)}
