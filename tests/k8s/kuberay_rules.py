"""What the operator, KubeRay v1.7, refuses although the API server takes it, and three of its traps.

Refused here means: an event InvalidRayServiceSpec and no cluster, or a cluster that does not do what is written.
"""

import re
from collections.abc import Iterator

from manifests import (
    Problem,
    listing,
    name_of,
    named_groups,
    part,
    ray_cluster,
    ray_service,
    title,
    worker_groups,
)

MAX_NAME = 47  # KubeRay appends to it
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
DURATION = re.compile(r"(\d+(\.\d+)?(ns|us|ms|s|m|h))+")
RAY_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
REDIS_VARIABLES = ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME")
REDIS_PARAMS = ("redis-password", "redis-username")

Broken = tuple[str, str]  # rule, what


def check(documents: list[dict]) -> list[Problem]:
    service, cluster = ray_service(documents), ray_cluster(documents)
    found = [*_service(service), *_upgrades(part(service, "spec")), *_cluster(cluster), *_auth(cluster)]
    found += [*_autoscaling(cluster), *_fault_tolerance(service, cluster)]
    problems = [Problem(rule, title(service), what) for rule, what in found]
    for name, group in named_groups(documents).items():
        problems += [Problem(rule, f"group {name}", what) for rule, what in _group(group, cluster)]
    names = [group.get("groupName") for group in worker_groups(documents)]
    if len(names) != len(set(names)):
        problems.append(Problem("group-twice", title(service), f"two worker groups have one name: {names}"))
    return problems


def _service(service: dict) -> Iterator[Broken]:
    name = name_of(service)
    if len(name) > MAX_NAME or not DNS_1035.fullmatch(name):
        yield "service-name", f"{name!r} is no DNS-1035 label of at most {MAX_NAME} characters"
    timeout = part(service, "metadata", "annotations").get("ray.io/initializing-timeout")
    if timeout is not None and not (DURATION.fullmatch(str(timeout)) and float(re.sub(r"[^\d.]", "", timeout))):
        yield "initializing-timeout", f"{timeout!r} is no positive duration"


def _upgrades(spec: dict) -> Iterator[Broken]:
    kind = part(spec, "upgradeStrategy").get("type")
    if kind not in ("NewCluster", "None"):  # the incremental one forgets gRPC's port
        yield "upgrade-type", f"upgradeStrategy.type is {kind}"
    if "upgradeStrategy" in part(spec, "rayClusterConfig"):
        yield "cluster-upgrade", "rayClusterConfig has an upgradeStrategy, which is for a RayCluster alone"
    delay = spec.get("rayClusterDeletionDelaySeconds")
    if not isinstance(delay, int) or delay < 0:
        yield "deletion-delay", f"rayClusterDeletionDelaySeconds is {delay}"
    if spec.get("excludeHeadPodFromServeSvc") is not True:
        yield "head-serves", "excludeHeadPodFromServeSvc is not true, so the operator asks the head's Serve proxy"


def _cluster(cluster: dict) -> Iterator[Broken]:
    for field in ("networkPolicy", "tlsOptions"):
        if field in cluster:
            yield "alpha-field", f"{field} is behind a gate that is off"
    if part(cluster, "headGroupSpec", "headService", "metadata").get("name"):
        yield "head-service-name", "headService has a name"
    if "rayVersion" not in cluster:
        yield "no-ray-version", "rayVersion is not written out"


def _auth(cluster: dict) -> Iterator[Broken]:
    """Without the mode written out v1.7.0 only makes a Secret, and all of Ray stays open."""
    auth = part(cluster, "authOptions")
    if auth.get("mode") != "token":
        yield "auth-mode", f"authOptions.mode is {auth.get('mode')}, so nothing asks for a token"
    if not auth.get("secretName"):
        yield "auth-secret", "authOptions.secretName is not written out"
    if auth.get("enableK8sTokenAuth"):
        yield "auth-k8s", "enableK8sTokenAuth is not for a RayService"
    if auth.get("mode") == "token" and _version(cluster) < (2, 52):
        yield "auth-version", "token auth needs rayVersion 2.52"


