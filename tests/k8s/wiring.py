"""Our own config, as the application gets it, against the pods that it is to run in."""

from collections.abc import Iterator, Sequence

from expansion import Pod, ray_pods
from manifests import Problem, application_args, deployments, least_replicas, listing, most_replicas, part
from pydantic import ValidationError

from deploy.config import DeploymentConfig

# Which pods each part belongs on; experts-<g> on "experts". Router and engine share a Unix socket, so they share pods.
ROLES = {"controller": "gateway", "gateway": "gateway", "router": "attention", "attention": "attention"}
PAIR = ("attention", "router")
ON_THE_DATA_PLANE = ("attention", "experts")
SHARED_IN_A_POD = "Memory"

Wrong = tuple[str, str, str]  # rule, where, what


def check(documents: list[dict]) -> list[Problem]:
    args = application_args(documents)
    try:
        config = DeploymentConfig.model_validate(args.get("config"))
    except ValidationError as error:
        return [Problem("config", "serveConfigV2", str(error)[:300])]
    pods = {pod.name: pod for pod in ray_pods(documents)}
    found = [*_places(documents), *_front_door(config, pods), *_secrets(config, args, pods)]
    found += [*_files(config, str(args.get("runtime_dir")), pods), *_ports(config, pods), *_probes(config, pods)]
    return [Problem(rule, where, what) for rule, where, what in found]


def _places(documents: list[dict]) -> Iterator[Wrong]:
    for deployment in deployments(documents):
        name = str(deployment.get("name"))
        role = ROLES.get(name, "experts")
        found = part(deployment, "ray_actor_options", "label_selector").get("moe-role")
        if found != role:
            yield "wrong-place", f"deployment {name}", f"its moe-role is {found}, and it belongs on {role}"
        # A second gateway in a pod finds its ports taken, a second engine or expert the GPU.
        if name != "controller" and deployment.get("max_replicas_per_node") != 1:
            yield "not-alone", f"deployment {name}", "max_replicas_per_node is not 1"

    engines, routers = (next((it for it in deployments(documents) if it.get("name") == name), {}) for name in PAIR)
    if engines and most_replicas(engines) != least_replicas(routers):
        what = f"{least_replicas(routers)}, and {most_replicas(engines)} attention pods each need one"
        yield "routers", "deployment router", what


def _front_door(config: DeploymentConfig, pods: dict[str, Pod]) -> Iterator[Wrong]:
    gateway = config.gateway
    for key in ("http_host", "grpc_host"):
        if getattr(gateway, key) != "0.0.0.0":
            yield "listens-inside", "gateway", f"{key} is {getattr(gateway, key)}, where no other pod reaches it"
    if gateway.auth != "keys":
        yield "no-keys", "gateway", "auth is not `keys`"
    if config.experts.listen != "tcp":
        yield "unix-between-pods", "experts", "listen is not tcp, and a Unix socket ends at its pod"
    if config.metrics.host != "0.0.0.0":
        yield "listens-inside", "metrics", f"host is {config.metrics.host}, where Prometheus does not reach it"
    if "gateway" not in pods:
        yield "wrong-place", "gateway", "there is no group of that name"


def _secrets(config: DeploymentConfig, args: dict, pods: dict[str, Pod]) -> Iterator[Wrong]:
    """What is secret comes as a file of a Secret, in those pods that need it and in no other."""
    gateway = config.gateway
    files: list[tuple[object, Sequence[str]]] = [(args.get("secret_file"), ON_THE_DATA_PLANE)]
    files += [(gateway.keys_file, ["gateway"])]
    tls = (gateway.tls_cert_file, gateway.tls_key_file, gateway.tls_client_ca_file)
    files += [(path, ["gateway"]) for path in tls if path is not None]
    for path, roles in files:
        for role in roles:
            if role in pods and "secret" not in _volume_at(pods[role], str(path)):
                yield "no-secret-file", f"group {role}", f"{path} lies on no mounted Secret"
    wanted = {"gateway": 1 + any(tls), "attention": 1, "experts": 1}
    for name, pod in pods.items():
        secrets = [volume for volume in listing(pod.spec, "volumes") if "secret" in volume]
        if len(secrets) > wanted.get(name, 0):
            yield (
                "secret-too-many",
                f"group {name}",
                f"{len(secrets)} Secrets are mounted, {wanted.get(name, 0)} needed",
            )


def _files(config: DeploymentConfig, runtime_dir: str, pods: dict[str, Pod]) -> Iterator[Wrong]:
    for name, pod in pods.items():
        folder = part(_volume_at(pod, runtime_dir), "emptyDir")
        if name != "head" and folder.get("medium") != SHARED_IN_A_POD:
            yield "no-runtime-dir", f"group {name}", f"{runtime_dir} is no folder in the pod's memory"
        # Serve builds the application in a task on any node, the head's included, and that reads the checkpoint, too.
        checkpoint = config.model.checkpoint
        if checkpoint != "embedded" and not _is_mounted_read_only(pod, checkpoint):
            yield "no-checkpoint", f"group {name}", f"{checkpoint} lies on no volume that is mounted read only"


def _ports(config: DeploymentConfig, pods: dict[str, Pod]) -> Iterator[Wrong]:
    gateway = config.gateway
    wanted = [("gateway", "http", gateway.http_port), ("gateway", "grpc", gateway.grpc_port)]
    wanted += [(name, "em-metrics", config.metrics.port) for name in pods if name != "head"]
    for name, port, number in wanted:
        if name in pods and pods[name].ports.get(port) != number:
            yield (
                "wrong-port",
                f"group {name}",
                f"port {port} is {pods[name].ports.get(port)}, our config says {number}",
            )


def _probes(config: DeploymentConfig, pods: dict[str, Pod]) -> Iterator[Wrong]:
    """Ours, since the operator's ask Serve's proxies; a gateway is ready when the application can serve."""
    for name, pod in pods.items():
        for kind in ("livenessProbe", "readinessProbe"):
            if "httpGet" not in part(pod.main, kind):
                yield "operator-probe", f"group {name}", f"{kind} is the operator's, which asks Serve's proxies"
        if name == "head" and "startupProbe" not in pod.main:
            yield "no-startup-probe", "group head", "a slow start would be taken for a hang"
    if "gateway" in pods:
        asked = part(pods["gateway"].main, "readinessProbe", "httpGet")
        if asked.get("path") != "/ready" or asked.get("port") not in ("http", config.gateway.http_port):
            yield "gateway-readiness", "group gateway", "readiness does not ask /ready of port http"
        if asked and config.gateway.tls_client_ca_file:
            yield "gateway-readiness", "group gateway", "a probe has no certificate, which mutual TLS asks for"
        if (asked.get("scheme") == "HTTPS") is not bool(config.gateway.tls_cert_file):
            yield "gateway-readiness", "group gateway", "the probe speaks TLS, or not, and the gateway the other way"


def _volume_at(pod: Pod, path: str) -> dict:
    """The volume that a path lies on; empty where it is the image's."""
    found = _mount_at(pod, path)
    volumes = {volume.get("name"): volume for volume in listing(pod.spec, "volumes")}
    return volumes.get(found.get("name"), {})


def _mount_at(pod: Pod, path: str) -> dict:
    mounts = listing(pod.main, "volumeMounts")
    holding = [mount for mount in mounts if f"{path}/".startswith(f"{mount.get('mountPath', '/none')}/")]
    return max(holding, key=lambda mount: len(mount["mountPath"]), default={})


def _is_mounted_read_only(pod: Pod, path: str) -> bool:
    mount = _mount_at(pod, path)
    return bool(mount) and mount.get("readOnly") is True
