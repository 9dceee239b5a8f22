"""Planted faults: each a sentence, the check that must catch it, and the rule by which it does.

A fault is a function that spoils a copy of a render in place. The lists are in faults_*.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import yaml
from manifests import head_group, named_groups, of_kind, part, ray_cluster, ray_service

Plant = Callable[[list[dict]], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that somebody might do wrong."""

    name: str
    check: str
    rule: str
    overlay: str
    plant: Plant


FAULTS: list[Fault] = []


def fault(check: str, rule: str, overlay: str = "dev-cpu") -> Callable[[Plant], Plant]:
    """Registers a function as a fault that this check catches by this rule, in this overlay."""

    def register(plant: Plant) -> Plant:
        name = getattr(plant, "__name__", "fault")
        FAULTS.append(Fault(name=name, check=check, rule=rule, overlay=overlay, plant=plant))
        return plant

    return register


def spec(documents: list[dict]) -> dict:
    """The RayService's spec."""
    return ray_service(documents)["spec"]


def cluster(documents: list[dict]) -> dict:
    return ray_cluster(documents)


def group(documents: list[dict], name: str) -> dict:
    """A worker group by name, or "head"."""
    return named_groups(documents)[name]


def pod(documents: list[dict], name: str) -> dict:
    """The spec of a group's pods."""
    return part(head_group(documents) if name == "head" else group(documents, name), "template", "spec")


def container(documents: list[dict], name: str) -> dict:
    """The container of a group's pods that Ray runs in."""
    return pod(documents, name)["containers"][0]


def volume(documents: list[dict], group_name: str, name: str) -> dict:
    return one(pod(documents, group_name)["volumes"], name)


def one(entries: Iterable[dict], name: str) -> dict:
    """The entry of a list by its name."""
    return next(entry for entry in entries if entry["name"] == name)


def object_of(documents: list[dict], kind: str, name: str) -> dict:
    return next(document for document in of_kind(documents, kind) if document["metadata"]["name"] == name)


def drop(documents: list[dict], kind: str, name: str) -> None:
    documents.remove(object_of(documents, kind, name))


def edit_serve(documents: list[dict], edit: Callable[[dict], object]) -> None:
    """Changes the Serve config, which is a text in the RayService."""
    config = yaml.safe_load(spec(documents)["serveConfigV2"])
    edit(config)
    spec(documents)["serveConfigV2"] = yaml.safe_dump(config, sort_keys=False)


def edit_deployment(documents: list[dict], name: str, edit: Callable[[dict], object]) -> None:
    edit_serve(documents, lambda config: edit(one(config["applications"][0]["deployments"], name)))


def edit_config(documents: list[dict], section: str, **values: object) -> None:
    """Changes our own config among the application's arguments."""
    edit_serve(documents, lambda config: config["applications"][0]["args"]["config"][section].update(values))
