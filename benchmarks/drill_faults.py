"""Does to a running cluster what the script says: kills, stops, slows and cuts, one fault at a time."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.drill_cluster import DrillError, Process, View
from benchmarks.drill_links import cut_links
from benchmarks.drill_plan import Fault, FaultKind
from benchmarks.drill_scale import scale

CUT_EVERY_S = 0.05
SLOW_PERIOD_S, SLOW_SHARE = 0.1, 0.9  # of the time it stands still


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long a fault lasts that ends by itself."""

    stop_s: float
    cut_s: float
    slow_s: float
    scale_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """A fault that has happened."""

    kind: FaultKind
    victim: str
    began_s: float  # on time.monotonic()
    gone: frozenset[int] = frozenset()  # pids that will not come back


def apply(fault: Fault, view: View, lengths: Lengths) -> Applied:
    """Returns when it is over; what it broke may still be broken. Raises DrillError where there is nobody to hit."""
    return _HOW[fault.kind](fault, view, lengths)


def _kill(fault: Fault, name: str, pid: int) -> Applied:
    began_s = time.monotonic()
    _signal(pid, signal.SIGKILL)
    return Applied(kind=fault.kind, victim=name, began_s=began_s, gone=frozenset({pid}))


def _kill_experts(fault: Fault, view: View, lengths: Lengths) -> Applied:
    victim = _experts(fault, view)
    return _kill(fault, str(victim), victim.pid)


def _kill_router(fault: Fault, view: View, lengths: Lengths) -> Applied:
    victim = _router(fault, view)
    return _kill(fault, str(victim), victim.pid)


def _router(fault: Fault, view: View) -> Process:
    """The one that works."""
    return _choose(fault, [member for member in view.members("router") if not member.stands_by])


def _kill_attention(fault: Fault, view: View, lengths: Lengths) -> Applied:
    victim = _choose(fault, view.members("attention"))
    return _kill(fault, str(victim), victim.pid)


def _kill_engine(fault: Fault, view: View, lengths: Lengths) -> Applied:
    engines = sorted(view.engines())
    if not engines:
        raise DrillError(f"{fault.kind}: no engine runs")
    pid = engines[int(fault.pick * len(engines))]
    return _kill(fault, f"engine (pid {pid})", pid)


def _kill_controller(fault: Fault, view: View, lengths: Lengths) -> Applied:
    pid = view.controller()
    if pid is None:
        raise DrillError(f"{fault.kind}: no controller runs")
    return _kill(fault, f"controller (pid {pid})", pid)


def _stop_experts(fault: Fault, view: View, lengths: Lengths) -> Applied:
    victim = _experts(fault, view)
    began_s = time.monotonic()
    try:
        _signal(victim.pid, signal.SIGSTOP)
        time.sleep(lengths.stop_s)
    finally:
        lives = _resume(victim.pid)
    return _over(fault, victim, str(victim), began_s, lives=lives)


def _slow_experts(fault: Fault, view: View, lengths: Lengths) -> Applied:
    victim = _experts(fault, view)
    began_s = time.monotonic()
    lives = True
    try:
        while lives and time.monotonic() - began_s < lengths.slow_s:
            _signal(victim.pid, signal.SIGSTOP)
            time.sleep(SLOW_PERIOD_S * SLOW_SHARE)
            lives = _resume(victim.pid)
            time.sleep(SLOW_PERIOD_S * (1 - SLOW_SHARE))
    finally:
        lives = _resume(victim.pid)
    return _over(fault, victim, str(victim), began_s, lives=lives)


def _cut_experts(fault: Fault, view: View, lengths: Lengths) -> Applied:
    return _cut(fault, _experts(fault, view), lengths)


def _cut_router(fault: Fault, view: View, lengths: Lengths) -> Applied:
    return _cut(fault, _router(fault, view), lengths)


def _cut(fault: Fault, victim: Process, lengths: Lengths) -> Applied:
    """Links are opened again at once, so they are cut again and again."""
    began_s = time.monotonic()
    num_cut, lives = 0, True
    while lives and time.monotonic() - began_s < lengths.cut_s:
        try:
            num_cut += cut_links(victim.pid, victim.address)
        except ProcessLookupError:
            lives = False
        time.sleep(CUT_EVERY_S)
    if not num_cut:
        raise DrillError(f"{fault.kind}: {victim} has no connection at {victim.address}, so there was nothing to cut")
    return _over(fault, victim, f"{victim}, {num_cut} links", began_s, lives=lives)


def _scale_experts(fault: Fault, view: View, lengths: Lengths) -> Applied:
    began_s = time.monotonic()
    usual = view.size.replicas
    try:
        scale(view, usual + 1, timeout_s=lengths.scale_timeout_s)
    finally:
        scale(view, usual, timeout_s=lengths.scale_timeout_s)
    return Applied(kind=fault.kind, victim=f"every group, {usual} to {usual + 1} and back", began_s=began_s)


_HOW: dict[FaultKind, Callable[[Fault, View, Lengths], Applied]] = {
    "experts-kill": _kill_experts,
    "experts-stop": _stop_experts,
    "experts-cut": _cut_experts,
    "experts-slow": _slow_experts,
    "experts-scale": _scale_experts,
    "router-kill": _kill_router,
    "router-cut": _cut_router,
    "engine-kill": _kill_engine,
    "attention-kill": _kill_attention,
    "controller-kill": _kill_controller,
}


def _experts(fault: Fault, view: View) -> Process:
    return _choose(fault, sorted(view.members("experts"), key=lambda member: (member.group, member.member_id)))


def _choose(fault: Fault, members: Sequence[Process]) -> Process:
    if not members:
        raise DrillError(f"{fault.kind}: there is nobody to hit")
    return members[int(fault.pick * len(members))]


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        raise DrillError(f"process {pid} ended before it could be sent {number.name}") from None


def _resume(pid: int) -> bool:
    """False where there is nobody to resume: Serve has replaced it meanwhile."""
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return False
    return True


def _over(fault: Fault, victim: Process, name: str, began_s: float, *, lives: bool) -> Applied:
    gone = frozenset() if lives else frozenset({victim.pid})
    return Applied(kind=fault.kind, victim=name, began_s=began_s, gone=gone)
