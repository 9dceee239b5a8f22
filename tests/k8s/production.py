"""What only `prod` must have: images that cannot change, and no part that there is only one of."""

from collections.abc import Iterator

from expansion import pods, ray_pods
from manifests import (
    Problem,
    application_args,
    deployments,
    least_replicas,
    listing,
    named_groups,
    of_kind,
    part,
    ray_cluster,
    ray_service,
    title,
    worker_groups,
)
from matching import selects

LEAST_COPIES = 2
ALONE = ("controller",)  # there is never a second; placements stay as they are while it is away


def check(documents: list[dict]) -> list[Problem]:
    return [*_images(documents), *_copies(documents), *_state(documents), *_streams(documents)]


def _images(documents: list[dict]) -> Iterator[Problem]:
    for pod in pods(documents):
        for container in pod.containers:
            if "@sha256:" not in str(container.get("image")):
                where = f"pod {pod.name}, container {container.get('name')}"
                yield Problem("no-digest", where, f"image {container.get('image')} is not named by its digest")


def _copies(documents: list[dict]) -> Iterator[Problem]:
    for deployment in deployments(documents):
        if deployment.get("name") not in ALONE and least_replicas(deployment) < LEAST_COPIES:
            yield Problem("only-one", f"deployment {deployment.get('name')}", f"{least_replicas(deployment)} replica")
    budgets = of_kind(documents, "PodDisruptionBudget")
    for pod in ray_pods(documents):
        if pod.name == "head":
            continue
        chosen = [budget for budget in budgets if selects(part(budget, "spec").get("selector"), pod.labels)]
        if not any(part(budget, "spec").get("minAvailable") for budget in chosen):
            yield Problem("no-budget", f"group {pod.name}", "no PodDisruptionBudget keeps a pod of it")
        if not (listing(pod.spec, "topologySpreadConstraints") or part(pod.spec, "affinity", "podAntiAffinity")):
            yield Problem("not-spread", f"group {pod.name}", "nothing spreads its pods over machines")


def _state(documents: list[dict]) -> Iterator[Problem]:
    where = title(ray_service(documents))
    if not part(ray_cluster(documents), "gcsFaultToleranceOptions"):
        yield Problem("no-fault-tolerance", where, "the head's state goes with the head")
    if part(ray_service(documents), "spec", "upgradeStrategy").get("type") != "NewCluster":
        yield Problem("no-upgrade", where, "changes of the cluster would not be rolled out")
    for kind in ("PodMonitor", "PrometheusRule"):
        if not of_kind(documents, kind):
            yield Problem("not-watched", "render", f"there is no {kind}")
    if not part(application_args(documents), "config", "gateway").get("tls_cert_file"):
        yield Problem("no-tls", "gateway", "clients speak in clear")


def _streams(documents: list[dict]) -> Iterator[Problem]:
    """A stream ends by itself, whatever happens to the pods: a bare `ray stop` would cut it."""
    for group in worker_groups(documents):
        for container in listing(group, "template", "spec", "containers"):
            command = part(container, "lifecycle", "preStop", "exec").get("command") or []
            if "--deadline-s" not in command:
                yield Problem(
                    "streams-cut", f"group {group.get('groupName')}", f"preStop is {command}, which waits not"
                )
    config = part(application_args(documents), "config", "gateway")
    gateway = next((entry for entry in deployments(documents) if entry.get("name") == "gateway"), {})
    drain_s, longest_s = gateway.get("graceful_shutdown_timeout_s", 0), config.get("request_timeout_s", 600)
    if drain_s < longest_s:
        yield Problem("streams-cut", "deployment gateway", f"it drains {drain_s} s, a stream may last {longest_s} s")
    if "gateway" not in named_groups(documents):
        yield Problem("only-one", "group gateway", "there is none")
