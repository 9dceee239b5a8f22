"""Numbers that a schema lets pass: bounds, resources, ports, budgets, address blocks."""

import ipaddress
import re
from collections.abc import Iterator

from expansion import Pod, pods
from manifests import Problem, listing, named_groups, of_kind, part, policy_rules, title
from matching import selects
from quantity import quantity, quantity_or_zero

PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]([a-z0-9]|-(?!-)){0,13}[a-z0-9]")
EXTENDED_RESOURCES = re.compile(r".+/.+")  # GPUs and the like: requests must equal limits


def check(documents: list[dict]) -> list[Problem]:
    found = [
        problem
        for pod in pods(documents)
        for problem in (*_resources(pod), *_memory(pod), *_object_store(pod), *_ports(pod))
    ]
    return [*found, *_groups(documents), *_services(documents), *_budgets(documents), *_policies(documents)]


def _groups(documents: list[dict]) -> Iterator[Problem]:
    for name, group in named_groups(documents).items():
        if name == "head":
            continue
        least, most, now = (group.get(key, 0) for key in ("minReplicas", "maxReplicas", "replicas"))
        if least > most:
            yield Problem("group-min-above-max", f"group {name}", f"minReplicas {least}, maxReplicas {most}")
        elif not least <= now <= most:
            yield Problem("group-replicas", f"group {name}", f"replicas {now} are not within {least} to {most}")
        if least < 1:
            yield Problem("group-without-pods", f"group {name}", f"minReplicas {least}: nothing wakes it")


def _resources(pod: Pod) -> Iterator[Problem]:
    for container in pod.containers:
        where = f"pod {pod.name}, container {container.get('name')}"
        requests, limits = part(container, "resources", "requests"), part(container, "resources", "limits")
        for name, written in (*requests.items(), *limits.items()):
            try:
                quantity(written)
            except ValueError as error:
                yield Problem("no-quantity", where, f"{name}: {error}")
        for name in sorted(set(requests) | set(limits)):
            wanted, limit = quantity_or_zero(requests.get(name)), quantity_or_zero(limits.get(name))
            if name in limits and wanted > limit:
                yield Problem("request-above-limit", where, f"{name}: {requests[name]} above {limits[name]}")
            # Kubernetes fills in a missing request.
            if EXTENDED_RESOURCES.fullmatch(name) and requests.get(name, limits.get(name)) != limits.get(name):
                yield Problem("gpu-request", where, f"{name}: {requests.get(name)} is not {limits.get(name)}")


def _memory(pod: Pod) -> Iterator[Problem]:
    """Files in memory count as the container's memory, so they fit below its limit and are bounded themselves."""
    total = 0.0
    for volume in listing(pod.spec, "volumes"):
        if part(volume, "emptyDir").get("medium") != "Memory":
            continue
        size = part(volume, "emptyDir").get("sizeLimit")
        if size is None:
            yield Problem("memory-volume", f"pod {pod.name}", f"volume {volume.get('name')} has no sizeLimit")
        total += quantity_or_zero(size)
    limit = quantity_or_zero(part(pod.main, "resources", "limits").get("memory"))
    if total >= limit:
        yield Problem("memory-volume", f"pod {pod.name}", f"{total:.0f} bytes in memory, the limit is {limit:.0f}")


def _object_store(pod: Pod) -> Iterator[Problem]:
    """Ray's object store lies in /dev/shm; unless told, it takes a third of the memory that Ray believes to have."""
    if not pod.group:
        return
    mounts = {mount.get("mountPath"): mount.get("name") for mount in listing(pod.main, "volumeMounts")}
    volumes = {volume.get("name"): part(volume, "emptyDir") for volume in listing(pod.spec, "volumes")}
    room = quantity_or_zero(volumes.get(mounts.get("/dev/shm"), {}).get("sizeLimit"))
    wanted = part(pod.group, "rayStartParams").get("object-store-memory")
    if wanted is None or quantity_or_zero(wanted) > room:
        yield Problem("object-store", f"pod {pod.name}", f"object-store-memory is {wanted}, /dev/shm has {room:.0f}")


