"""What k8s/components/monitoring asks Prometheus: only what there is, only what it takes, and every alert fires."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

import promql_parser
import pytest
import yaml
from shipped_rules import COMPONENT, Explained, alerts, dashboards, explained, expressions, filled, rules, write_rules

from cluster.metrics import OUTCOMES, SURFACES
from experts.counting import REFUSALS

ALERTS = Path(__file__).parent / "alerts"
ALERTS_PAGE = Path(__file__).parents[2] / "docs/monitoring.md"
# Labels that Prometheus, the operator, the PodMonitors and the exporter add to those of docs/metrics.md.
TARGET_LABELS = {"job", "namespace", "pod", "instance", "endpoint", "moe_role", "ray_io_cluster"}
COMMON_LABELS = TARGET_LABELS | {"deployment", "replica", "le"}
# Values of our labels; where a metric has others than another one under the same label, by both.
VALUES: dict[str, tuple[object, ...]] = {
    "group": (0, 1),
    "layer": (1, 2),
    "expert": (0, 1, 2, 3),
    "copy": ("a",),
    "surface": SURFACES,
    "outcome": OUTCOMES,
    "reason": REFUSALS,
    "cause": ("link_lost", "nack", "slow", "silence"),
    "kind": ("experts", "router", "attention"),
    "direction": ("up", "down"),
    "expertmesh_balance_factor level": ("expert", "device", "communication"),
    "expertmesh_balancedness level": ("expert", "group"),
    "expertmesh_engine_requests state": ("running", "waiting"),
    "expertmesh_kv_blocks state": ("used", "free"),
    "expertmesh_exporter_processes state": ("answered", "silent"),
    "expertmesh_failovers_total outcome": ("continued", "given_up"),
    "expertmesh_scale_decisions_total reason": ("busy", "idle", "bounds"),
}
DEPLOYMENTS = {"expert replica": "experts-0", "engine": "attention", "attention replica": "attention"}


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("there is no `promtool` on PATH: apt-get install prometheus")
    return found


def run(*command: str | Path, cwd: Path | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr


def series_of(metric: Explained) -> Iterator[tuple[str, str]]:
    """(series, values) of a metric that counts, as promtool's tests write them."""
    values = [VALUES.get(f"{metric.name} {label}") or VALUES[label] for label in metric.labels]
    for process, chosen in product(metric.processes, product(*values)):
        own = {label: str(value) for label, value in zip(metric.labels, chosen)}
        if process != "exporter":
            own |= {"deployment": DEPLOYMENTS.get(process, process), "replica": process[:2]}
        if metric.kind == "histogram":
            for le, growth in (("0.1", 6), ("1.0", 8), ("+Inf", 9)):
                yield selector(f"{metric.name}_bucket", own | {"le": le}), f"0+{growth}x40"
            yield selector(f"{metric.name}_sum", own), "0+2x40"
        name = f"{metric.name}_count" if metric.kind == "histogram" else metric.name
        yield selector(name, own), "1+0x40" if metric.kind == "gauge" else "0+9x40"


def selector(name: str, labels: dict[str, str]) -> str:
    return name + "{" + ", ".join(f'{label}="{value}"' for label, value in labels.items()) + "}"


def selectors(expr: str) -> list[promql_parser.VectorSelector]:
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(expr), visit)
    return found


def labels_by_served_name() -> dict[str, set[str]]:
    """The contract: names on the pages, `up`, and what our own rules record, with the labels that they may have."""
    found = {"up": TARGET_LABELS}
    for metric in explained():
        ends = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        found |= {metric.name + end: {*metric.labels, *COMMON_LABELS} for end in ends}
    for group in rules()["groups"]:
        for rule in group["rules"]:
            if "record" in rule:
                # By convention a record's name begins with its labels.
                known = {"namespace", "layer", "expert", "level", "group"}
                found[rule["record"]] = {label for label in known if label in rule["record"].split(":")[0].split("_")}
    return found


