"""The evaluators beneath the checks, each on a case of its own: policies, selectors, quantities, schemas, packing."""

import pytest
from capacity import Wish, packs
from expansion import ray_pods
from matching import ray_selects, selects
from netpol import Flow, Peer, passes
from quantity import quantity
from rendered import OVERLAYS, documents
from schemas import strict

HERE = Peer(name="here", ip="10.0.0.1", namespace="ours", labels={"app": "a"}, ports={"web": 8000})
BESIDE = Peer(name="beside", ip="10.0.0.2", namespace="ours", labels={"app": "b"})
FAR = Peer(name="far", ip="10.0.1.1", namespace="theirs", labels={"app": "b"}, namespace_marks={"team": "t"})
OUTSIDE = Peer(name="outside", ip="198.51.100.7", namespace=None)


def policy(**spec: object) -> list[dict]:
    return [{"kind": "NetworkPolicy", "metadata": {"namespace": "ours"}, "spec": {"podSelector": {}, **spec}}]


def reaches(source: Peer, documents: list[dict], port: int = 8000, protocol: str = "TCP") -> bool:
    return passes(Flow(source=source, destination=HERE, port=port, protocol=protocol), documents)


def test_a_pod_that_no_policy_selects_is_open():
    assert reaches(OUTSIDE, [])
    assert reaches(OUTSIDE, policy(podSelector={"matchLabels": {"app": "b"}}))


def test_a_policy_without_types_is_of_ingress_and_with_egress_rules_of_both():
    assert not reaches(FAR, policy())
    out = Flow(source=HERE, destination=OUTSIDE, port=443)
    assert passes(out, policy())
    assert not passes(out, policy(egress=[{"ports": [{"port": 53}]}]))


def test_a_pod_selector_alone_means_the_policys_own_namespace():
    rules = policy(ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "b"}}}]}])
    assert reaches(BESIDE, rules)
    assert not reaches(FAR, rules)


def test_selectors_in_one_peer_are_both_meant_and_in_two_peers_either():
    theirs, named = {"matchLabels": {"team": "t"}}, {"matchLabels": {"app": "c"}}
    assert not reaches(FAR, policy(ingress=[{"from": [{"namespaceSelector": theirs, "podSelector": named}]}]))
    assert reaches(FAR, policy(ingress=[{"from": [{"namespaceSelector": theirs}, {"podSelector": named}]}]))


def test_policies_add_up():
    allow = policy(ingress=[{"from": [{"namespaceSelector": {}}], "ports": [{"port": 8000}]}])
    assert reaches(FAR, [*policy(), *allow])
    assert not reaches(FAR, [*policy(), *allow], port=8001)


def test_an_address_block_has_exceptions():
    block = {"cidr": "198.51.100.0/24", "except": ["198.51.100.0/29"]}
    assert not reaches(OUTSIDE, policy(ingress=[{"from": [{"ipBlock": block}]}]))
    assert reaches(OUTSIDE, policy(ingress=[{"from": [{"ipBlock": {"cidr": "198.51.100.0/24"}}]}]))


@pytest.mark.parametrize(
    ("port", "number", "protocol", "open_"),
    [
        ({"port": "web"}, 8000, "TCP", True),
        ({"port": "web"}, 8001, "TCP", False),
        ({"port": 30000, "endPort": 31000}, 31000, "TCP", True),
        ({"port": 30000, "endPort": 31000}, 31001, "TCP", False),
        ({"port": 8000}, 8000, "UDP", False),
        ({"protocol": "UDP"}, 8000, "UDP", True),
    ],
)
def test_ports_are_numbers_names_ranges_or_a_whole_protocol(port: dict, number: int, protocol: str, open_: bool):
    assert reaches(FAR, policy(ingress=[{"ports": [port]}]), port=number, protocol=protocol) is open_


def test_label_selectors_of_kubernetes():
    expression = {"key": "app", "operator": "NotIn", "values": ["b"]}
    assert selects({"matchExpressions": [expression]}, {})
    assert not selects({"matchExpressions": [expression]}, {"app": "b"})
    assert not selects({"matchExpressions": [{"key": "app", "operator": "Exists"}]}, {})
    assert selects({}, {"any": "thing"})


@pytest.mark.parametrize(
    ("wanted", "value", "selected"),
    [("a", "a", True), ("a", "b", False), ("!a", "b", True), ("in(a, b)", "b", True), ("!in(a,b)", "b", False)],
)
def test_label_selectors_of_ray(wanted: str, value: str, selected: bool):
    assert ray_selects({"role": wanted}, {"role": value}) is selected


@pytest.mark.parametrize(("written", "number"), [("500m", 0.5), (2, 2), ("1.5", 1.5), ("4Gi", 4 << 30), ("1G", 10**9)])
def test_quantities(written: object, number: float):
    assert quantity(written) == number


@pytest.mark.parametrize("written", ["4GB", "many", "", None, "-1"])
def test_what_is_no_quantity_is_refused(written: object):
    with pytest.raises(ValueError, match="no quantity"):
        quantity(written)


def test_a_strict_schema_refuses_what_the_crd_does_not_name_but_keeps_open_fields_open():
    fields = {
        "size": {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]},
        "free": {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True},
        "count": {"type": "integer", "default": 1},
        "none": {"type": "string", "nullable": True},
    }
    made = strict({"type": "object", "properties": fields, "required": ["size", "count"]})
    assert made["additionalProperties"] is False
    assert made["properties"]["free"]["additionalProperties"] is True
    assert made["required"] == ["size"]
    assert made["properties"]["none"]["type"] == ["string", "null"]


def test_packing_heeds_size_and_how_many_may_be_in_a_pod():
    pair = [Wish(name="router", replicas=2, size=(1, 0, 0), per_pod=1)]
    assert packs(pair, (2, 0, 0), 2)
    assert not packs(pair, (2, 0, 0), 1)
    both = [*pair, Wish(name="attention", replicas=2, size=(2, 1, 0), per_pod=1)]
    assert packs(both, (3, 1, 0), 2)
    assert not packs(both, (2, 1, 0), 2)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_have_what_the_operator_adds(overlay: str):
    found = {pod.name: pod for pod in ray_pods(documents(overlay))}
    assert list(found) == ["head", "gateway", "attention", "experts"]
    assert [container["name"] for container in found["head"].containers] == ["ray-head", "autoscaler"]
    for name in ("gateway", "attention", "experts"):
        assert [container["name"] for container in found[name].containers] == ["wait-gcs-ready", "ray-worker"]
        assert found[name].labels["ray.io/node-type"] == "worker"
    assert all(pod.spec["restartPolicy"] == "Never" for pod in found.values())
