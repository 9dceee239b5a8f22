"""Debian's real Prometheus scrapes the running cluster, and answers a query for each metric of docs/metrics.md."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import yaml
from elastic import give, held_back, requests, wait_for_copies
from prometheus import Prometheus, binary, scraping
from ray_cluster import ROOT, Cluster, free_port
from shipped_rules import evaluation_errors, wait_for_alert, without_number, write_rules

PROMPT = [5, 6, 7, 8, 9, 10]
TIMEOUT_S = 60.0


def explained() -> dict[str, str]:
    """The table of docs/metrics.md: name -> a query for it."""
    rows = re.findall(r"^\| `(expertmesh_\w+)` \| (\w+) \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    return {name: f"{name}_count" if kind == "histogram" else name for name, kind in rows}


@pytest.fixture(scope="module")
def prometheus(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    if binary() is None:
        pytest.skip("there is no `prometheus` on PATH: apt-get install prometheus")
    port = yaml.safe_load((cluster.home / "config.yaml").read_text())["metrics"]["port"]
    folder = tmp_path_factory.mktemp("prometheus")
    rules = write_rules(folder, hold="0s")
    with scraping(folder, port=free_port(), target=f"127.0.0.1:{port}", rules=rules) as server:
        yield server


def wait_until(holds: Callable[[], bool]) -> None:
    """Scrapes are a second apart, and processes count twice a second."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline_s, f"it did not come true within {TIMEOUT_S:g} s"
        time.sleep(0.5)


def ask_on_both_doors(cluster: Cluster) -> None:
    cluster.generate(PROMPT, 16)
    client = openai.OpenAI(base_url=f"{cluster.http}/v1", api_key="none", max_retries=0)
    for _ in client.completions.create(model="", prompt=PROMPT, max_tokens=16, stream=True):
        pass


def test_prometheus_answers_a_query_for_every_metric_that_is_explained(
    cluster: Cluster, prometheus: Prometheus
) -> None:
    queries = explained()
    assert len(queries) > 30

    def missing() -> list[str]:
        ask_on_both_doors(cluster)
        return [name for name, query in queries.items() if not prometheus.query(query)]

    try:
        wait_until(lambda: not missing())
    except AssertionError:
        raise AssertionError(f"Prometheus has no sample of {missing()}") from None


def test_the_page_has_every_process_of_the_cluster_and_what_they_did(cluster: Cluster, prometheus: Prometheus) -> None:
    cluster.generate(PROMPT, 16)
    # Gateway, two routers, controller, four expert groups, two attention replicas with an engine each.
    wait_until(lambda: prometheus.number('expertmesh_exporter_processes{state="answered"}') == 12)
    wait_until(lambda: (prometheus.number('expertmesh_requests_total{surface="grpc",outcome="ok"}') or 0) > 0)
    for query, number in {
        "count(expertmesh_step_tokens_total)": 2,
        "sum(expertmesh_group_copies)": 4,
        'expertmesh_members{kind="attention"}': 2,
        "max(expertmesh_placement_version) - min(expertmesh_placement_version)": 0,
    }.items():
        wait_until(lambda query=query, number=number: prometheus.number(query) == number)
    time.sleep(3)  # for what was counted before to be scraped, too
    queries = ("sum(expertmesh_routed_rows_total)", "sum(expertmesh_expert_rows_total)")
    before = [prometheus.number(query) or 0 for query in queries]
    cluster.generate(PROMPT, 16)

    def are_all_rows_computed() -> bool:
        # More where rows were overdue, and asked of another copy as well.
        routed, computed = ((prometheus.number(query) or 0) - then for query, then in zip(queries, before))
        return 0 < routed <= computed

    wait_until(are_all_rows_computed)


def test_every_expression_of_the_shipped_rules_and_dashboards_finds_a_number(
    cluster: Cluster, prometheus: Prometheus
) -> None:
    def missing() -> list[str]:
        ask_on_both_doors(cluster)
        return [str(expression) for expression in without_number(prometheus)]

    try:
        wait_until(lambda: not missing())
    except AssertionError:
        raise AssertionError(f"Prometheus has no number for {missing()}") from None
    assert evaluation_errors(prometheus) == []


def test_a_killed_copy_fires_the_alert_of_its_group_until_another_one_is_there(
    cluster: Cluster, prometheus: Prometheus, config: dict, tmp_path: Path
) -> None:
    alert = "ExpertmeshGroupWithoutSpareCopy"
    wait_for_alert(prometheus, alert, "firing", group=0)  # one copy is all there is
    expected = cluster.generate(PROMPT, 64)
    with requests(lambda: cluster.generate(PROMPT, 64), expected, streams=2):
        give(cluster, tmp_path / "two.yaml", config | {"experts": {"groups": 4, "replicas": 2}})
        wait_for_copies(cluster, 0, 2)
        wait_for_alert(prometheus, alert, "inactive", group=0)
        victim = next(member["pid"] for member in cluster.members("experts") if member["group"] == 0)
        copies = cluster.expert_pids(0)
        assert victim in copies
        # On a quick machine its successor is there before its lease has run out, and nobody has missed a copy.
        with held_back(cluster, 0, but=copies):
            os.kill(victim, signal.SIGKILL)
            wait_for_alert(prometheus, alert, "firing", group=0, timeout_s=30)
        wait_for_alert(prometheus, alert, "inactive", group=0, timeout_s=120)
    assert evaluation_errors(prometheus) == []
