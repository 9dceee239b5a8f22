"""Every name leads somewhere: accounts, Secrets, ConfigMaps, volumes, ports, and whatever selects pods."""

from collections.abc import Iterator

from expansion import Pod, pods, ray_pods
from manifests import Problem, application_args, listing, name_of, of_kind, part, ray_cluster, ray_service, title
from matching import selects

# Secrets that whoever installs makes, with their keys; k8s/README.md tells how.
PREREQUISITES = {
    "expertmesh-ray-token": {"auth_token"},
    "expertmesh-link-secret": {"secret"},
    "expertmesh-api-keys": {"keys"},
    "expertmesh-redis": {"password"},
    "expertmesh-tls": {"tls.crt", "tls.key", "ca.crt"},
}
PREREQUISITE_CLAIMS = {"expertmesh-models"}


def check(documents: list[dict]) -> list[Problem]:
    found: list[Problem] = []
    for pod in pods(documents):
        found += [*_accounts(pod, documents), *_volumes(pod, documents), *_mounts(pod), *_named_ports(pod)]
        found += [*_secret_keys(pod), *_twice(pod)]
    found += [*_cluster_secrets(documents), *_selectors(documents), *_services(documents), *_monitors(documents)]
    return found


def _accounts(pod: Pod, documents: list[dict]) -> Iterator[Problem]:
    accounts = {name_of(account): account for account in of_kind(documents, "ServiceAccount")}
    account = accounts.get(pod.spec.get("serviceAccountName", ""))
    if account is None:
        name = pod.spec.get("serviceAccountName")
        yield Problem("no-account", f"pod {pod.name}", f"service account {name!r} is not among the objects")
        return
    wanted = any(container.get("name") == "autoscaler" for container in pod.containers)
    given = pod.spec.get("automountServiceAccountToken", account.get("automountServiceAccountToken", True))
    if given is not wanted:
        what = "the autoscaler needs one" if wanted else "nothing in it talks to the API server"
        yield Problem("account-token", f"pod {pod.name}", f"automountServiceAccountToken is {given}, but {what}")


def _volumes(pod: Pod, documents: list[dict]) -> Iterator[Problem]:
    maps = {name_of(document) for document in of_kind(documents, "ConfigMap")}
    claims = {name_of(document) for document in of_kind(documents, "PersistentVolumeClaim")} | PREREQUISITE_CLAIMS
    known = {
        ("secret", "secretName"): set(PREREQUISITES),
        ("configMap", "name"): maps,
        ("persistentVolumeClaim", "claimName"): claims,
    }
    sources = listing(pod.spec, "volumes")
    sources += [source for volume in sources for source in listing(volume, "projected", "sources")]
    for source in sources:
        for (kind, field), names in known.items():
            name = part(source, kind).get(field) or part(source, kind).get("name")
            if kind in source and name not in names:
                yield Problem("no-volume-source", f"pod {pod.name}", f"{kind} {name!r} is neither here nor required")


def _mounts(pod: Pod) -> Iterator[Problem]:
    volumes = {volume.get("name") for volume in listing(pod.spec, "volumes")}
    for container in pod.containers:
        for mount in listing(container, "volumeMounts"):
            if mount.get("name") not in volumes:
                where = f"pod {pod.name}, container {container.get('name')}"
                yield Problem("no-volume", where, f"mount {mount.get('mountPath')} is of no volume of the pod")


def _named_ports(pod: Pod) -> Iterator[Problem]:
    for container in pod.containers:
        own = {port.get("name") for port in listing(container, "ports")}
        for kind in ("livenessProbe", "readinessProbe", "startupProbe"):
            for handler in ("httpGet", "tcpSocket", "grpc"):
                port = part(container, kind, handler).get("port")
                if isinstance(port, str) and port not in own:
                    yield Problem("no-probe-port", f"pod {pod.name}", f"{kind} asks port {port!r}, which is none")


def _secret_keys(pod: Pod) -> Iterator[Problem]:
    """Keys that are named must be those which the prerequisites have."""
    references = [
        (
            part(variable, "valueFrom", "secretKeyRef").get("name"),
            part(variable, "valueFrom", "secretKeyRef").get("key"),
        )
        for container in pod.containers
        for variable in listing(container, "env")
    ]
    for volume in listing(pod.spec, "volumes"):
        secret = part(volume, "secret")
        references += [(secret.get("secretName"), item.get("key")) for item in listing(secret, "items")]
    for name, key in references:
        if name is not None and key not in PREREQUISITES.get(name, set()):
            yield Problem("no-secret-key", f"pod {pod.name}", f"Secret {name!r} has no key {key!r}")


