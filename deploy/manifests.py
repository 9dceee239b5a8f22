"""What of the Kubernetes manifests follows from a deployment config: the generated files of an overlay, as text.

The Serve config comes from deploy/app.py and the sizes of pods from deploy/sizing.py; this module, which opens nothing,
puts both into the forms that kustomize takes, and refuses configs that the hand-written manifests do not fit.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import yaml

from deploy.change import FIXED
from deploy.config import DeploymentConfig
from deploy.sizing import PodSize
from experts.errors import ConfigError

GROUPS = ("gateway", "attention", "experts")  # worker groups, in the order of k8s/base/rayservice.yaml
RUNTIME_DIR = "/run/expertmesh"
SECRET_FILE = "/etc/expertmesh/link/secret"  # noqa: S105  (a path)
MODELS_DIR = "/models"

ROUTE_S = 15  # until clients have heard that a pod is no endpoint any more
MIN_DRAIN_S = 30
REPLACE_S = 300  # for a replacement to be there; covers ROUTE_S
STOP_S = 16  # `ray stop` kills what has not ended by then
MARGIN_S = 10
SERVE_SHUTDOWN_S = 20  # Serve's own, where a deployment's entry names none

_SPEC = "/spec/rayClusterConfig/workerGroupSpecs"
_GPU = "nvidia.com/gpu"
# What k8s/base says, too: ports, sockets and labels that a config cannot change by itself.
_FIXED: Mapping[str, object] = {
    "gateway.http_host": "0.0.0.0",  # noqa: S104  (a pod's own address; NetworkPolicies say who may come)
    "gateway.grpc_host": "0.0.0.0",  # noqa: S104
    "gateway.http_port": 8000,
    "gateway.grpc_port": 9000,
    "gateway.keys_file": "/etc/expertmesh/keys/keys",
    "metrics.host": "0.0.0.0",  # noqa: S104
    "metrics.port": 9464,
    "experts.listen": "tcp",
    "gateway.max_replicas_per_node": 1,
    "router.max_replicas_per_node": 1,
    "attention.max_replicas_per_node": 1,
    "experts.max_replicas_per_node": 1,
    "placement.controller": {"moe-role": "gateway"},
    "placement.gateway": {"moe-role": "gateway"},
    "placement.router": {"moe-role": "attention"},
    "placement.attention": {"moe-role": "attention"},
    "placement.experts": {"moe-role": "experts"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds that a worker group's pods take to go."""

    drain_s: int

    @classmethod
    def of(cls, group: str, deployments: Iterable[Mapping[str, object]]) -> "Times":
        """deployments: the Serve config's entries; those placed on the group count."""
        placed = [entry for entry in deployments if _role(entry) == group]
        longest = max((_seconds(entry) for entry in placed), default=0.0)
        return cls(drain_s=max(MIN_DRAIN_S, math.ceil(longest)))

    @property
    def leave_s(self) -> int:
        """The preStop hook's deadline."""
        return REPLACE_S + self.drain_s

    @property
    def grace_s(self) -> int:
        """The pod's whole grace period, in which the hook counts."""
        return self.leave_s + STOP_S + MARGIN_S


def check_config(config: DeploymentConfig, components: Iterable[str]) -> None:
    """Raises ConfigError for what the manifests do not fit. components: names of those that the overlay includes."""
    given = config.model_dump()
    for name, wanted in _FIXED.items():
        section, key = name.split(".")
        if given[section][key] != wanted:
            raise ConfigError(f"{name} is {given[section][key]!r}, and the manifests are written for {wanted!r}")
    if config.router.replicas != config.attention.most_replicas:
        raise ConfigError(
            f"router.replicas is {config.router.replicas}, and there are up to {config.attention.most_replicas} "
            "attention pods: each needs a router of its own, so the two must be equal"
        )
    _check_components(config, frozenset(components))


def _check_components(config: DeploymentConfig, components: frozenset[str]) -> None:
    has_tls = config.gateway.tls_cert_file is not None
    if has_tls != ("client-tls" in components):
        raise ConfigError(
            f"gateway.tls_cert_file is {config.gateway.tls_cert_file}, and the overlay "
            f"{'lacks' if has_tls else 'has'} the component client-tls: have both, or none"
        )
    checkpoint = config.model.checkpoint
    if checkpoint != "embedded" and not checkpoint.startswith(f"{MODELS_DIR}/"):
        raise ConfigError(f"model.checkpoint is {checkpoint}, and pods find models below {MODELS_DIR}/")
    if checkpoint != "embedded" and "model-cache" not in components:
        raise ConfigError(f"model.checkpoint is {checkpoint}, and the overlay lacks the component model-cache")


