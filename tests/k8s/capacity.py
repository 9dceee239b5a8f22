"""Whether what Serve may want fits into the pods that Ray may have."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from manifests import (
    Problem,
    deployments_on,
    head_group,
    least_replicas,
    listing,
    most_replicas,
    part,
    worker_groups,
)
from quantity import quantity_or_zero

Size = tuple[float, float, float]  # CPUs, GPUs, bytes of memory that replicas book
NO_SURGE = ("controller",)  # deploy/app.py: never two of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """So many replicas of a deployment."""

    name: str
    replicas: int
    size: Size
    per_pod: int | None  # at most


def check(documents: list[dict]) -> list[Problem]:
    found = [problem for group in worker_groups(documents) for problem in _group(group, documents)]
    if part(head_group(documents), "rayStartParams").get("num-cpus") != "0":
        found.append(Problem("busy-head", "group head", "num-cpus is not 0, so replicas may land on the head"))
    return found


def _group(group: dict, documents: list[dict]) -> Iterator[Problem]:
    name, pod = str(group.get("groupName")), _pod_size(group)
    placed = deployments_on(group, documents)
    for deployment in placed:
        if not _fits(_size(deployment), pod):
            what = f"a replica wants {_size(deployment)} of CPUs, GPUs and memory, a pod has {pod}"
            yield Problem("replica-too-big", f"deployment {deployment.get('name')}", what)
    yield from _shared(name, placed, pod)
    at_start = [_wish(deployment, least_replicas(deployment)) for deployment in placed]
    if not packs(at_start, pod, group.get("minReplicas", 0)):
        yield Problem("group-starts-too-small", f"group {name}", f"minReplicas {group.get('minReplicas')}")
    at_most = [_wish(deployment, most_replicas(deployment)) for deployment in placed]
    if not packs(at_most, pod, group.get("maxReplicas", 0)):
        yield Problem("group-too-small", f"group {name}", f"maxReplicas {group.get('maxReplicas')}")
        return
    for deployment in placed:
        surge = _surge(deployment)
        more = [*at_most, _wish(deployment, surge)] if surge else at_most
        if not packs(_joined(more), pod, group.get("maxReplicas", 0)):
            what = f"no room for {surge} replacements of {deployment.get('name')} beside what runs"
            yield Problem("no-room-to-replace", f"group {name}", what)


def _shared(group_name: str, placed: Sequence[dict], pod: Size) -> Iterator[Problem]:
    """Two replicas of expert groups in one pod would share its CPUs, and end with it."""
    experts = [deployment for deployment in placed if str(deployment.get("name")).startswith("experts-")]
    for first, second in combinations(experts, 2):
        if packs([_wish(first, 1), _wish(second, 1)], pod, 1):
            what = f"{first['name']} and {second['name']} fit into one pod together"
            yield Problem("pod-shared", f"group {group_name}", what)


def packs(wishes: Sequence[Wish], pod: Size, num_pods: int) -> bool:
    """Whether all replicas fit into the pods, the largest placed first (which may miss a packing, never invent one)."""
    left = [pod] * num_pods
    held: list[dict[str, int]] = [{} for _ in left]
    for wish in sorted(wishes, key=lambda wish: wish.size, reverse=True):
        for _ in range(wish.replicas):
            for number, free in enumerate(left):
                room = wish.per_pod is None or held[number].get(wish.name, 0) < wish.per_pod
                if room and _fits(wish.size, free):
                    left[number] = (free[0] - wish.size[0], free[1] - wish.size[1], free[2] - wish.size[2])
                    held[number][wish.name] = held[number].get(wish.name, 0) + 1
                    break
            else:
                return False
    return True


def _joined(wishes: Sequence[Wish]) -> list[Wish]:
    """One wish for each deployment."""
    names = dict.fromkeys(wish.name for wish in wishes)
    same = {name: [wish for wish in wishes if wish.name == name] for name in names}
    return [
        Wish(name=name, replicas=sum(wish.replicas for wish in of), size=of[0].size, per_pod=of[0].per_pod)
        for name, of in same.items()
    ]


def _wish(deployment: dict, replicas: int) -> Wish:
    per_pod = deployment.get("max_replicas_per_node")
    return Wish(name=str(deployment.get("name")), replicas=replicas, size=_size(deployment), per_pod=per_pod)


def _size(deployment: dict) -> Size:
    options = part(deployment, "ray_actor_options")
    return float(options.get("num_cpus", 1)), float(options.get("num_gpus", 0)), float(options.get("memory") or 0)


def _pod_size(group: dict) -> Size:
    """What Ray believes that a pod has: the limits, CPUs rounded up, where rayStartParams say nothing else."""
    container = next(iter(listing(group, "template", "spec", "containers")), {})
    limits, params = part(container, "resources", "limits"), part(group, "rayStartParams")
    gpus = next((quantity_or_zero(limits[key]) for key in limits if key.endswith("gpu")), 0.0)
    return (
        float(params.get("num-cpus", math.ceil(quantity_or_zero(limits.get("cpu", 0))))),
        float(params.get("num-gpus", gpus)),
        float(params.get("memory", quantity_or_zero(limits.get("memory", 0)))),
    )


def _fits(size: Size, free: Size) -> bool:
    return all(wanted <= room + 1e-9 for wanted, room in zip(size, free))


def _surge(deployment: dict) -> int:
    """How many replicas more there are while a deployment is replaced (deploy/app.py says 100 %, with GPUs none)."""
    has_gpu = _size(deployment)[1] > 0
    percent = 0 if deployment.get("name") in NO_SURGE or has_gpu else 100
    return math.ceil(most_replicas(deployment) * deployment.get("max_surge_percent", percent) / 100)
