"""What a check found, and short ways to those parts of a render that checks look at.

Renders are read as they are, faults included: what is absent or of another type counts as empty here, and schemas.py
is the check that says so.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import yaml
from matching import ray_selects


class Problem(NamedTuple):
    """One thing that is wrong with a render."""

    rule: str  # short, as "group-min-above-max"; a planted fault is caught by this name
    where: str  # as "RayService/expertmesh, group experts"
    what: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.where}: {self.what}"


Check = Callable[[list[dict]], list[Problem]]


def part(node: object, *path: str) -> dict:
    """The mapping at the path; empty where there is none."""
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def listing(node: object, *path: str) -> list[dict]:
    """The mappings in the list at the path; none where there is no list."""
    found = part(node, *path[:-1]).get(path[-1])
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def of_kind(documents: list[dict], *kinds: str) -> list[dict]:
    return [document for document in documents if document.get("kind") in kinds]


def name_of(document: dict) -> str:
    return part(document, "metadata").get("name", "")


def title(document: dict) -> str:
    return f"{document.get('kind')}/{name_of(document)}"


def ray_service(documents: list[dict]) -> dict:
    """The RayService; objects.py says if there is not exactly one."""
    return next(iter(of_kind(documents, "RayService")), {})


def ray_cluster(documents: list[dict]) -> dict:
    return part(ray_service(documents), "spec", "rayClusterConfig")


def head_group(documents: list[dict]) -> dict:
    return part(ray_cluster(documents), "headGroupSpec")


def worker_groups(documents: list[dict]) -> list[dict]:
    return listing(ray_cluster(documents), "workerGroupSpecs")


def named_groups(documents: list[dict]) -> dict[str, dict]:
    """Every group of pods by name, "head" among them."""
    workers = {str(group.get("groupName")): group for group in worker_groups(documents)}
    return {"head": head_group(documents), **workers}


def serve_config(documents: list[dict]) -> dict:
    """What Serve is to run; empty if it is no YAML mapping."""
    return _parsed(str(part(ray_service(documents), "spec").get("serveConfigV2", "")))


def deployments(documents: list[dict]) -> list[dict]:
    """The entries of all Serve deployments."""
    return [entry for app in listing(serve_config(documents), "applications") for entry in listing(app, "deployments")]


def application_args(documents: list[dict]) -> dict:
    """What deploy.app:build gets: `config` and the rest."""
    return part(next(iter(listing(serve_config(documents), "applications")), {}), "args")


def deployments_on(group: dict, documents: list[dict]) -> list[dict]:
    """The entries of those deployments whose replicas may land on a worker group's pods."""
    labels = part(group, "labels")
    return [
        entry
        for entry in deployments(documents)
        if ray_selects(part(entry, "ray_actor_options", "label_selector"), labels)
    ]


def policy_rules(documents: list[dict]) -> list[tuple[str, dict]]:
    """Every rule of every NetworkPolicy, with the policy's title."""
    return [
        (title(policy), rule)
        for policy in of_kind(documents, "NetworkPolicy")
        for rule in (*listing(policy, "spec", "ingress"), *listing(policy, "spec", "egress"))
    ]


def most_replicas(deployment: dict) -> int:
    """How many replicas a deployment may have at most, those of an upgrade not counted."""
    scaling = part(deployment, "autoscaling_config")
    return int(scaling.get("max_replicas", 1) if scaling else deployment.get("num_replicas") or 1)


def least_replicas(deployment: dict) -> int:
    scaling = part(deployment, "autoscaling_config")
    return int(scaling.get("min_replicas", 1) if scaling else deployment.get("num_replicas") or 1)


@lru_cache(maxsize=16)
def _parsed(text: str) -> dict:
    try:
        found = yaml.load(text, Loader=yaml.CSafeLoader)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