def sizes_patch(
    config: DeploymentConfig,
    sizes: Mapping[str, PodSize],
    deployments: Iterable[Mapping[str, object]],
    *,
    leaves: bool,
) -> list[dict[str, object]]:
    """The JSON patch of a RayService. leaves: whether its pods have the preStop hook of component graceful-shutdown."""
    entries = list(deployments)
    longest_s = max(config.gateway.request_timeout_s, config.gateway.drain_timeout_s)
    annotations = "/spec/rayClusterConfig/headGroupSpec/template/metadata/annotations"
    operations: list[dict[str, object]] = [
        _replace("/spec/rayClusterDeletionDelaySeconds", ROUTE_S + math.ceil(longest_s)),
        {"op": "add", "path": annotations, "value": {"expertmesh/agreed": agreed(config)}},
    ]
    for index, group in enumerate(GROUPS):
        operations += _group_patch(f"{_SPEC}/{index}", group, sizes[group], Times.of(group, entries))
        if leaves:
            command = f"{_SPEC}/{index}/template/spec/containers/0/lifecycle/preStop/exec/command"
            operations += [
                {"op": "test", "path": f"{command}/3", "value": "--deadline-s"},
                _replace(f"{command}/4", str(Times.of(group, entries).leave_s)),
            ]
    return operations


def agreed(config: DeploymentConfig) -> str:
    """A digest of what all replicas of a cluster must agree on (deploy/change.py).

    As an annotation of the head it makes KubeRay start a new cluster beside the old one where any of it changes.
    """
    given = config.model_dump()
    fixed = [(section, key, given[section][key]) for section, keys in FIXED for key in keys]
    return hashlib.sha256(json.dumps(fixed).encode()).hexdigest()[:12]


def budgets(sizes: Mapping[str, PodSize]) -> list[dict[str, object]]:
    """PodDisruptionBudgets: one pod of a group may go at a time, and none waits for another that never was."""
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": group, "namespace": "expertmesh"},
            "spec": {"minAvailable": sizes[group].replicas - 1},
        }
        for group in GROUPS
    ]


def as_yaml(documents: Iterable[object], *, overlay: str) -> str:
    """Sorted, in block style, and with a first line that says where it comes from."""
    made_by = f"# Made from deployment.yaml by: expertmesh render --overlay {overlay} --write\n"
    return made_by + yaml.safe_dump_all(documents, sort_keys=True, default_flow_style=False, width=120)


def _group_patch(path: str, group: str, size: PodSize, times: Times) -> list[dict[str, object]]:
    pod = f"{path}/template/spec"
    resources: dict[str, object] = {"cpu": str(math.ceil(size.cpus)), "memory": _mebibytes(size.memory_bytes)}
    if size.gpus:
        resources[_GPU] = str(size.gpus)
    operations: list[dict[str, object]] = [
        {"op": "test", "path": f"{path}/groupName", "value": group},
        _replace(f"{path}/replicas", size.replicas),
        _replace(f"{path}/minReplicas", size.replicas),
        _replace(f"{path}/maxReplicas", size.max_replicas),
        _replace(f"{pod}/containers/0/resources", {"requests": resources, "limits": dict(resources)}),
        _replace(f"{path}/rayStartParams/object-store-memory", str(size.object_store_bytes)),
        {"op": "test", "path": f"{pod}/volumes/0/name", "value": "dev-shm"},
        _replace(f"{pod}/volumes/0/emptyDir/sizeLimit", _mebibytes(size.shm_bytes)),
        _replace(f"{pod}/terminationGracePeriodSeconds", times.grace_s),
    ]
    if size.gpus:
        tolerated = [{"key": _GPU, "operator": "Exists", "effect": "NoSchedule"}]
        operations.append({"op": "add", "path": f"{pod}/tolerations", "value": tolerated})
    return operations


def _replace(path: str, value: object) -> dict[str, object]:
    return {"op": "replace", "path": path, "value": value}


def _mebibytes(size_bytes: int) -> str:
    return f"{math.ceil(size_bytes / 2**20)}Mi"


def _role(entry: Mapping[str, object]) -> object:
    options = entry.get("ray_actor_options")
    selector = options.get("label_selector") if isinstance(options, Mapping) else None
    return selector.get("moe-role") if isinstance(selector, Mapping) else None


def _seconds(entry: Mapping[str, object]) -> float:
    seconds = entry.get("graceful_shutdown_timeout_s", SERVE_SHUTDOWN_S)
    return float(seconds) if isinstance(seconds, int | float) else SERVE_SHUTDOWN_S
