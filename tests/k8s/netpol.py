"""Who may reach whom, by NetworkPolicy objects.

A flow passes if the policies of its source let it out and those of its destination let it in. Policies add up, and a
pod that no policy of a direction selects is open in that direction.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from manifests import listing, of_kind, part
from matching import selects

Direction = Literal["Ingress", "Egress"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A pod, or with namespace None an address outside of the cluster."""

    name: str
    ip: str
    namespace: str | None
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)  # by name
    namespace_marks: Mapping[str, str] = field(default_factory=dict)  # labels of its namespace that someone put there

    @property
    def namespace_labels(self) -> Mapping[str, str]:
        """Kubernetes itself gives every namespace the label with its name."""
        return {"kubernetes.io/metadata.name": str(self.namespace), **self.namespace_marks}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """A connection from one peer to another."""

    source: Peer
    destination: Peer
    port: int
    protocol: str = "TCP"

    def __str__(self) -> str:
        return f"{self.source.name} -> {self.destination.name}:{self.port}/{self.protocol}"


def passes(flow: Flow, documents: list[dict]) -> bool:
    return lets(flow, documents, "Egress") and lets(flow, documents, "Ingress")


def lets(flow: Flow, documents: list[dict], direction: Direction) -> bool:
    """Whether one side alone lets the flow pass: the policies of its source (Egress) or of its destination."""
    return _open(flow, direction, of_kind(documents, "NetworkPolicy"))


def _open(flow: Flow, direction: Direction, policies: list[dict]) -> bool:
    subject = flow.source if direction == "Egress" else flow.destination
    applying = [policy for policy in policies if _applies(policy, subject, direction)]
    return not applying or any(
        _allows(rule, policy, flow, direction)
        for policy in applying
        for rule in listing(policy, "spec", direction.lower())
    )


def _applies(policy: dict, subject: Peer, direction: Direction) -> bool:
    spec = part(policy, "spec")
    types = spec.get("policyTypes") or (["Ingress", "Egress"] if spec.get("egress") else ["Ingress"])
    return (
        part(policy, "metadata").get("namespace") == subject.namespace
        and direction in types
        and selects(spec.get("podSelector"), subject.labels)
    )


def _allows(rule: dict, policy: dict, flow: Flow, direction: Direction) -> bool:
    """Whether one rule allows the flow. A rule without peers means all peers, one without ports all ports."""
    other = flow.destination if direction == "Egress" else flow.source
    peers = listing(rule, "to" if direction == "Egress" else "from")
    ports = listing(rule, "ports")
    namespace = part(policy, "metadata").get("namespace")
    return (not peers or any(_is_peer(peer, other, namespace) for peer in peers)) and (
        not ports or any(_is_port(port, flow) for port in ports)
    )


def _is_peer(peer: dict, other: Peer, policy_namespace: object) -> bool:
    if "ipBlock" in peer:
        return _in_block(part(peer, "ipBlock"), other.ip)
    if other.namespace is None:
        return False
    if "namespaceSelector" in peer:
        in_namespace = selects(peer["namespaceSelector"], other.namespace_labels)
    else:
        in_namespace = other.namespace == policy_namespace
    return in_namespace and selects(peer.get("podSelector"), other.labels)


def _in_block(block: dict, ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    inside = address in ipaddress.ip_network(str(block.get("cidr")), strict=False)
    return inside and not any(address in ipaddress.ip_network(cidr, strict=False) for cidr in block.get("except", []))


def _is_port(port: dict, flow: Flow) -> bool:
    """A name means what the destination calls so; it may call nothing so."""
    if port.get("protocol", "TCP") != flow.protocol:
        return False
    wanted = port.get("port")
    if wanted is None:
        return True
    if isinstance(wanted, str):
        return flow.destination.ports.get(wanted) == flow.port
    return wanted <= flow.port <= port.get("endPort", wanted)
