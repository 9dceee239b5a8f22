"""Versions: one Ray, one image, as k8s/versions.yaml and pyproject.toml say."""

import tomllib
from collections.abc import Iterator

from expansion import pods, ray_pods
from manifests import Problem, ray_cluster, ray_service, title
from rendered import ROOT, versions


def check(documents: list[dict]) -> list[Problem]:
    return [*_ray(documents), *_images(documents)]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned(distribution: str) -> str:
    """The version of a distribution that the project pins, as "2.60.0" for `ray[serve]`."""
    wanted = [*project()["dependencies"], *project()["optional-dependencies"]["dev"]]
    return next(entry.partition("==")[2] for entry in wanted if entry.startswith(f"{distribution}=="))


def _ray(documents: list[dict]) -> Iterator[Problem]:
    found = ray_cluster(documents).get("rayVersion")
    if found != versions()["ray"]:
        yield Problem("ray-version", title(ray_service(documents)), f"rayVersion {found}, we ship {versions()['ray']}")


def _images(documents: list[dict]) -> Iterator[Problem]:
    images = {container.get("image") for pod in ray_pods(documents) for container in pod.containers}
    if len(images) != 1:
        yield Problem("two-images", title(ray_service(documents)), f"{sorted(map(str, images))} are in one cluster")
    for pod in pods(documents):
        for container in pod.containers:
            image = str(container.get("image"))
            tag = image.rpartition("/")[2].partition(":")[2]
            ours = "expertmesh" in image and "@" not in image
            if not tag or tag == "latest" or (ours and not tag.startswith(project()["version"])):
                yield Problem("image-tag", f"pod {pod.name}, container {container.get('name')}", f"image {image}")
