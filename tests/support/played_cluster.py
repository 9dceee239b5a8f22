"""A cluster that is only arithmetic: replicas that take time to start, share their group's work, and report it.

It drives the real meter (experts/load) and the real decision (cluster/autoscale).
"""

import math
import random
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from played_load import Work

from cluster.autoscale import Pressure, Report, decide
from cluster.autoscale_config import AutoscaleConfig
from experts.load import LoadMeter

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What the cluster is like, apart from its load."""

    step_s: float = 1.0  # between two decisions
    start_s: float = 30.0  # until a new replica serves; each takes 0.7 to 1.3 times as long
    backlog_s: float = 5.0  # work that may wait; attention asks for no more than that ahead
    lost: float = 0.01  # share of the reports that do not arrive
    dies_every_s: float = math.inf  # of one replica, on average; it is started anew
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What became of it, one row per step."""

    step_s: float
    targets: Counts  # [num_steps, num_groups]
    ideal: Counts  # likewise: what the work without its noise asks for
    reasons: list[str] = field(default_factory=list)  # of the changes

    def after(self, skipped_s: float) -> "History":
        skipped = int(skipped_s / self.step_s)
        return History(step_s=self.step_s, targets=self.targets[skipped:], ideal=self.ideal[skipped:])

    @property
    def near_ideal(self) -> NDArray[np.floating]:
        """[num_groups] share of the time in which the target was within one copy of the ideal."""
        return (np.abs(self.targets - self.ideal) <= 1).mean(axis=0)

    @property
    def num_changes(self) -> Counts:
        """[num_groups] changes of the target."""
        return (np.diff(self.targets, axis=0) != 0).sum(axis=0)

    @property
    def changes_in_5_min(self) -> NDArray[np.floating]:
        """[num_groups] changes of the target per 300 s."""
        return self.num_changes * (300.0 / (self.step_s * len(self.targets)))


@dataclass(slots=True)
class _Replica:
    meter: LoadMeter
    ready_s: float
    report: Report | None = None


class PlayedCluster:
    """Replicas of all groups; `play` is the whole of its life."""

    def __init__(self, config: AutoscaleConfig, world: World) -> None:
        self._config = config
        self._world = world
        self._random = random.Random(world.seed)

    def play(self, work: Work, noisy: Work, *, initial: Counts | None = None) -> History:
        """work: what is asked for without noise, for the ideal; noisy: what comes in. initial: copies at the start."""
        ideal = self.ideal(work)
        counts = initial if initial is not None else np.full(work.shape[1], self._config.min_replicas)
        groups = [[self._replica(now_s=0.0, delay_s=0.0) for _ in range(count)] for count in counts]
        backlog = [0.0] * len(groups)
        targets = {str(group): int(count) for group, count in enumerate(counts)}
        pressures: dict[str, Pressure] = {}
        history = np.empty_like(ideal)
        reasons: list[str] = []
        for step, offered in enumerate((noisy * self._world.step_s).tolist()):
            now_s = (step + 1) * self._world.step_s
            observed = {}
            for group, replicas in enumerate(groups):
                ready = [replica for replica in replicas if replica.ready_s <= now_s]
                backlog[group] = self._serve(ready, backlog[group] + offered[group], now_s)
                observed[str(group)] = [replica.report for replica in ready]
            decision = decide(observed, targets, pressures, self._config, now_s=now_s)
            pressures = dict(decision.pressures)
            for group, target in decision.targets.items():
                if target != targets[group]:
                    reasons.append(f"{now_s:.0f} s: {group}: {decision.reasons[group]}")
                    targets[group] = target
                self._scale(groups[int(group)], target, now_s)
            history[step] = [targets[str(group)] for group in range(len(groups))]
        return History(step_s=self._world.step_s, targets=history, ideal=ideal, reasons=reasons)

    def ideal(self, work: Work) -> Counts:
        """[num_steps, num_groups] copies that would carry the work at the target share."""
        wanted = np.ceil(work / self._config.target_busy_share - 1e-9).astype(np.int64)
        return np.clip(wanted, self._config.min_replicas, self._config.max_replicas)

    def _serve(self, ready: list[_Replica], asked_s: float, now_s: float) -> float:
        """The replicas that are there share the work; what is left of it waits, up to a limit."""
        step_s = self._world.step_s
        each_s = min(asked_s / len(ready), step_s) if ready else 0.0
        for replica in ready:
            begin_s = now_s - step_s
            replica.meter.add(begin_s, begin_s + each_s, int(1000 * each_s))
            if self._random.random() >= self._world.lost:
                load = replica.meter.read(now_s)
                replica.report = Report(busy_share=load.busy_share, flops_per_s=load.flops_per_s, at_s=now_s)
        return min(asked_s - each_s * len(ready), self._world.backlog_s)

    def _scale(self, replicas: list[_Replica], target: int, now_s: float) -> None:
        replicas[:] = [replica for replica in replicas if not self._dies()]
        while len(replicas) < target:
            replicas.append(self._replica(now_s=now_s, delay_s=self._world.start_s))
        del replicas[target:]

    def _dies(self) -> bool:
        return self._random.random() < self._world.step_s / self._world.dies_every_s

    def _replica(self, *, now_s: float, delay_s: float) -> _Replica:
        ready_s = now_s + delay_s * self._random.uniform(0.7, 1.3)
        meter = LoadMeter(flops_per_pair=1e6, window_s=self._config.window_s, now_s=ready_s)
        return _Replica(meter=meter, ready_s=ready_s)
