"""The script of a drill: which faults, in which order, all from one seed. Pure."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

FaultKind = Literal[
    "experts-kill",  # SIGKILL for an expert replica
    "experts-stop",  # SIGSTOP for an expert replica, and SIGCONT some seconds later
    "experts-cut",  # every link of an expert replica is cut, again and again for some seconds; its process goes on
    "experts-slow",  # an expert replica that runs for a tenth of the time, for some seconds
    "experts-scale",  # `expertmesh up` with one more copy of every group, and then with the old number
    "router-kill",
    "router-cut",  # as experts-cut, for the links of the attention engines to the router
    "engine-kill",  # SIGKILL for vLLM's process below an attention replica
    "attention-kill",  # SIGKILL for the actor above it
    "controller-kill",
]
KINDS: tuple[FaultKind, ...] = get_args(FaultKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One entry of the script."""

    kind: FaultKind
    pick: float  # 0 to below 1: which of those that it may hit, in their order


def make_plan(kinds: Sequence[FaultKind], *, times: int, seed: int) -> list[Fault]:
    """Each kind `times` times, shuffled; the same for the same arguments."""
    rng = random.Random(f"faults {seed}")
    shuffled: list[FaultKind] = [kind for kind in kinds for _ in range(times)]
    rng.shuffle(shuffled)
    return [Fault(kind=kind, pick=rng.random()) for kind in shuffled]
