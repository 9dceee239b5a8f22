"""Who is alive, and the placement that follows: pure, the caller owns the clock."""

from experts.placement import Member, Placement, replicas_of


class Membership:
    """Leases by (member id, incarnation). Every change of the expert replicas makes a new placement version."""

    def __init__(self, *, num_groups: int, lease_s: float, epoch: int) -> None:
        """epoch: where versions begin; later for every start of a controller, so that versions never go back."""
        self._lease_s = lease_s
        self._leases: dict[tuple[str, int], tuple[Member, float]] = {}  # with the time when it ends
        self.placement = Placement(version=epoch, num_groups=num_groups)

    def renew(self, member: Member, *, now_s: float) -> bool:
        """True where this changed the placement."""
        self._leases[member.member_id, member.incarnation] = member, now_s + self._lease_s
        return self._rebuild()

    def leave(self, member_id: str, incarnation: int) -> bool:
        """A member says that it goes; True where this changed the placement."""
        self._leases.pop((member_id, incarnation), None)
        return self._rebuild()

    def expire(self, *, now_s: float) -> bool:
        """Forgets members whose lease has run out; True where this changed the placement."""
        self._leases = {key: lease for key, lease in self._leases.items() if lease[1] > now_s}
        return self._rebuild()

    @property
    def members(self) -> list[Member]:
        return sorted((member for member, _ in self._leases.values()), key=lambda m: (m.kind, m.group, m.member_id))

    def _rebuild(self) -> bool:
        replicas = replicas_of(member for member, _ in self._leases.values())
        if replicas == self.placement.replicas:
            return False
        self.placement = Placement(
            version=self.placement.version + 1, num_groups=self.placement.num_groups, replicas=replicas
        )
        return True
