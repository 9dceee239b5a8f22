"""The setups that bench_serving compares, the processes they are made of, and which of them fit into memory."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from experts.errors import ConfigError

BASELINE, TENSOR_PARALLEL = "vllm", "vllm-tp2"
DEFAULT_SETUPS = (BASELINE, TENSOR_PARALLEL, "D=2", "D=4", "D=8", "D=4 x2")
TP_SIZE = 2
_SPLIT = re.compile(r"D=(\d+)(?: ?x(\d+))?")

Kind = Literal["vllm", "vllm-tp2", "attention", "router", "experts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One process of a setup. Setups with the same D have a plane in common: they never run at the same time."""

    kind: Kind
    num_groups: int = 0  # D of its data plane; 0: it has none
    index: int = 0  # which engine, or which expert group
    num_engines: int = 1  # that share an engine's threads with it

    @property
    def name(self) -> str:
        if not self.num_groups:
            return self.kind
        number = "" if self.kind == "router" else f"-{self.index}"
        of = f" x{self.num_engines}" if self.num_engines > 1 else ""
        return f"D={self.num_groups}{of} {self.kind}{number}"

    def share_of(self, threads: int) -> int:
        """An engine's part of the threads of all: engines that share the streams share the cores."""
        return max(threads // self.num_engines, 1)

    @property
    def is_engine(self) -> bool:
        return self.kind not in ("router", "experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One way to serve the checkpoint."""

    name: str
    num_groups: int = 0  # D; 0: vLLM as it was installed
    num_engines: int = 1

    @property
    def members(self) -> tuple[Member, ...]:
        """Its processes, those first that others wait for."""
        if self.name == BASELINE:
            return (Member(kind="vllm"),)
        if self.name == TENSOR_PARALLEL:
            return (Member(kind="vllm-tp2"),)
        groups = [Member(kind="experts", num_groups=self.num_groups, index=g) for g in range(self.num_groups)]
        return (*groups, Member(kind="router", num_groups=self.num_groups), *self.engines)

    @property
    def engines(self) -> tuple[Member, ...]:
        """The processes that take requests."""
        if not self.num_groups:
            return self.members
        return tuple(
            Member(kind="attention", num_groups=self.num_groups, index=i, num_engines=self.num_engines)
            for i in range(self.num_engines)
        )


def parse_setup(name: str) -> Setup:
    """From `vllm`, `vllm-tp2`, `D=4` or `D=4 x2`. Raises ConfigError."""
    if name in (BASELINE, TENSOR_PARALLEL):
        return Setup(name=name)
    match = _SPLIT.fullmatch(name)
    groups, engines = (int(match[1]), int(match[2] or 1)) if match else (0, 0)
    if not groups or not engines:
        raise ConfigError(f"there is no setup {name!r}; choose {BASELINE}, {TENSOR_PARALLEL}, D=4 or D=4 x2 (any D, x)")
    suffix = f" x{engines}" if engines > 1 else ""
    return Setup(name=f"D={groups}{suffix}", num_groups=groups, num_engines=engines)


def members_of(setups: Iterable[Setup]) -> tuple[Member, ...]:
    """Every process of these setups once."""
    return tuple(dict.fromkeys(member for setup in setups for member in setup.members))


def fitting(
    setups: Sequence[Setup], bytes_of: Callable[[Member], int], free_bytes: int
) -> tuple[tuple[Setup, ...], tuple[Setup, ...]]:
    """The setups that fit into memory together, and those left out: always the one that frees the most.

    The baseline is kept, since everything is compared with it. Raises ConfigError where not even one setup fits.
    """

    def needed(of: Iterable[Setup]) -> int:
        return sum(bytes_of(member) for member in members_of(of))

    kept = list(setups)
    dropped: list[Setup] = []
    while needed(kept) > free_bytes:
        removable = [setup for setup in kept if setup.name != BASELINE]
        if not removable or len(kept) == 1:
            raise ConfigError(
                f"{kept[0].name} alone needs about {needed(kept) / 2**30:.1f} GiB of memory, and "
                f"{free_bytes / 2**30:.1f} GiB may be used: choose a smaller checkpoint, or end other programs"
            )
        smallest_rest = min(removable, key=lambda setup: needed(other for other in kept if other is not setup))
        kept.remove(smallest_rest)
        dropped.append(smallest_rest)
    return tuple(kept), tuple(dropped)


def tensor_parallel_cores(cores: Sequence[int], threads: int) -> str:
    """vLLM's notation of which cores each of the two ranks gets: `0|1`, or `0,1|2,3`.

    cores: that this process may use; threads: of both ranks together.
    Raises ConfigError where they cannot be halved.
    """
    if threads % TP_SIZE or threads > len(cores):
        raise ConfigError(
            f"{TENSOR_PARALLEL} needs an even number of threads, and as many cores: --baseline-threads is {threads}, "
            f"and there are {len(cores)} cores; change it, or leave {TENSOR_PARALLEL} out of --setups"
        )
    each = threads // TP_SIZE
    ranks = [sorted(cores)[rank * each : (rank + 1) * each] for rank in range(TP_SIZE)]
    return "|".join(",".join(map(str, rank)) for rank in ranks)
