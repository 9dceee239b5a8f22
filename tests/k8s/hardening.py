"""What we ask of every pod beyond the standard "restricted"."""

import re
from collections.abc import Iterator

from expansion import Pod, pods
from manifests import Problem, listing, part

SECRET_NAME = re.compile(r"TOKEN|PASSWORD|PASSWD|SECRET|API_KEY|PRIVATE|CREDENTIAL")
NAMES_A_PLACE = re.compile(r"_(FILE|PATH|DIR|NAME|MODE)$")
SECRET_MODE = 0o440  # our readers refuse what others may read
WRITABLE = ("emptyDir", "persistentVolumeClaim", "ephemeral")


def check(documents: list[dict]) -> list[Problem]:
    return [
        Problem(rule, f"pod {pod.name}" + (f", container {name}" if name else ""), what)
        for pod in pods(documents)
        for rule, name, what in (*_pod(pod), *_containers(pod), *_writable_places(pod))
    ]


Violation = tuple[str, str, str]  # rule, container ("" for the pod), what


def _pod(pod: Pod) -> Iterator[Violation]:
    security = part(pod.spec, "securityContext")
    # On the pod, not its containers: the operator adds containers that say nothing of their own.
    if security.get("runAsNonRoot") is not True:
        yield "pod-non-root", "", "runAsNonRoot is not true on the pod itself"
    if part(security, "seccompProfile").get("type") != "RuntimeDefault":
        yield "pod-seccomp", "", "the pod's own seccomp profile is not RuntimeDefault"
    for field in ("runAsUser", "runAsGroup", "fsGroup"):
        if not isinstance(security.get(field), int) or not security[field]:
            yield "numeric-user", "", f"{field} is {security.get(field)}, not a number above 0"
    if pod.spec.get("enableServiceLinks") is not False:
        yield "service-links", "", "enableServiceLinks is not false"
    for volume in listing(pod.spec, "volumes"):
        if "secret" in volume and part(volume, "secret").get("defaultMode") != SECRET_MODE:
            yield "secret-mode", "", f"volume {volume.get('name')} is not of defaultMode 0440"


def _containers(pod: Pod) -> Iterator[Violation]:
    for container in pod.containers:
        name = str(container.get("name"))
        if part(container, "securityContext").get("readOnlyRootFilesystem") is not True:
            yield "writable-root", name, "readOnlyRootFilesystem is not true"
        for kind in ("requests", "limits"):
            missing = {"cpu", "memory"} - set(part(container, "resources", kind))
            if missing:
                yield "no-resources", name, f"{kind} lack {sorted(missing)}"
        for variable in listing(container, "env"):
            if _is_secret(variable):
                yield "secret-in-env", name, f"the value of {variable.get('name')} is written out"


def _is_secret(variable: dict) -> bool:
    name = str(variable.get("name")).upper()
    return bool(variable.get("value") and SECRET_NAME.search(name) and not NAMES_A_PLACE.search(name))


def _writable_places(pod: Pod) -> Iterator[Violation]:
    """With a read-only root, Ray and vLLM need a temporary folder and a home that they can write to."""
    if not pod.group:
        return
    home = {str(variable.get("name")): str(variable.get("value")) for variable in listing(pod.main, "env")}.get("HOME")
    if home is None:
        yield "home", str(pod.main.get("name")), "HOME is not set, and the image's is on the read-only root"
    for path in ("/tmp", home):
        if path is not None and not _can_write(pod, path):
            yield "no-writable-place", str(pod.main.get("name")), f"nothing writable is mounted for {path}"


def _can_write(pod: Pod, path: str) -> bool:
    volumes = {volume.get("name"): volume for volume in listing(pod.spec, "volumes")}
    mounts = [mount for mount in listing(pod.main, "volumeMounts") if _holds(str(mount.get("mountPath")), path)]
    nearest = max(mounts, key=lambda mount: len(str(mount.get("mountPath"))), default=None)
    if nearest is None or nearest.get("readOnly"):
        return False
    return any(kind in volumes.get(nearest.get("name"), {}) for kind in WRITABLE)


def _holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