def _twice(pod: Pod) -> Iterator[Problem]:
    """An API server keeps the last of two entries with one key, or refuses the list."""
    lists = [(listing(pod.spec, "volumes"), "name"), (pod.containers, "name")]
    for container in pod.containers:
        lists += [(listing(container, "env"), "name"), (listing(container, "volumeMounts"), "mountPath")]
    lists += [([port for container in pod.containers for port in listing(container, "ports")], "name")]
    for entries, key in lists:
        values = [entry.get(key) for entry in entries]
        for value in sorted({str(value) for value in values if values.count(value) > 1}):
            yield Problem("named-twice", f"pod {pod.name}", f"two entries have {key} {value!r}")


def _cluster_secrets(documents: list[dict]) -> Iterator[Problem]:
    auth = part(ray_cluster(documents), "authOptions")
    if "auth_token" not in PREREQUISITES.get(auth.get("secretName", ""), set()):
        yield Problem("no-token-secret", title(ray_service(documents)), f"authOptions name {auth.get('secretName')!r}")


def _selectors(documents: list[dict]) -> Iterator[Problem]:
    """Policies and budgets select some pod, and a budget pods of one group only."""
    for policy in of_kind(documents, "NetworkPolicy"):
        if not _selected(part(policy, "spec").get("podSelector"), documents):
            yield Problem("selects-nothing", title(policy), "its podSelector selects no pod")
    for budget in of_kind(documents, "PodDisruptionBudget"):
        found = _selected(part(budget, "spec").get("selector"), documents)
        if len(found) != 1:
            names = [pod.name for pod in found]
            yield Problem("budget-selector", title(budget), f"selects pods of {names}, and one group is meant")


def _selected(selector: object, documents: list[dict]) -> list[Pod]:
    return [pod for pod in pods(documents) if selects(selector, pod.labels)]


def _services(documents: list[dict]) -> Iterator[Problem]:
    """Every pod behind a Service has the port; one without it would get its share of the connections."""
    for service in of_kind(documents, "Service"):
        found = _selected({"matchLabels": part(service, "spec", "selector")}, documents)
        if not found:
            yield Problem("selects-nothing", title(service), "its selector selects no pod")
        for port in listing(service, "spec", "ports"):
            target = port.get("targetPort", port.get("port"))
            for pod in found:
                if target not in pod.ports and target not in pod.ports.values():
                    yield Problem("no-service-port", title(service), f"pod {pod.name} has no port {target!r}")
            in_clear = not part(application_args(documents), "config", "gateway").get("tls_cert_file")
            if port.get("name") == "grpc" and (port.get("appProtocol") == "kubernetes.io/h2c") is not in_clear:
                yield Problem(
                    "grpc-protocol", title(service), "appProtocol of port grpc is h2c, which has no TLS, or not"
                )


def _monitors(documents: list[dict]) -> Iterator[Problem]:
    for monitor in of_kind(documents, "PodMonitor", "ServiceMonitor"):
        found = _selected(part(monitor, "spec").get("selector"), documents)
        if not found or monitor["kind"] == "ServiceMonitor":  # no Service of ours exports metrics
            yield Problem("selects-nothing", title(monitor), "nothing that has metrics is selected")
        for endpoint in listing(monitor, "spec", "podMetricsEndpoints"):
            for pod in found:
                if endpoint.get("port") not in pod.ports:
                    yield Problem("no-monitor-port", title(monitor), f"pod {pod.name} lacks {endpoint.get('port')!r}")
    if of_kind(documents, "PodMonitor"):
        scraped = {pod.name for monitor in of_kind(documents, "PodMonitor") for pod in _monitored(monitor, documents)}
        for pod in ray_pods(documents):
            if pod.name not in scraped:
                yield Problem("not-monitored", f"pod {pod.name}", "no PodMonitor selects it")


def _monitored(monitor: dict, documents: list[dict]) -> list[Pod]:
    return _selected(part(monitor, "spec").get("selector"), documents)
