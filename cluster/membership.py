"""Who is alive, and the placement that follows: pure, the caller owns the clock."""

from experts.placement import Member, Placement, replicas_of


class Membership:
    """Leases by (member id, incarnation). Every change of the expert replicas makes a new placement version."""

    def __init__(self, *, num_groups: int, lease_s: float, epoch: int) -> None:
        """epoch: where versions begin; later for every start of a controller, so that versions never go back."""
        self._lease_s = lease_s
        self._epoch = epoch
        self._leases: dict[tuple[str, int], tuple[Member, float]] = {}  # with the time when it ends
        self._gone: set[tuple[str, int]] = set()  # left for ever: the next start has another incarnation
        # Version 0 is older than any that a router may have: it goes on with what it knows until we know something.
        self.placement = Placement(version=0, num_groups=num_groups)
        self._gather_until_s: float | None = None
        self._gathering = True  # after a start, until every group has a copy or all who live must have said so

    def renew(self, member: Member, *, now_s: float) -> bool:
        """True where this changed the placement. A renewal that comes after its member's `leave` is ignored."""
        key = member.member_id, member.incarnation
        if key not in self._gone:
            self._leases[key] = member, now_s + self._lease_s
        self._gather(now_s)
        return self._rebuild()

    def leave(self, member_id: str, incarnation: int) -> bool:
        """A member says that it goes; True where this changed the placement."""
        self._gone.add((member_id, incarnation))
        self._leases.pop((member_id, incarnation), None)
        return self._rebuild()

    def extend(self, by_s: float) -> None:
        """Every lease ends `by_s` later: for a time in which nobody could renew it."""
        if by_s:
            self._leases = {key: (member, ends_s + by_s) for key, (member, ends_s) in self._leases.items()}

    def expire(self, *, now_s: float) -> bool:
        """Forgets members whose lease has run out; True where this changed the placement."""
        self._leases = {key: lease for key, lease in self._leases.items() if lease[1] > now_s}
        self._gather(now_s)
        return self._rebuild()

    @property
    def members(self) -> list[Member]:
        return sorted((member for member, _ in self._leases.values()), key=lambda m: (m.kind, m.group, m.member_id))

    def _gather(self, now_s: float) -> None:
        if self._gather_until_s is None:
            self._gather_until_s = now_s + self._lease_s
        self._gathering = self._gathering and now_s < self._gather_until_s

    def _rebuild(self) -> bool:
        replicas = replicas_of(member for member, _ in self._leases.values())
        if replicas == self.placement.replicas:
            return False
        placement = Placement(
            version=max(self.placement.version, self._epoch) + 1,
            num_groups=self.placement.num_groups,
            replicas=replicas,
        )
        if self._gathering and placement.missing_groups:
            return False
        self._gathering = False
        self.placement = placement
        return True
