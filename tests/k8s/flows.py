"""Which flows the application needs; every other one between the peers below must be closed."""

import ipaddress
from collections.abc import Iterator

from expansion import ray_pods
from manifests import Problem, listing, name_of, of_kind, part, policy_rules, ray_cluster, ray_service
from netpol import Direction, Flow, Peer, lets, passes

GATEWAY_PORTS = (8000, 9000)
DASHBOARD = 8265
METRICS_PORTS = (8080, 9464)  # Ray's, ours
HEAD_METRICS_PORTS = (44217, 44227)  # the autoscaler's, the dashboard's
DNS = 53
REDIS = 6379
# Ray's, those of Serve's HAProxy mode, one for the data plane (its ports are random), and what strangers like to try.
TRIED = (
    *GATEWAY_PORTS,
    *METRICS_PORTS,
    *HEAD_METRICS_PORTS,
    *(22, 53, 80, 443, 6379, 6443, 8265, 8404, 9101, 10001, 10250, 23456, 30000, 31000, 40000, 41000, 52365),
)
PROMETHEUS = Peer(
    name="Prometheus", ip="10.8.0.3", namespace="monitoring", labels={"app.kubernetes.io/name": "prometheus"}
)
OPERATOR = Peer(
    name="operator",
    ip="10.8.0.4",
    namespace="kuberay-system",
    labels={"app.kubernetes.io/name": "kuberay-operator"},
)
RESOLVER = Peer(name="DNS", ip="10.8.0.5", namespace="kube-system", labels={"k8s-app": "kube-dns"})
CLIENT = Peer(name="client", ip="10.8.0.6", namespace="shop", namespace_marks={"expertmesh/client": "true"})
OUTSIDERS = (
    Peer(name="stranger in another namespace", ip="10.8.0.7", namespace="default"),
    Peer(name="stranger beside Prometheus", ip="10.8.0.9", namespace="monitoring"),
    Peer(name="stranger beside the operator", ip="10.8.0.10", namespace="kuberay-system"),
    Peer(name="stranger beside DNS", ip="10.8.0.11", namespace="kube-system"),
    Peer(name="stranger beside Redis", ip="10.8.0.13", namespace="redis"),
    Peer(name="machine of the network", ip="192.168.7.7", namespace=None),
    Peer(name="internet", ip="198.51.100.7", namespace=None),
)

Key = tuple[str, str, int, str]  # source, destination, port, protocol


def check(documents: list[dict]) -> list[Problem]:
    return [*_bad_policies(documents), *_wrong_flows(documents)]


def needed(documents: list[dict]) -> set[Key]:
    """The flows that must pass."""
    ours = [peer.name for peer in _our_pods(documents)]
    found = {(a, b, port, "TCP") for a in ours for b in ours for port in TRIED}
    found |= {(CLIENT.name, "gateway", port, "TCP") for port in GATEWAY_PORTS}
    found |= {(OPERATOR.name, "head", DASHBOARD, "TCP")}
    found |= {(PROMETHEUS.name, pod, port, "TCP") for pod in ours for port in METRICS_PORTS}
    found |= {(PROMETHEUS.name, "head", port, "TCP") for port in HEAD_METRICS_PORTS}
    found |= {(pod, RESOLVER.name, DNS, protocol) for pod in ours for protocol in ("TCP", "UDP")}
    if ray_cluster(documents).get("enableInTreeAutoscaling"):
        found |= {("head", peer.name, port, "TCP") for peer, port in _api_servers(documents)}
    found |= {("head", peer.name, REDIS, "TCP") for peer in _redis(documents)}
    return found


def _wrong_flows(documents: list[dict]) -> Iterator[Problem]:
    must, ours = needed(documents), {pod.name for pod in ray_pods(documents)}
    for flow in _tried(documents):
        wanted = (flow.source.name, flow.destination.name, flow.port, flow.protocol) in must
        if wanted and not passes(flow, documents):
            yield Problem("flow-closed", str(flow), "the application needs it, and no policy lets it pass")
        if not wanted and _slips(flow, documents, ours):
            yield Problem("flow-open", str(flow), "nothing needs it, and policies let it pass")


def _slips(flow: Flow, documents: list[dict], ours: set[str]) -> bool:
    """Whether a flow passes, or our own side of it alone would let it: what others refuse must not matter."""
    sides: dict[Direction, str] = {"Ingress": flow.destination.name, "Egress": flow.source.name}
    return passes(flow, documents) or any(lets(flow, documents, side) for side, name in sides.items() if name in ours)


def _tried(documents: list[dict]) -> Iterator[Flow]:
    """All that a pod of ours, or somebody in our namespace, takes part in."""
    namespace = part(ray_service(documents), "metadata").get("namespace")
    stranger = Peer(name="stranger in our namespace", ip="10.8.0.8", namespace=namespace)
    ours = [*_our_pods(documents), stranger]
    api_servers = [peer for peer, _ in _api_servers(documents)]
    others = [PROMETHEUS, OPERATOR, RESOLVER, CLIENT, *api_servers, *_redis(documents), *OUTSIDERS]
    pairs = [(a, b) for a in ours for b in ours]
    pairs += [pair for a in ours for b in others for pair in ((a, b), (b, a))]
    for source, destination in pairs:
        for port in TRIED:
            yield Flow(source=source, destination=destination, port=port)
        yield Flow(source=source, destination=destination, port=DNS, protocol="UDP")
        yield Flow(source=source, destination=destination, port=443, protocol="UDP")


def _our_pods(documents: list[dict]) -> list[Peer]:
    namespace = part(ray_service(documents), "metadata").get("namespace")
    return [
        Peer(name=pod.name, ip=f"10.8.1.{number}", namespace=namespace, labels=pod.labels, ports=pod.ports)
        for number, pod in enumerate(ray_pods(documents))
    ]


def _api_servers(documents: list[dict]) -> list[tuple[Peer, int]]:
    """Where policy `api-server` says that the API server is. No label selects it, so nothing else can be asked."""
    policies = [policy for policy in of_kind(documents, "NetworkPolicy") if name_of(policy) == "api-server"]
    rules = [rule for policy in policies for rule in listing(policy, "spec", "egress")]
    found = [
        (str(part(to, "ipBlock").get("cidr")), port.get("port"))
        for rule in rules
        for to in listing(rule, "to")
        for port in listing(rule, "ports")
    ]
    if not found:
        return [(Peer(name="API server", ip="192.0.2.1", namespace=None), 6443)]
    return [
        (Peer(name=f"API server {cidr}", ip=cidr.partition("/")[0], namespace=None), port)
        for cidr, port in found
        if isinstance(port, int)
    ]


def _redis(documents: list[dict]) -> list[Peer]:
    """The Redis of component gcs-fault-tolerance."""
    if not part(ray_cluster(documents), "gcsFaultToleranceOptions"):
        return []
    return [Peer(name="Redis", ip="10.8.0.12", namespace="redis", labels={"app.kubernetes.io/name": "redis"})]


def _bad_policies(documents: list[dict]) -> Iterator[Problem]:
    """An address block that is a whole network is hardly one server."""
    for name, rule in policy_rules(documents):
        for peer in (*listing(rule, "from"), *listing(rule, "to")):
            cidr = part(peer, "ipBlock").get("cidr")
            if cidr and ipaddress.ip_network(str(cidr), strict=False).num_addresses > 256:
                yield Problem("wide-block", name, f"{cidr} is more than a few servers")
