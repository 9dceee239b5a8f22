"""The controller deployment: membership, placement, and the only clock. It is asked, it never calls."""

import asyncio
import time
from typing import TypedDict

from cluster.membership import Membership
from experts.placement import Member, Placement

EXPIRE_EVERY_S = 0.5
LONG_POLL_S = 10.0


class ClusterStatus(TypedDict):
    """What `expertmesh status` shows of the members."""

    placement_version: int
    num_groups: int
    missing_groups: list[int]
    members: list[dict[str, object]]


class Controller:
    """One replica. Everything it knows comes from the members' leases, so a restart loses nothing for long."""

    def __init__(self, *, num_groups: int, lease_s: float) -> None:
        # Milliseconds since 1970: later for every start, and far ahead of what counting by ones can reach.
        self._membership = Membership(num_groups=num_groups, lease_s=lease_s, epoch=int(time.time() * 1000))
        self._changed = asyncio.Condition()
        self._sweeper: asyncio.Task[None] | None = None  # begins with the first member, on the loop that serves it

    async def renew(self, member: Member) -> int:
        """Renews or begins a lease; the placement version that holds now."""
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep())
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
        return {
            "placement_version": placement.version,
            "num_groups": placement.num_groups,
            "missing_groups": list(placement.missing_groups),
            "members": [_describe(member) for member in self._membership.members],
        }

    def check_health(self) -> None:
        if self._sweeper is not None and self._sweeper.done():
            raise RuntimeError("the controller's sweep has ended")

    async def _publish(self, changed: bool) -> None:
        if changed:
            async with self._changed:
                self._changed.notify_all()

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
