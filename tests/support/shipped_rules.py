"""The rules and dashboards of k8s/components/monitoring: what they ask, and what a real Prometheus answers."""

import json
import math
import re
import time
import urllib.request
from pathlib import Path
from typing import Literal, NamedTuple

import promql_parser
import yaml
from prometheus import Prometheus

COMPONENT = Path(__file__).parents[2] / "k8s/components/monitoring"
METRICS_PAGE = Path(__file__).parents[2] / "docs/metrics.md"
COMPARISONS = {"==", "!=", "<", "<=", ">", ">="}
# What Grafana puts in, where everything is chosen.
VARIABLES = {"$__rate_interval": "1m", "$namespace": ".*", "$layer": ".*"}


class Expression(NamedTuple):
    """One question to Prometheus, as it is shipped but for the variables, which are filled in."""

    source: str  # the dashboard's file name, or the group of rules
    name: str  # the panel's title, or the name of the record or alert
    expr: str


class Explained(NamedTuple):
    """One line of docs/metrics.md."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    processes: tuple[str, ...]


def rules() -> dict:
    """The PrometheusRule's spec, which is a rule file."""
    return yaml.safe_load((COMPONENT / "prometheusrule.yaml").read_text())["spec"]


def alerts() -> list[dict]:
    return [rule for group in rules()["groups"] for rule in group["rules"] if "alert" in rule]


def dashboards() -> dict[str, dict]:
    """By file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted((COMPONENT / "dashboards").glob("*.json"))}


def explained() -> list[Explained]:
    """The table of docs/metrics.md."""
    rows = []
    for line in METRICS_PAGE.read_text().splitlines():
        if line.startswith("| `expertmesh_"):
            name, kind, labels, _, _, processes = (cell.strip() for cell in line.strip("|").split(" | "))
            assert kind == "counter" or kind == "gauge" or kind == "histogram"
            found = tuple(re.findall(r"`(\w+)`", labels))
            rows.append(Explained(name.strip("`"), kind, found, tuple(processes.split(", "))))
    return rows


def write_rules(folder: Path, *, hold: str | None = None) -> Path:
    """The rule file in `folder`. hold: every alert's `for`, such as `0s`; None: as they are shipped."""
    spec = rules()
    for group in spec["groups"]:
        for rule in group["rules"]:
            if "alert" in rule and hold is not None:
                rule["for"] = hold
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def expressions() -> list[Expression]:
    """Of every panel, every recording rule, and every alert.

    An alert finds nothing while all is well, so of alerts these are the numbers that they compare.
    """
    found = [
        Expression(file, panel["title"], filled(target["expr"]))
        for file, board in dashboards().items()
        for panel in board["panels"]
        for target in panel.get("targets", ())
    ]
    for group in rules()["groups"]:
        for rule in group["rules"]:
            name = rule.get("record") or rule["alert"]
            for expr in [rule["expr"]] if "record" in rule else compared(rule["expr"]):
                found.append(Expression(group["name"], name, expr))
    return found


def filled(expr: str) -> str:
    """The expression without Grafana's variables."""
    for variable, value in VARIABLES.items():
        expr = expr.replace(variable, value)
    return expr


def compared(expr: str) -> list[str]:
    """The numbers that an alert compares with a bound: `a` and `b` of `a > 1 and b < 2`, `a` of `absent(a)`."""
    return [part.prettify() for part in _compared(promql_parser.parse(expr))]


def _compared(node: promql_parser.Expr) -> list[promql_parser.Expr]:
    if isinstance(node, promql_parser.ParenExpr):
        return _compared(node.expr)
    if isinstance(node, promql_parser.BinaryExpr) and str(node.op) == "and":
        return _compared(node.lhs) + _compared(node.rhs)
    if isinstance(node, promql_parser.BinaryExpr) and str(node.op) in COMPARISONS:
        return [node.lhs]
    assert isinstance(node, promql_parser.Call) and node.func.name == "absent", f"{node} compares nothing"
    return list(node.args)


def without_number(server: Prometheus) -> list[Expression]:
    """The expressions for which Prometheus has no sample, or only ones that are no number."""
    return [one for one in expressions() if not _has_number(server, one.expr)]


def _has_number(server: Prometheus, expr: str) -> bool:
    return any(not math.isnan(float(sample["value"][1])) for sample in server.query(expr))


def evaluation_errors(server: Prometheus) -> list[str]:
    """Of the rules that it has loaded, and of what alerts say: annotations that do not expand, or miss a value."""
    errors = []
    with urllib.request.urlopen(f"{server.http}/api/v1/rules", timeout=10) as answer:
        groups = json.load(answer)["data"]["groups"]
    assert groups, "no rules are loaded"
    for rule in (rule for group in groups for rule in group["rules"]):
        if rule.get("lastError"):
            errors.append(f"{rule['name']}: {rule['lastError']}")
        for alert in rule.get("alerts", ()):
            texts = alert["annotations"].values()
            errors += [f"{rule['name']}: {text}" for text in texts if "<no value>" in text or "<error " in text]
    return errors


def alert_state(server: Prometheus, name: str, **labels: object) -> Literal["inactive", "pending", "firing"]:
    """The state of the alert with these labels; where several have them, the worst."""
    chosen = "".join(f', {label}="{value}"' for label, value in labels.items())
    states = {found["metric"]["alertstate"] for found in server.query(f'ALERTS{{alertname="{name}"{chosen}}}')}
    return "firing" if "firing" in states else "pending" if "pending" in states else "inactive"


def wait_for_alert(
    server: Prometheus,
    name: str,
    state: Literal["inactive", "pending", "firing"],
    *,
    timeout_s: float = 60.0,
    **labels: object,
) -> None:
    """Until the alert with these labels is in that state. Raises AssertionError after timeout_s."""
    assert name in {rule["alert"] for rule in alerts()}, f"no alert is called {name}"
    deadline_s = time.monotonic() + timeout_s
    while (now := alert_state(server, name, **labels)) != state:
        if time.monotonic() > deadline_s:
            raise AssertionError(f"{name} {labels} is {now} and not {state} after {timeout_s:g} s")
        time.sleep(0.2)