def _ports(pod: Pod) -> Iterator[Problem]:
    for container in pod.containers:
        for port in listing(container, "ports"):
            yield from _port(port.get("containerPort"), f"pod {pod.name}")
            if "name" in port and not PORT_NAME.fullmatch(str(port["name"])):
                yield Problem("port-name", f"pod {pod.name}", f"{port['name']!r} is no name of 15 characters at most")
        for kind in ("livenessProbe", "readinessProbe", "startupProbe"):
            for handler in ("httpGet", "tcpSocket", "grpc"):
                wanted = part(container, kind, handler).get("port")
                if isinstance(wanted, int):
                    yield from _port(wanted, f"pod {pod.name}, {kind}")


def _port(number: object, where: str) -> Iterator[Problem]:
    if not isinstance(number, int) or not 1 <= number <= 65535:
        yield Problem("port-range", where, f"{number} is no port from 1 to 65535")


def _services(documents: list[dict]) -> Iterator[Problem]:
    for service in of_kind(documents, "Service"):
        for port in listing(service, "spec", "ports"):
            yield from _port(port.get("port"), title(service))
            if isinstance(port.get("targetPort"), int):
                yield from _port(port["targetPort"], title(service))


def _budgets(documents: list[dict]) -> Iterator[Problem]:
    """A RayCluster has no scale subresource, so only an integer minAvailable can be computed."""
    groups = named_groups(documents)
    for budget in of_kind(documents, "PodDisruptionBudget"):
        spec = part(budget, "spec")
        least = spec.get("minAvailable")
        if "maxUnavailable" in spec:
            yield Problem("budget-form", title(budget), "maxUnavailable never allows an eviction of a Ray pod")
        if type(least) is not int:
            yield Problem("budget-form", title(budget), f"minAvailable {least!r} is no integer")
            continue
        if spec.get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield Problem("budget-unhealthy", title(budget), "a pod that is not ready would block its node's drain")
        for pod in pods(documents):
            if not pod.group or not selects(spec.get("selector"), pod.labels):
                continue
            if pod.name == "head":
                yield Problem("budget-on-head", title(budget), "the only head would block every drain of its node")
            elif least >= groups[pod.name].get("minReplicas", 0):
                has = groups[pod.name].get("minReplicas", 0)
                yield Problem("budget-blocks", title(budget), f"minAvailable {least} of at least {has} pods")


def _policies(documents: list[dict]) -> Iterator[Problem]:
    for name, rule in policy_rules(documents):
        for peer in (*listing(rule, "from"), *listing(rule, "to")):
            if "ipBlock" in peer:
                yield from _block(part(peer, "ipBlock"), name)
        for port in listing(rule, "ports"):
            yield from _policy_port(port, name)


def _block(block: dict, where: str) -> Iterator[Problem]:
    try:
        network = ipaddress.ip_network(str(block.get("cidr")))
        outside = [cidr for cidr in block.get("except", []) if not _is_inside(ipaddress.ip_network(cidr), network)]
    except ValueError as error:
        yield Problem("bad-block", where, str(error))
        return
    for cidr in outside:
        yield Problem("bad-block", where, f"except {cidr} is not within {network}")


def _is_inside(inner: ipaddress.IPv4Network | ipaddress.IPv6Network, outer: object) -> bool:
    if isinstance(inner, ipaddress.IPv4Network):
        return isinstance(outer, ipaddress.IPv4Network) and inner.subnet_of(outer)
    return isinstance(outer, ipaddress.IPv6Network) and inner.subnet_of(outer)


def _policy_port(port: dict, where: str) -> Iterator[Problem]:
    first, last = port.get("port"), port.get("endPort")
    if isinstance(first, int):
        yield from _port(first, where)
    if last is not None and (not isinstance(first, int) or last < first):
        yield Problem("port-range", where, f"endPort {last} does not follow port {first}")
