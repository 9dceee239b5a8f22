"""Strict schemas: Kubernetes' own for core kinds, the CRDs' for the rest. A misspelt field or a wrong type ends here.

The CRDs lie beside the project, not in it.
"""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from kubernetes_validate.utils import schema_contents
from manifests import Problem, title
from referencing import Registry, Resource
from rendered import ROOT, versions

CRDS_VARIABLE = "EXPERTMESH_CRDS"  # another folder than the one beside the project
CRDS = Path(os.environ.get(CRDS_VARIABLE, ROOT.parent / "shared" / "crds"))
CRD_GROUPS = ("ray.io", "monitoring.coreos.com", "keda.sh")
# Of a CRD's keywords, those that mean the same in a JSON schema. Formats are left out: they are Go's.
KEPT = (
    *("type", "enum", "pattern", "required", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "multipleOf"),
    *("uniqueItems", "anyOf", "oneOf", "allOf", "not"),
)
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": STRINGS,
        "annotations": STRINGS,
    },
    "additionalProperties": False,
}


def check(documents: list[dict]) -> list[Problem]:
    return [problem for document in documents for problem in _problems(document)]


def crds_are_here() -> bool:
    return CRDS.is_dir()


def need_crds() -> None:
    """Without the CRDs our own kinds have no schema here: said loudly, and a failure where a folder was named."""
    if crds_are_here():
        return
    reason = f"the CRDs are not in {CRDS}: the schemas of RayService, PodMonitor and the like were NOT checked"
    pytest.fail(reason) if CRDS_VARIABLE in os.environ else pytest.skip(reason)


def wants_crds(document: dict) -> bool:
    """Whether its kind is one of a CRD's."""
    return document["apiVersion"].partition("/")[0] in CRD_GROUPS


def _problems(document: dict) -> Iterator[Problem]:
    group = str(document.get("apiVersion", "")).rpartition("/")[0]
    if group in CRD_GROUPS and not crds_are_here():
        return  # test_overlays.py skips with a reason
    validator = _validator(str(document.get("apiVersion")), str(document.get("kind")))
    if validator is None:
        yield Problem("schema-unknown-kind", title(document), f"no schema for {document.get('apiVersion')}")
        return
    for error in validator.iter_errors(document):
        where = ".".join(str(step) for step in error.absolute_path)
        yield Problem("schema", f"{title(document)} {where}", error.message[:300])


@cache
def _validator(api_version: str, kind: str) -> Draft202012Validator | None:
    """The validator of a kind, or None where nobody knows the kind."""
    group, _, version = api_version.rpartition("/")
    if group in CRD_GROUPS:
        schema = _custom_schema(group, version, kind)
        return None if schema is None else Draft202012Validator(schema)
    group = group.partition(".")[0]
    try:
        name = f"{kind.lower()}-{group}-{version}" if group else f"{kind.lower()}-{version}"
        schema = schema_contents(f"{_core_folder()}/{name}.json", _kubernetes())
    except FileNotFoundError:
        return None
    return Draft202012Validator(schema, registry=_core_definitions())


def _kubernetes() -> str:
    """As "1.36": the version of Kubernetes that we support."""
    return ".".join(str(versions()["kubernetes"]).lstrip("v").split(".")[:2])


def _core_folder() -> str:
    return f"kubernetes-json-schema/v{_kubernetes()}.0-local-strict"


@cache
def _core_definitions() -> Registry:
    """What the schemas of all core kinds refer to, read once (1.6 MB)."""
    contents = schema_contents(f"{_core_folder()}/_definitions.json", _kubernetes())
    return Resource.from_contents(contents) @ Registry()


def _custom_schema(group: str, version: str, kind: str) -> dict | None:
    path = CRDS / f"{group}_{kind.lower()}s.yaml"
    if not path.is_file():
        return None
    served = {served["name"]: served["schema"]["openAPIV3Schema"] for served in _definition(path)["spec"]["versions"]}
    if version not in served:
        return None
    schema = strict(served[version])
    schema["properties"]["metadata"] = METADATA
    return schema


def _definition(path: Path) -> dict:
    return yaml.load(path.read_text(), Loader=yaml.CSafeLoader)


def strict(schema: dict) -> dict:
    """A CRD's schema as a JSON schema that refuses what the CRD does not name.

    An API server drops unknown fields silently, unless it is asked for strict validation.
    """
    made: dict = {key: schema[key] for key in KEPT if key in schema}
    if "properties" in schema:
        made["properties"] = {name: strict(field) for name, field in schema["properties"].items()}
        made["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
        # A field with a default need not be written.
        made["required"] = [key for key in schema.get("required", []) if "default" not in schema["properties"][key]]
    if isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        made["items"] = strict(schema["items"])
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    if schema.get("nullable") and "type" in made:
        made["type"] = [*(made["type"] if isinstance(made["type"], list) else [made["type"]]), "null"]
    return made
