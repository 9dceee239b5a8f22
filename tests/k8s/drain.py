"""The arithmetic of shutting down: a pod gets the time that its streams need, and so does a cluster that is replaced.

    terminationGracePeriodSeconds >= ROUTE_S + drain + STOP_S + MARGIN_S

preStop counts inside of it. `drain` is the longest graceful_shutdown_timeout_s of the deployments on the group.
"""

import importlib.util
from collections.abc import Iterator

from manifests import Problem, application_args, deployments_on, listing, part, ray_service, title, worker_groups

ROUTE_S = 15.0  # until endpoints and clients have stopped sending
LEAST_DRAIN_S = 30.0
STOP_S = 16.0  # `ray stop` waits so long for its processes
MARGIN_S = 10.0
KUBERNETES_GRACE_S = 30.0  # where nothing is written
SERVE_GRACE_S = 20.0  # likewise
DEFAULT_REQUEST_TIMEOUT_S = 600.0  # gateway.request_timeout_s


def check(documents: list[dict]) -> list[Problem]:
    return [*_pods(documents), *_cluster(documents)]


def needed_s(group: dict, documents: list[dict]) -> float:
    """What a pod of the group needs between the decision that it goes and its end."""
    placed = deployments_on(group, documents)
    drains = [float(deployment.get("graceful_shutdown_timeout_s", SERVE_GRACE_S)) for deployment in placed]
    return ROUTE_S + max([LEAST_DRAIN_S, *drains]) + STOP_S + MARGIN_S


def _pods(documents: list[dict]) -> Iterator[Problem]:
    for group in worker_groups(documents):
        where, spec = f"group {group.get('groupName')}", part(group, "template", "spec")
        grace_s, wanted_s = spec.get("terminationGracePeriodSeconds", KUBERNETES_GRACE_S), needed_s(group, documents)
        if grace_s < wanted_s:
            yield Problem("grace-too-short", where, f"{grace_s:g} s are given, {wanted_s:g} s are needed")
        hooks = [part(container, "lifecycle", "preStop") for container in listing(spec, "containers")]
        if not all(hooks):
            yield Problem("no-pre-stop", where, "without preStop the pod's streams end where they are")
        for hook in hooks:
            for rule, what in _hook(part(hook, "exec").get("command") or [], grace_s, wanted_s):
                yield Problem(rule, where, what)


def _hook(command: list[str], grace_s: float, wanted_s: float) -> Iterator[tuple[str, str]]:
    """The hook must be there, wait long enough, and end before the pod is killed."""
    if command[1:2] == ["-m"] and importlib.util.find_spec(command[2]) is None:
        yield "no-hook", f"preStop starts module {command[2]}, which is none"
    if "--deadline-s" in command:
        deadline_s = float(command[command.index("--deadline-s") + 1])
        if deadline_s + STOP_S + MARGIN_S > grace_s:
            yield "hook-too-long", f"preStop may wait {deadline_s:g} s, and the pod has {grace_s:g} s in all"
        if deadline_s < wanted_s - STOP_S - MARGIN_S:
            yield "hook-too-short", f"preStop waits {deadline_s:g} s, and {wanted_s - STOP_S - MARGIN_S:g} s are needed"


def _cluster(documents: list[dict]) -> Iterator[Problem]:
    """After an upgrade's switch the old cluster lives only so long."""
    delay_s = part(ray_service(documents), "spec").get("rayClusterDeletionDelaySeconds", 60)
    gateway = part(application_args(documents), "config", "gateway")
    wanted_s = float(gateway.get("request_timeout_s", DEFAULT_REQUEST_TIMEOUT_S)) + ROUTE_S
    if delay_s < wanted_s:
        what = f"rayClusterDeletionDelaySeconds {delay_s}, the longest stream and its route need {wanted_s:g}"
        yield Problem("deletion-too-soon", title(ray_service(documents)), what)
