"""The pods that KubeRay would make of a RayService, and those of any other workload.

Checks that look at pods look at these: KubeRay v1.7 adds containers, mounts, labels and probes to what is written.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

from manifests import head_group, listing, name_of, of_kind, part, ray_cluster, ray_service, title, worker_groups

OPERATOR_PROBE = ["bash", "-c", "wget"]  # asks Ray's agent and, in a worker of a RayService, Serve's proxy
INIT_RESOURCES = {"limits": {"cpu": "200m", "memory": "256Mi"}, "requests": {"cpu": "200m", "memory": "256Mi"}}
SIDECAR_RESOURCES = {"limits": {"cpu": "500m", "memory": "512Mi"}, "requests": {"cpu": "500m", "memory": "512Mi"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """One pod of a group, or of a workload."""

    name: str  # "head", the worker group's name, or as "Job/fill"
    labels: dict
    spec: dict
    group: dict  # what the RayCluster says of its group; empty for a pod of another workload

    @property
    def containers(self) -> list[dict]:
        """All of them, init containers first."""
        return [*listing(self.spec, "initContainers"), *listing(self.spec, "containers")]

    @property
    def main(self) -> dict:
        """The container that Ray runs in."""
        return next(iter(listing(self.spec, "containers")), {})

    @property
    def ports(self) -> dict[str, int]:
        """Port numbers by name."""
        ports = [port for container in self.containers for port in listing(container, "ports")]
        return {str(port.get("name")): port.get("containerPort", 0) for port in ports}


def pods(documents: list[dict]) -> list[Pod]:
    return [*ray_pods(documents), *_others(documents)]


def ray_pods(documents: list[dict]) -> list[Pod]:
    """The head and one pod of each worker group; none of a group without containers, which KubeRay refuses."""
    groups = [("head", head_group(documents))]
    groups += [(str(group.get("groupName")), group) for group in worker_groups(documents)]
    return [
        _ray_pod(documents, name, group) for name, group in groups if listing(group, "template", "spec", "containers")
    ]


def _ray_pod(documents: list[dict], name: str, group: dict) -> Pod:
    cluster, is_head = ray_cluster(documents), name == "head"
    spec = deepcopy(part(group, "template", "spec"))
    container = spec["containers"][0]
    if is_head and cluster.get("enableInTreeAutoscaling"):
        _add_autoscaler(spec, cluster, name_of(ray_service(documents)))
    if not is_head:
        spec.setdefault("initContainers", []).append(_wait_for_head(container))
    if cluster.get("enableInTreeAutoscaling") and part(cluster, "autoscalerOptions").get("version") == "v2":
        spec["restartPolicy"] = "Never"
    _mount(spec, container, "shared-mem", "/dev/shm", _shared_memory(container))
    _add_environment(container, cluster, is_head=is_head)
    if "metrics" not in [port.get("name") for port in listing(container, "ports")]:
        container.setdefault("ports", []).append({"name": "metrics", "containerPort": 8080})
    for probe in ("livenessProbe", "readinessProbe"):
        container.setdefault(probe, {"exec": {"command": OPERATOR_PROBE}})
    return Pod(name=name, labels=_labels(group, name), spec=spec, group=group)


def _labels(group: dict, name: str) -> dict:
    """The operator's own labels win."""
    is_head = name == "head"
    operators = {
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
        "ray.io/is-ray-node": "yes",
        "ray.io/node-type": "head" if is_head else "worker",
        "ray.io/group": "headgroup" if is_head else name,
        "ray.io/cluster": "made-by-the-operator",  # another one with each upgrade
        "ray.io/serve": "false" if is_head else "true",
    }
    return part(group, "template", "metadata", "labels") | part(group, "labels") | operators


def _add_autoscaler(spec: dict, cluster: dict, service_name: str) -> None:
    """The sidecar that asks for pods; it has the image of the head, and a security context only if one is written."""
    options, head = part(cluster, "autoscalerOptions"), spec["containers"][0]
    spec.setdefault("serviceAccountName", service_name)  # the operator makes this account
    sidecar = {
        "name": "autoscaler",
        "image": options.get("image", head.get("image")),
        "resources": options.get("resources", SIDECAR_RESOURCES),
        "env": deepcopy(options.get("env", [])),
        "envFrom": deepcopy(options.get("envFrom", [])),
        "volumeMounts": deepcopy(options.get("volumeMounts", [])),
    }
    if "securityContext" in options:
        sidecar["securityContext"] = options["securityContext"]
    spec["containers"].append(sidecar)
    for container in (head, sidecar):
        _mount(spec, container, "ray-logs", "/tmp/ray", {})


def _wait_for_head(container: dict) -> dict:
    """The init container of workers: the same image, environment, mounts and security context."""
    copied = {key: deepcopy(container[key]) for key in ("image", "securityContext", "volumeMounts") if key in container}
    environment = deepcopy(container.get("env", []))
    return {"name": "wait-gcs-ready", **copied, "env": environment, "resources": INIT_RESOURCES}


def _mount(spec: dict, container: dict, name: str, path: str, source: dict) -> None:
    """An emptyDir at the path, unless something is mounted there."""
    if path in [mount.get("mountPath") for mount in listing(container, "volumeMounts")]:
        return
    if name not in [volume.get("name") for volume in listing(spec, "volumes")]:
        spec.setdefault("volumes", []).append({"name": name, "emptyDir": source})
    container.setdefault("volumeMounts", []).append({"name": name, "mountPath": path})


def _shared_memory(container: dict) -> dict:
    """/dev/shm as the operator would size it: all of the container's memory."""
    resources = part(container, "resources")
    size = part(resources, "requests").get("memory") or part(resources, "limits").get("memory")
    return {"medium": "Memory", **({"sizeLimit": size} if size else {})}


def _add_environment(container: dict, cluster: dict, *, is_head: bool) -> None:
    """What the operator takes from Secrets; the rest of its variables matter to no check."""
    added, auth = [], part(cluster, "authOptions")
    if auth.get("mode") == "token":
        secret = {"name": auth.get("secretName", "made-by-the-operator"), "key": "auth_token"}
        added.append({"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": secret}})
    password = part(cluster, "gcsFaultToleranceOptions", "redisPassword")
    if is_head and password:
        added.append({"name": "REDIS_PASSWORD", **password})
    if added:
        container["env"] = [*container.get("env", []), *added]


def _others(documents: list[dict]) -> Iterator[Pod]:
    """Pods of the core workloads, should an overlay have some."""
    for document in of_kind(documents, "Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob"):
        holder = part(document, "spec", "jobTemplate") if document["kind"] == "CronJob" else document
        template = part(holder, "spec", "template")
        labels = part(template, "metadata", "labels")
        yield Pod(name=title(document), labels=labels, spec=deepcopy(part(template, "spec")), group={})
    for document in of_kind(documents, "Pod"):
        labels = part(document, "metadata", "labels")
        yield Pod(name=title(document), labels=labels, spec=deepcopy(part(document, "spec")), group={})