def queries(board: dict) -> Iterable[str]:
    """Of the dashboard's variables."""
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield re.sub(r"^label_values\((.*), \w+\)$", r"\1", variable["query"]["query"])


def test_prometheus_takes_the_rules(promtool: str, tmp_path: Path) -> None:
    run(promtool, "check", "rules", "--lint=all", "--lint-fatal", write_rules(tmp_path))


def test_every_alert_waits_fires_and_is_resolved(promtool: str, tmp_path: Path) -> None:
    spec = rules()
    for group in spec["groups"]:
        for rule in group["rules"]:
            rule.get("annotations", {}).pop("description", None)  # promtool compares all texts: the summary will do
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    files = sorted(shutil.copy(path, tmp_path) for path in ALERTS.glob("*.yaml"))
    run(promtool, "test", "rules", *files, cwd=tmp_path)


def test_every_alert_has_a_test_in_which_it_waits_fires_and_is_resolved() -> None:
    tested: dict[str, list[str]] = {}
    for path in ALERTS.glob("*.yaml"):
        for case in yaml.safe_load(path.read_text())["tests"]:
            for one in case["alert_rule_test"]:
                fires = "fires" if one["exp_alerts"] else "not"
                tested.setdefault(one["alertname"], []).append(fires)
    for alert in alerts():
        assert "not fires not" in " ".join(tested.get(alert["alert"], ())), alert["alert"]


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for alert in alerts():
        name = alert["alert"]
        assert name.startswith("Expertmesh")
        assert alert["labels"].keys() == {"severity"} and alert["labels"]["severity"] in ("critical", "warning"), name
        assert re.fullmatch(r"\d+[sm]", alert["for"]), name
        assert alert["annotations"].keys() == {"summary", "description"}, name
        assert len(alert["annotations"]["description"]) > 80, name
        assert all(text.endswith(".") and "  " not in text for text in alert["annotations"].values()), name


def test_the_page_explains_every_alert_and_no_other() -> None:
    told = re.findall(r"^\| `(Expertmesh\w+)` \| (\w+) \| (\w+) \|", ALERTS_PAGE.read_text(), re.MULTILINE)
    assert told == [(alert["alert"], alert["labels"]["severity"], alert["for"]) for alert in alerts()]


def test_only_metrics_and_labels_that_there_are_are_asked_for() -> None:
    served = labels_by_served_name()
    asked = [(f"{one.source}: {one.name}", one.expr) for one in expressions()]
    asked += [(file, filled(query)) for file, board in dashboards().items() for query in queries(board)]
    asked += [(alert["alert"], alert["expr"]) for alert in alerts()]
    assert len(asked) > 100
    for where, expr in asked:
        for chosen in selectors(expr):
            assert chosen.name in served or (chosen.name or "").startswith("ray_"), f"{where} asks for {chosen.name}"
            labels = {matcher.name for matcher in chosen.matchers.matchers}
            assert labels <= served.get(chosen.name or "", labels), f"{where}: {chosen.name} has not all of {labels}"


def test_every_metric_is_in_a_dashboard_or_a_rule() -> None:
    asked = {chosen.name or "" for one in expressions() for chosen in selectors(one.expr)}
    names = {re.sub("_(bucket|sum|count)$", "", name) for name in asked}
    assert {metric.name for metric in explained()} <= names


def test_prometheus_takes_every_expression_of_the_dashboards(promtool: str, tmp_path: Path) -> None:
    panels = [one for one in expressions() if one.source in dashboards()]
    records = [{"record": f"asked:{i}", "expr": one.expr} for i, one in enumerate(panels)]
    path = tmp_path / "asked.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": records}]}))
    run(promtool, "check", "rules", path)


