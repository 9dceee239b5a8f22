"""What Serve would do with serveConfigV2: its own schema first, then what that one lets pass."""

import ast
import importlib
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import yaml
from manifests import (
    Problem,
    deployments,
    least_replicas,
    listing,
    most_replicas,
    part,
    ray_service,
    serve_config,
    worker_groups,
)
from matching import ray_selects
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

# A policy runs in Serve's controller, on the head, beside everything else of Serve's.
NOT_IN_A_POLICY = ("torch", "vllm", "ray", "grpc", "numpy", "numba")


def check(documents: list[dict]) -> list[Problem]:
    text = part(ray_service(documents), "spec").get("serveConfigV2")
    try:
        ServeDeploySchema.model_validate(yaml.load(str(text), Loader=yaml.CSafeLoader))
    except (yaml.YAMLError, ValidationError, ImportError, AttributeError) as error:  # it imports policies
        return [Problem("serve-schema", "serveConfigV2", str(error)[:500])]
    config = serve_config(documents)
    found = [Problem("serve-unknown-key", "serveConfigV2", key) for key in unknown_keys(config, ServeDeploySchema)]
    found += [Problem(rule, "serveConfigV2", what) for rule, what in _applications(config)]
    for deployment in deployments(documents):
        where = f"deployment {deployment.get('name')}"
        for rule, what in (*_bounds(deployment), *_policy(deployment), *_placed(deployment, documents)):
            found.append(Problem(rule, where, what))
    return found


def unknown_keys(value: object, model: type[BaseModel], path: str = "") -> Iterator[str]:
    """Keys that pydantic would silently ignore, by their path."""
    if not isinstance(value, dict):
        return
    for key, inner in value.items():
        field = model.model_fields.get(key)
        if field is None:
            yield f"{path}{key}"
            continue
        nested = _model_in(field.annotation)
        for entry in inner if isinstance(inner, list) else [inner]:
            if nested is not None:
                yield from unknown_keys(entry, nested, f"{path}{key}.")


def _model_in(annotation: object) -> type[BaseModel] | None:
    """The model among the types that a field may have."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner))), None)


def _applications(config: dict) -> Iterator[tuple[str, str]]:
    applications = listing(config, "applications")
    if len(applications) != 1:
        yield "serve-applications", f"{len(applications)} applications, and one is meant"
    if config.get("proxy_location") != "Disabled":
        yield "serve-proxies", "proxy_location is not Disabled: gateways have servers of their own"
    for application in applications:
        if not _imports(str(application.get("import_path"))):
            yield "serve-import", f"import_path {application.get('import_path')} does not import"
        if application.get("route_prefix", "/") is not None:
            yield "serve-proxies", "route_prefix is not null"


def _bounds(deployment: dict) -> Iterator[tuple[str, str]]:
    least, most = least_replicas(deployment), most_replicas(deployment)
    if least > most:
        yield "serve-min-above-max", f"min_replicas {least}, max_replicas {most}"
    if least < 1:
        yield "serve-min-below-one", f"min_replicas {least}: the data plane wakes nobody"
    if "graceful_shutdown_timeout_s" not in deployment:
        yield "serve-no-grace", "graceful_shutdown_timeout_s is not written out, and drain.py counts with it"


def _policy(deployment: dict) -> Iterator[tuple[str, str]]:
    policy = part(deployment, "autoscaling_config", "policy")
    if not policy:
        return
    path = str(policy.get("policy_function"))
    foreign = sorted(_imported_by(path.partition(":")[0]) & set(NOT_IN_A_POLICY))
    if foreign:
        yield "serve-policy", f"policy {path} needs {foreign} in Serve's controller"
    module, _, name = path.partition(":")
    try:
        getattr(importlib.import_module(module), name)(**part(policy, "policy_kwargs"))
    except (TypeError, ValueError) as error:
        yield "serve-policy", f"policy {path} refuses its settings: {error}"


def _placed(deployment: dict, documents: list[dict]) -> Iterator[tuple[str, str]]:
    selector = part(deployment, "ray_actor_options", "label_selector")
    if not selector:
        yield "serve-no-selector", "no label_selector, so it may land anywhere"
    elif not any(ray_selects(selector, part(group, "labels")) for group in worker_groups(documents)):
        yield "serve-selector-nowhere", f"no worker group has the labels {selector}"


@cache
def _imports(path: str) -> bool:
    """Whether `module:attribute` (or with a dot) can be had."""
    module, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except (ImportError, ValueError):
        return False


@cache
def _imported_by(module: str) -> frozenset[str]:
    """The top-level packages that a module imports, itself or through modules of ours; types alone do not count."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return frozenset()
    found: set[str] = set()
    for node in ast.parse(Path(spec.origin).read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in names:
            top = name.partition(".")[0]
            found |= _imported_by(name) if top in ("cluster", "router", "experts", "deploy") else {top}
    return frozenset(found - sys.stdlib_module_names)