def _autoscaling(cluster: dict) -> Iterator[Broken]:
    options = part(cluster, "autoscalerOptions")
    if not cluster.get("enableInTreeAutoscaling"):
        yield "no-autoscaling", "enableInTreeAutoscaling is not true, so expert load brings no pods"
        return
    if options.get("version") != "v2":
        yield "autoscaler-version", f"autoscalerOptions.version is {options.get('version')}, not v2"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "idle-timeout", "autoscalerOptions.idleTimeoutSeconds is below 0"


def _fault_tolerance(service: dict, cluster: dict) -> Iterator[Broken]:
    options = part(cluster, "gcsFaultToleranceOptions")
    annotations = part(service, "metadata", "annotations")
    if options and "ray.io/ft-enabled" in annotations:
        yield "ft-twice", "the annotation ray.io/ft-enabled stands beside gcsFaultToleranceOptions"
    if "externalStorageNamespace" in options or "ray.io/external-storage-namespace" in annotations:
        yield "ft-namespace", "the old and the new cluster of an upgrade would share their state"
    if part(options, "redisPassword").get("value"):
        yield "ft-password", "the password of Redis is written out"


def _group(group: dict, cluster: dict) -> Iterator[Broken]:
    params, spec = part(group, "rayStartParams"), part(group, "template", "spec")
    containers = listing(spec, "containers")
    if not containers:
        yield "no-container", "the group has no container"
    both = sorted(key for key in RAY_RESOURCES if key in params and group.get("resources"))
    if both:
        yield "resources-twice", f"{both} are in rayStartParams, and the group has resources, too"
    if "labels" in params:
        yield "label-params", "rayStartParams.labels is refused; labels belong to the group"
    if any(not isinstance(value, str) for value in params.values()):
        yield "params-text", "every value of rayStartParams is a text"
    redis = [key for key in REDIS_PARAMS if key in params]
    redis += [str(v.get("name")) for one in containers for v in listing(one, "env") if v.get("name") in REDIS_VARIABLES]
    if redis:
        yield "redis-by-hand", f"{redis} belong into gcsFaultToleranceOptions"
    yield from _scaled_group(group, cluster)


def _scaled_group(group: dict, cluster: dict) -> Iterator[Broken]:
    spec = part(group, "template", "spec")
    is_v2 = part(cluster, "autoscalerOptions").get("version") == "v2"
    variables = [v.get("name") for one in listing(spec, "containers") for v in listing(one, "env")]
    if "RAY_enable_autoscaler_v2" in variables:
        yield "autoscaler-by-hand", "RAY_enable_autoscaler_v2 stands beside autoscalerOptions.version"
    if is_v2 and spec.get("restartPolicy", "Never") != "Never":
        yield "restart-policy", f"restartPolicy is {spec['restartPolicy']}; autoscaler v2 wants none or Never"
    if group.get("idleTimeoutSeconds", 0) < 0 or ("idleTimeoutSeconds" in group and not is_v2):
        yield "idle-timeout", "idleTimeoutSeconds is below 0, or there is no autoscaler v2 to heed it"
    if group.get("suspend"):
        yield "suspended", "a group of a RayService cannot be suspended"
    if "priority" in group and _version(cluster) < (2, 56):
        yield "priority-version", "a group's priority needs rayVersion 2.56"
    is_worker = "groupName" in group
    if is_worker and not {"minReplicas", "maxReplicas"} <= set(group):
        yield "group-bounds", "minReplicas and maxReplicas are not both written out"
    if is_worker and any(group.get(key, 0) < 0 for key in ("minReplicas", "maxReplicas", "replicas")):
        yield "group-bounds", "a number of replicas is below 0"


def _version(cluster: dict) -> tuple[int, int]:
    """(2, 60) of 2.60.0; (0, 0) where it cannot be read."""
    found = re.match(r"(\d+)\.(\d+)", str(cluster.get("rayVersion")))
    return (int(found[1]), int(found[2])) if found else (0, 0)
