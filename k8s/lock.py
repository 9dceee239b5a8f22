r"""Writes a requirements file with hashes from the report of a pip installation, which it reads from stdin.

The image's builds take exactly these files. For new versions, on Linux x86-64 with Python 3.11 (what the image has,
since pip chooses files for the machine that it runs on):

    pip install --quiet --dry-run --ignore-installed --only-binary :all: --report - '.[cuda]' \
        | python k8s/lock.py > k8s/requirements-cuda.txt
    pip install --quiet --dry-run --ignore-installed --only-binary :all: --report - '.[cpu]' \
        | python k8s/lock.py --without torchvision torchaudio torchcodec > k8s/requirements-cpu.txt
    pip install --quiet --dry-run --ignore-installed --only-binary :all: --report - hatchling==1.33.0 \
        | python k8s/lock.py > k8s/requirements-build.txt
"""

import argparse
import json
import re
import sys
from collections.abc import Collection, Mapping

HEADER = "# Made by k8s/lock.py: Linux x86-64, Python {python}. Every file that is installed has its hash here.\n"


def requirements(report: Mapping[str, object], *, without: Collection[str] = ()) -> str:
    """One line for each package of the report but the project itself, by name.

    Raises SystemExit for a package without a hash: it came from no index.
    """
    lines: list[str] = []
    installed = report["install"]
    assert isinstance(installed, list)
    for package in installed:
        name, version = canonical(package["metadata"]["name"]), package["metadata"]["version"]
        if name in without or "dir_info" in package["download_info"]:
            continue
        digest = package["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if digest is None:
            raise SystemExit(f"{name} {version} has no sha256 hash: install it from an index")
        lines.append(f"{name}=={version} --hash=sha256:{digest}\n")
    environment = report["environment"]
    assert isinstance(environment, dict)
    return HEADER.format(python=environment["python_version"]) + "".join(sorted(lines))


def canonical(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="requirements with hashes from pip's report on stdin")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="packages to leave out")
    args = parser.parse_args()
    sys.stdout.write(requirements(json.load(sys.stdin), without={canonical(name) for name in args.without}))
