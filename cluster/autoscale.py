"""How many copies each expert group should have, from the load that its replicas report. Pure: no clock, no I/O.

A group's load is the sum of its replicas' busy shares: 1.6 is work for 1.6 replicas that never rest.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Self

from cluster.autoscale_config import AutoscaleConfig

Direction = Literal["up", "down"]
# What a verdict comes from; few and fixed, so that it can be a metric's label.
Cause = Literal["busy", "idle", "bounds", "steady", "waiting", "unseen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The newest load that one running replica has reported."""

    busy_share: float  # 0 to 1
    flops_per_s: float
    at_s: float  # when it arrived, on the clock of `decide`


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """A load that has been outside its band without a break."""

    direction: Direction
    since_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What every group should have, and why. `pressures` goes into the next decision."""

    targets: Mapping[str, int]
    reasons: Mapping[str, str]  # for people; those that change nothing begin with "hold: "
    causes: Mapping[str, Cause]
    pressures: Mapping[str, Pressure] = field(default_factory=dict)


class Verdict(NamedTuple):
    """The decision on one group."""

    target: int
    cause: Cause
    reason: str
    pressure: Pressure | None = None


def decide(
    observed: Mapping[str, Sequence[Report | None]],
    targets: Mapping[str, int],
    pressures: Mapping[str, Pressure],
    config: AutoscaleConfig,
    *,
    now_s: float,
) -> Decision:
    """New targets for all groups of `targets`.

    observed: group -> an entry for each replica that runs, None where it has not reported yet.
    targets: group -> copies that have been asked for so far.
    pressures: those of the last decision; empty at the start.

    Up goes as far as the load asks for, down one copy at a time. Each change needs its delay anew, so a group never
    goes up within up_delay_s, nor down within down_delay_s, of its last change. Bounds are obeyed at once.
    A group with a running replica whose load is not known, or without any, keeps its target.
    """
    verdicts = {
        group: judge(observed.get(group, ()), target, pressures.get(group), config, now_s=now_s)
        for group, target in targets.items()
    }
    return Decision(
        targets={group: verdict.target for group, verdict in verdicts.items()},
        reasons={group: verdict.reason for group, verdict in verdicts.items()},
        causes={group: verdict.cause for group, verdict in verdicts.items()},
        pressures={group: v.pressure for group, v in verdicts.items() if v.pressure is not None},
    )


def judge(
    reports: Sequence[Report | None],
    target: int,
    pressure: Pressure | None,
    config: AutoscaleConfig,
    *,
    now_s: float,
) -> Verdict:
    """The decision on one group; see `decide`."""
    if (bounded := config.bounded(target)) != target:
        limits = f"{config.min_replicas} to {config.max_replicas} copies are allowed"
        return Verdict(bounded, "bounds", f"{limits}: {target} -> {bounded}")
    known = [report for report in reports if report is not None and now_s - report.at_s <= config.late_after_s]
    if len(known) < len(reports) or not known:
        # A break in what is known of the load is also a break in how long it has been what it was.
        return Verdict(target, "unseen", f"hold: {_silence(len(reports), len(known), target)}")
    load = _Load.of(known, target)
    busy = f"busy {load.share:.2f} of {config.target_busy_share:.2f}"
    direction = _direction(load, config)
    if direction is None:
        return Verdict(target, "steady", f"hold: {busy}{_limit(load, config)} ({load.words})")
    since_s = pressure.since_s if pressure is not None and pressure.direction == direction else now_s
    goal = wanted_replicas(load.busy, config) if direction == "up" else target - 1
    delay_s = config.up_delay_s if direction == "up" else config.down_delay_s
    busy += f" for {now_s - since_s:.0f} s"
    if now_s - since_s < delay_s:
        reason = f"hold: {busy} of {delay_s:.0f} s, then {target} -> {goal} ({load.words})"
        return Verdict(target, "waiting", reason, Pressure(direction=direction, since_s=since_s))
    return Verdict(goal, "busy" if direction == "up" else "idle", f"{busy}: {target} -> {goal} ({load.words})")


def wanted_replicas(busy: float, config: AutoscaleConfig) -> int:
    """Copies that would share `busy` (1.0: one replica that never rests) at no more than the target share each."""
    # A sum of shares that is 2.1 but for its last bits must not ask for a fourth copy.
    return config.bounded(math.ceil(busy / config.target_busy_share - 1e-9))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """The load of a group whose running replicas have all reported."""

    busy: float  # sum of their shares
    flops_per_s: float  # likewise
    num_running: int  # at least 1
    target: int

    @classmethod
    def of(cls, reports: Sequence[Report], target: int) -> Self:
        return cls(
            busy=sum(report.busy_share for report in reports),
            flops_per_s=sum(report.flops_per_s for report in reports),
            num_running=len(reports),
            target=target,
        )

    @property
    def share(self) -> float:
        """How busy a running replica is on average."""
        return self.busy / self.num_running

    @property
    def words(self) -> str:
        missing = f" of {self.target}" if self.num_running < self.target else ""
        return f"{self.num_running}{missing} running, {self.flops_per_s / 1e9:.3g} GFLOP/s"


def _direction(load: _Load, config: AutoscaleConfig) -> Direction | None:
    """Where the load presses, if it is outside the band of the target."""
    wanted = wanted_replicas(load.busy, config)
    # With many copies the band is wider than two of them: then the wanted number itself is the limit.
    if wanted > load.target and (load.busy > config.up_busy_share * load.target or wanted > load.target + 1):
        return "up"
    # Where copies are missing and the others are full, nobody can say how much the missing ones would do.
    if load.target == config.min_replicas or load.share > config.up_busy_share:
        return None
    if load.busy < config.down_busy_share * (load.target - 1) or wanted < load.target - 1:
        return "down"
    return None


def _limit(load: _Load, config: AutoscaleConfig) -> str:
    if load.target == config.max_replicas and load.busy > config.up_busy_share * load.target:
        return f", and {config.max_replicas} copies are the most"
    return ""


def _silence(num_running: int, num_known: int, target: int) -> str:
    if not num_running:
        return f"no copy of {target} is running"
    return f"{num_running - num_known} of {num_running} running copies have not reported their load"
