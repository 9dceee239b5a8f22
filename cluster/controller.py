"""The controller deployment: membership, placement, and the only clock. It is asked, it never calls."""

import asyncio
import logging
import time
from typing import TypedDict

from cluster.autoscale_policy import Note, read_notes
from cluster.exporter import OFF, Publisher
from cluster.membership import Membership
from cluster.metrics import ControllerMetrics
from experts.member import own_ids
from experts.placement import Member, Placement

log = logging.getLogger(__name__)

EXPIRE_EVERY_S = 0.5
COUNT_EVERY_S = 2.0
LONG_POLL_S = 10.0


class GroupStatus(TypedDict):
    """One expert group: how many copies are in the placement, how many there should be, and why."""

    group: int
    copies: int
    target: int | None  # None, as the other two, while the policy has not said anything
    reason: str | None
    last_change: str | None


class ClusterStatus(TypedDict):
    """What `expertmesh status` shows of the members."""

    placement_version: int
    num_groups: int
    missing_groups: list[int]
    groups: list[GroupStatus]
    members: list[dict[str, object]]


class Controller:
    """One replica. Everything it knows comes from the members' leases, so a restart loses nothing for long."""

    def __init__(self, *, num_groups: int, lease_s: float, publisher: Publisher = OFF) -> None:
        # Milliseconds since 1970: later for every start, and far ahead of what counting by ones can reach.
        self._membership = Membership(num_groups=num_groups, lease_s=lease_s, epoch=int(time.time() * 1000))
        self._metrics = ControllerMetrics(num_groups)
        publisher(own_ids()[0], self._metrics)
        self._changed = asyncio.Condition()
        # Both begin with the first member, on the loop that serves it.
        self._sweeper: asyncio.Task[None] | None = None
        self._counter: asyncio.Task[None] | None = None

    async def renew(self, member: Member) -> int:
        """Renews or begins a lease; the placement version that holds now."""
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep())
            self._counter = asyncio.create_task(self._count_scale_changes())
        await self._publish(self._membership.renew(member, now_s=time.monotonic()))
        return self._membership.placement.version

    async def leave(self, member_id: str, incarnation: int) -> None:
        await self._publish(self._membership.leave(member_id, incarnation))

    async def newer_placement(self, known_version: int) -> Placement | None:
        """The placement as soon as it is not `known_version`; None after LONG_POLL_S without a change."""
        async with self._changed:
            try:
                async with asyncio.timeout(LONG_POLL_S):
                    await self._changed.wait_for(lambda: self._membership.placement.version != known_version)
            except TimeoutError:
                return None
        return self._membership.placement

    async def status(self) -> ClusterStatus:
        placement = self._membership.placement
        notes = await self._notes()
        return {
            "placement_version": placement.version,
            "num_groups": placement.num_groups,
            "missing_groups": list(placement.missing_groups),
            "groups": [_group(placement, group, notes.get(group)) for group in range(placement.num_groups)],
            "members": [_describe(member) for member in self._membership.members],
        }

    def check_health(self) -> None:
        if self._sweeper is not None and self._sweeper.done():
            raise RuntimeError("the controller's sweep has ended")

    async def _publish(self, changed: bool) -> None:
        if changed:
            async with self._changed:
                self._changed.notify_all()

    async def _notes(self) -> dict[int, Note]:
        """By group: why it has as many copies as it has."""
        names = {f"experts-{group}": group for group in range(self._membership.placement.num_groups)}
        notes = await asyncio.to_thread(read_notes, names)
        return {names[name]: note for name, note in notes.items()}

    async def _count_scale_changes(self) -> None:
        while True:
            await asyncio.sleep(COUNT_EVERY_S)
            try:
                notes = await self._notes()
            except Exception as error:  # Ray's store is away: the next time tells what has happened meanwhile
                log.warning("scale decisions not counted", extra={"reason": str(error)[:200]})
                continue
            for group, note in notes.items():
                self._metrics.on_scale_changes(group, note["changes"])

    async def _sweep(self) -> None:
        due_s = time.monotonic()
        while True:
            await asyncio.sleep(EXPIRE_EVERY_S)
            now_s = time.monotonic()
            late_s = max(now_s - due_s - EXPIRE_EVERY_S, 0.0)
            due_s = now_s
            # Renewals that wait behind our own delay are as late as we are.
            self._membership.extend(late_s)
            await self._publish(self._membership.expire(now_s=now_s))
            self._metrics.on_sweep(self._membership.members, self._membership.placement)


def _group(placement: Placement, group: int, note: Note | None) -> GroupStatus:
    return {
        "group": group,
        "copies": len(placement.of_group(group)),
        "target": None if note is None else note["target"],
        "reason": None if note is None else note["reason"],
        "last_change": None if note is None else note["last_change"],
    }


def _describe(member: Member) -> dict[str, object]:
    described: dict[str, object] = {
        "kind": member.kind,
        "member_id": member.member_id,
        "pid": member.pid,
        "node_id": member.node_id,
        "address": member.address,
    }
    if member.kind == "experts":
        described |= {"group": member.group, "first_expert": member.first_expert, "num_experts": member.num_experts}
    return described | dict(member.details)