def test_every_expression_finds_a_number_where_every_metric_is_served(promtool: str, tmp_path: Path) -> None:
    write_rules(tmp_path)
    served = [one for metric in explained() for one in series_of(metric)]
    served.append(('up{job="expertmesh"}', "1+0x40"))
    # NaN is neither more nor less than anything.
    found = [
        {
            "expr": f"count(({one.expr}) > -Inf) > bool 0",
            "eval_time": "9m",
            "exp_samples": [{"labels": "{}", "value": 1}],
        }
        for one in expressions()
    ]
    case = {
        "interval": "15s",
        "input_series": [{"series": series, "values": values} for series, values in served],
        "promql_expr_test": found,
    }
    test = {"rule_files": ["rules.yaml"], "evaluation_interval": "30s", "tests": [case]}
    (tmp_path / "numbers.yaml").write_text(yaml.safe_dump(test))
    run(promtool, "test", "rules", "numbers.yaml", cwd=tmp_path)


@pytest.mark.parametrize("file", sorted(dashboards()))
def test_a_dashboards_panels_have_their_own_ids_a_unit_and_the_chosen_data_source(file: str) -> None:
    board = dashboards()[file]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    first, *variables = board["templating"]["list"]
    assert (first["name"], first["type"], first["query"]) == ("datasource", "datasource", "prometheus")
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert all(variable["datasource"] == chosen for variable in variables)
    for panel in (panel for panel in board["panels"] if panel["type"] != "row"):
        assert panel["datasource"] == chosen, panel["title"]
        assert panel["targets"] and all(target["datasource"] == chosen for target in panel["targets"]), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        named = set(re.findall(r"\$(\w+)", " ".join(target["expr"] for target in panel["targets"])))
        assert named <= {"__rate_interval", *(variable["name"] for variable in variables)}, panel["title"]


def test_panels_do_not_lie_over_each_other_and_dashboards_have_their_own_names() -> None:
    boards = dashboards().values()
    assert len({board["uid"] for board in boards}) == len({board["title"] for board in boards}) == len(boards) == 4
    for board in boards:
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            at = panel["gridPos"]
            cells = set(product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
            assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
            taken |= cells


def test_an_overlay_with_the_component_renders(tmp_path: Path) -> None:
    kubectl = Path(sys.executable).parent / "kubectl"
    if not kubectl.exists():
        pytest.skip("there is no `kubectl` beside python: pip install '.[dev]'")
    overlay = {"kind": "Kustomization", "components": [os.path.relpath(COMPONENT, tmp_path.resolve())]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    command = [kubectl, "kustomize", tmp_path]
    rendered = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    by_kind: dict[str, list[dict]] = {}
    for document in yaml.safe_load_all(rendered):
        by_kind.setdefault(document["kind"], []).append(document)
        assert document["metadata"]["namespace"] == "expertmesh"
        assert document["metadata"]["labels"]["app.kubernetes.io/part-of"] == "expertmesh"
    assert {kind: len(found) for kind, found in by_kind.items()} == {
        "ConfigMap": len(dashboards()),
        "PodMonitor": 2,
        "PrometheusRule": 1,
    }
    assert by_kind["PrometheusRule"][0]["spec"] == rules()
    shown = {file: text for config_map in by_kind["ConfigMap"] for file, text in config_map["data"].items()}
    assert shown == {path.name: path.read_text() for path in (COMPONENT / "dashboards").glob("*.json")}
    assert all(found["metadata"]["labels"]["grafana_dashboard"] == "1" for found in by_kind["ConfigMap"])


def test_the_monitors_scrape_every_port_of_metrics_and_name_the_cluster() -> None:
    monitors = list(yaml.safe_load_all((COMPONENT / "podmonitors.yaml").read_text()))
    ports = {}
    for monitor in monitors:
        chosen = monitor["spec"]["selector"]["matchLabels"]
        assert chosen.keys() == {"app.kubernetes.io/part-of", "ray.io/node-type"}  # not the cluster: names change
        ports[chosen["ray.io/node-type"]] = [end["port"] for end in monitor["spec"]["podMetricsEndpoints"]]
        for end in monitor["spec"]["podMetricsEndpoints"]:
            assert {rule["targetLabel"] for rule in end["relabelings"]} == {"ray_io_cluster", "moe_role"}
    assert ports == {"worker": ["em-metrics", "metrics"], "head": ["metrics", "as-metrics", "dash-metrics"]}
