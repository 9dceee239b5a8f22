"""The set of objects as a whole: each once, in its namespace, labelled, and nothing that does not belong there."""

import re
from collections import Counter
from collections.abc import Iterator

from manifests import Problem, named_groups, of_kind, part, ray_service, title
from rendered import versions

NOT_IN_A_NAMESPACE = ("Namespace", "ClusterRole", "ClusterRoleBinding", "PriorityClass", "StorageClass")
LABELS = ("app.kubernetes.io/name", "app.kubernetes.io/part-of", "app.kubernetes.io/managed-by")
POD_LABELS = ("app.kubernetes.io/part-of", "moe-role")
SCALERS = ("HorizontalPodAutoscaler", "VerticalPodAutoscaler", "ScaledObject", "ScaledJob")
NAME = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")


def check(documents: list[dict]) -> list[Problem]:
    found = [*_set(documents), *_policy_of_namespace(documents), *_templates(documents)]
    for document in documents:
        found += [Problem(rule, title(document), what) for rule, what in _object(document, documents)]
    return found


def _set(documents: list[dict]) -> Iterator[Problem]:
    keys = Counter((title(document), part(document, "metadata").get("namespace")) for document in documents)
    for (name, _), count in keys.items():
        if count > 1:
            yield Problem("object-twice", name, f"is there {count} times")
    count = len(of_kind(documents, "RayService"))
    if count != 1:
        yield Problem("one-ray-service", "render", f"{count} RayServices")


def _object(document: dict, documents: list[dict]) -> Iterator[tuple[str, str]]:
    metadata, kind = part(document, "metadata"), document.get("kind")
    namespace = part(ray_service(documents), "metadata").get("namespace")
    wanted = None if kind in NOT_IN_A_NAMESPACE else namespace
    if metadata.get("namespace") != wanted:
        yield "namespace", f"its namespace is {metadata.get('namespace')}, not {wanted}"
    missing = [label for label in LABELS if not part(metadata, "labels").get(label)]
    if missing:
        yield "labels", f"it lacks {missing}"
    if not NAME.fullmatch(str(metadata.get("name"))):
        yield "object-name", "its name is no DNS name"
    if "config.kubernetes.io/local-config" in part(metadata, "annotations"):
        yield "local-config", "it was for kustomize only"
    if kind == "Secret":
        yield "secret-in-render", "Secrets are made by whoever installs"
    target = part(document, "spec", "scaleTargetRef")
    if kind in SCALERS and str(target.get("apiVersion", "ray.io")).startswith("ray.io"):
        yield "second-autoscaler", "Ray's own autoscaler sets the sizes of worker groups"


def _policy_of_namespace(documents: list[dict]) -> Iterator[Problem]:
    """The namespace asks for "restricted", of a version that does not move."""
    for namespace in of_kind(documents, "Namespace"):
        labels = part(namespace, "metadata", "labels")
        for mode in ("enforce", "audit", "warn"):
            level = labels.get(f"pod-security.kubernetes.io/{mode}")
            version = labels.get(f"pod-security.kubernetes.io/{mode}-version")
            if level != "restricted" or version != f"v{versions()['kubernetes']}":
                yield Problem("pod-security-level", title(namespace), f"{mode} is {level} of version {version}")
    if not of_kind(documents, "Namespace"):
        yield Problem("pod-security-level", "render", "no Namespace, so nothing enforces pod security")


def _templates(documents: list[dict]) -> Iterator[Problem]:
    """Our own labels on every template: the operator overwrites those that kustomize would give."""
    for name, group in named_groups(documents).items():
        labels = part(group, "template", "metadata", "labels") | part(group, "labels")
        missing = [label for label in POD_LABELS if not labels.get(label)]
        if missing:
            yield Problem("pod-labels", f"group {name}", f"its template lacks {missing}")
        elif labels["moe-role"] != name:
            yield Problem("pod-labels", f"group {name}", f"its moe-role is {labels['moe-role']}")
