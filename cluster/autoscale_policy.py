"""The decision of cluster/autoscale as a policy of Serve's, and the notes that explain it to the rest of the cluster.

A policy runs in Serve's controller process, on its event loop, about ten times a second for each deployment: it must
not wait, and it must not raise, since nothing of the application could be deployed or scaled then.
Serve carries this module there by value, so its classes are made anew in that process; what it imports must be
importable there.
"""

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypedDict

from cluster.autoscale import Direction, Pressure, Report, Verdict, judge
from cluster.autoscale_config import AutoscaleConfig
from experts.load import BUSY_SHARE, FLOPS_PER_S

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

log = logging.getLogger("ray.serve")  # what goes into the file of Serve's controller

NOTE_EVERY_S = 5.0
NOTE_VALID_S = 60.0  # an older one is of a policy that no longer runs
ERROR_EVERY_S = 60.0
_NAMESPACE = "expertmesh"

Seen = dict[str, tuple[float, float]]  # replica -> (timestamp of its newest report, when we first saw that)


class Note(TypedDict):
    """Why a deployment has as many replicas as it has."""

    target: int
    reason: str  # of the newest decision, mostly to hold
    last_change: str | None  # the reason of the newest change
    changes: dict[str, int]  # direction and cause, as in "up busy" -> changes of the target since this policy began
    at_s: float  # since 1970


class ExpertLoadPolicy:
    """The policy of one expert group's deployment. settings: those of AutoscaleConfig.

    Bounds come from Serve, where they can be changed while the cluster runs. Serve's own delays belong at 0.
    """

    def __init__(self, **settings: float) -> None:
        self._config = AutoscaleConfig.model_validate(settings)
        self._notes = Notes()
        self._quiet_until_s = 0.0

    def __call__(self, ctx: "AutoscalingContext") -> tuple[int, dict[str, object]]:
        """The target of the context's deployment, and the state that comes back with the next context."""
        now_s = time.monotonic()
        try:
            return self.decide(ctx, now_s=now_s)
        except Exception:
            if now_s >= self._quiet_until_s:
                self._quiet_until_s = now_s + ERROR_EVERY_S
                log.exception(f"{ctx.deployment_name}: no autoscaling decision, its target is kept")
            return ctx.target_num_replicas, ctx.policy_state

    def decide(self, ctx: "AutoscalingContext", *, now_s: float) -> tuple[int, dict[str, object]]:
        """The same at a time of the caller's, and not caught."""
        reports, seen = reports_of(ctx, ctx.policy_state.get("seen", {}), now_s=now_s)
        pressure: Pressure | None = ctx.policy_state.get("pressure")
        verdict = judge(reports, ctx.target_num_replicas, pressure, self._bounded(ctx), now_s=now_s)
        if verdict.target != ctx.target_num_replicas:
            log.info(f"{ctx.deployment_name}: {verdict.reason}")
            self._notes.change(verdict, "up" if verdict.target > ctx.target_num_replicas else "down")
        self._notes.post(ctx.deployment_name, verdict)
        return verdict.target, {"seen": seen, "pressure": verdict.pressure}

    def _bounded(self, ctx: "AutoscalingContext") -> AutoscaleConfig:
        bounds = {
            "min_replicas": ctx.capacity_adjusted_min_replicas,
            "max_replicas": ctx.capacity_adjusted_max_replicas,
        }
        return self._config.model_copy(update=bounds)


def reports_of(ctx: "AutoscalingContext", seen: Seen, *, now_s: float) -> tuple[list[Report | None], Seen]:
    """What each running replica has reported, and `seen` for the next call.

    A report's timestamp is of the replica's clock, which may be another node's: its age is counted from when it was
    first seen here.
    """
    raw = ctx.raw_metrics or {}
    busy_share, flops_per_s = raw.get(BUSY_SHARE, {}), raw.get(FLOPS_PER_S, {})
    reports: list[Report | None] = []
    now_seen: Seen = {}
    for replica in ctx.running_replicas:
        series, flops = busy_share.get(replica), flops_per_s.get(replica)
        if not series or not flops:
            reports.append(None)
            continue
        newest_s, first_s = series[-1].timestamp, now_s
        if (before := seen.get(replica.unique_id)) is not None and before[0] == newest_s:
            first_s = before[1]
        now_seen[replica.unique_id] = newest_s, first_s
        reports.append(Report(busy_share=series[-1].value, flops_per_s=flops[-1].value, at_s=first_s))
    return reports, now_seen


class Notes:
    """Puts what one policy decides where every process of the cluster can read it."""

    def __init__(self) -> None:
        self._changes: Counter[str] = Counter()
        self._last_change: str | None = None
        self._shown: tuple[int, str] | None = None  # target and cause
        self._due_s = 0.0
        self._writer: threading.Thread | None = None

    def change(self, verdict: Verdict, direction: Direction) -> None:
        """The target is another from now on."""
        self._changes[f"{direction} {verdict.cause}"] += 1
        self._last_change = verdict.reason

    def post(self, deployment: str, verdict: Verdict) -> None:
        """Writes a note when something is new in it, and now and then so that its numbers are. Never waits."""
        now_s = time.monotonic()
        shown = verdict.target, verdict.cause
        if (shown == self._shown and now_s < self._due_s) or (self._writer is not None and self._writer.is_alive()):
            return
        self._shown, self._due_s = shown, now_s + NOTE_EVERY_S
        note: Note = {
            "target": verdict.target,
            "reason": verdict.reason,
            "last_change": self._last_change,
            "changes": dict(self._changes),
            "at_s": time.time(),
        }
        # Of its own thread, since Ray's store may be away for a while.
        self._writer = threading.Thread(target=_put, args=(deployment, note), daemon=True, name="autoscale-note")
        self._writer.start()


def read_notes(deployments: Iterable[str]) -> dict[str, Note]:
    """The notes on these deployments that are not out of date. Waits for Ray's store: not for an event loop."""
    from ray.experimental.internal_kv import _internal_kv_get

    found = {name: _internal_kv_get(f"autoscale/{name}", namespace=_NAMESPACE) for name in deployments}
    notes: Mapping[str, Note] = {name: json.loads(note) for name, note in found.items() if note}
    return {name: note for name, note in notes.items() if time.time() - note["at_s"] < NOTE_VALID_S}


def _put(deployment: str, note: Note) -> None:
    # Ray's key-value store, where Serve keeps its own state; Ray has no public name for it.
    from ray.experimental.internal_kv import _internal_kv_put

    try:
        _internal_kv_put(f"autoscale/{deployment}", json.dumps(note), namespace=_NAMESPACE)
    except Exception as error:  # explains nothing then, and decides all the same
        log.warning(f"the reason of {deployment}'s target was not written down: {error}")
