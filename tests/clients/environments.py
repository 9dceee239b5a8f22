"""Environments of their own for clients whose pins clash with ours: made once, and kept for as long as the pins stay.

A group of clients that get along has one environment, and one file of pins/, with every package that is in it. After
a change of what a file's first line asks for, install that into an empty environment and write down `pip freeze`, with
setuptools where something wants it.

`python tests/clients/environments.py` makes all of them, and says where they are.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INSTALL_TIMEOUT_S = 1200
# The name under which a client is imported -> its group.
GROUPS: Mapping[str, str] = {
    "openai": "openai-3",
    "langchain_openai": "openai-3",
    "llama_index": "openai-2",
    "tritonclient": "openai-3",
    "grpc_requests": "openai-3",
    "litellm": "openai-2",
    "kserve": "openai-2",  # never in one process with tritonclient: both bring the same messages
}


def python_of(client: str) -> Path:
    """The interpreter that can import this client. Made if it is not there yet (minutes)."""
    group = GROUPS[client]
    pins = HERE / "pins" / f"{group}.txt"
    return _made(group, pins.read_text() + sys.version, lambda folder: _install(folder, pins)) / "bin" / "python"


def node_folder() -> Path:
    """A folder in which node finds the JavaScript clients. Made if it is not there yet."""
    wanted = HERE / "pins" / "package.json"
    return _made("node", wanted.read_text(), lambda folder: _npm_install(folder, wanted))


def _made(name: str, pins: str, make: Callable[[Path], None]) -> Path:
    base = Path(os.environ.get("EXPERTMESH_CLIENT_ENVS", ROOT / ".client-envs"))
    folder = base / f"{name}-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"
    whole = folder / "whole"  # an installation that was cut short has none, and starts again
    if not whole.exists():
        shutil.rmtree(folder, ignore_errors=True)
        make(folder)
        whole.touch()
    return folder


def _install(folder: Path, pins: Path) -> None:
    _run([sys.executable, "-m", "venv", str(folder)], cwd=ROOT)
    # The pins are complete; without them pip would insist on protobuf < 7 for a part of tritonclient that is not used.
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--requirement", str(pins)]
    _run([str(folder / "bin" / "python"), "-m", "pip", "install", *options], cwd=ROOT)


def _npm_install(folder: Path, wanted: Path) -> None:
    folder.mkdir(parents=True)
    shutil.copy(wanted, folder / "package.json")
    # No lock file, which would record where packages were fetched from; package.json has exact versions.
    _run(["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts", "--silent"], cwd=folder)


def _run(command: list[str], *, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    for one in (*{group: client for client, group in GROUPS.items()}.values(),):
        print(python_of(one))
    print(node_folder())
