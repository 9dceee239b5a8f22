"""Who holds which experts: an immutable, versioned snapshot built from the members that are alive."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

MemberKind = Literal["experts", "router", "attention"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """What a replica says of itself each time it renews its lease."""

    kind: MemberKind
    member_id: str
    incarnation: int  # fresh for every process start
    address: str  # of its data plane; "" for attention, which only asks
    node_id: str
    pid: int
    group: int = -1  # expert groups only
    first_expert: int = 0  # global id; it holds this one and the num_experts - 1 after it
    num_experts: int = 0  # held per MoE layer
    details: tuple[tuple[str, str], ...] = ()  # for people: shown by `expertmesh status`


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One copy of an expert group, as a router needs to know it."""

    member_id: str
    group: int
    address: str
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A snapshot; `version` grows with every change and never goes back, not even over a controller's restart."""

    version: int
    num_groups: int
    replicas: tuple[Replica, ...] = ()
    _by_group: dict[int, tuple[Replica, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Asked for with every message of the hot path.
        by_group: dict[int, tuple[Replica, ...]] = {}
        for replica in self.replicas:
            by_group[replica.group] = (*by_group.get(replica.group, ()), replica)
        object.__setattr__(self, "_by_group", by_group)

    def of_group(self, group: int) -> tuple[Replica, ...]:
        return self._by_group.get(group, ())

    @property
    def missing_groups(self) -> tuple[int, ...]:
        """Groups without a single copy."""
        held = {replica.group for replica in self.replicas}
        return tuple(group for group in range(self.num_groups) if group not in held)


def replicas_of(members: Iterable[Member]) -> tuple[Replica, ...]:
    """The expert replicas among `members`, in an order that does not depend on who registered first."""
    found = [
        Replica(member_id=m.member_id, group=m.group, address=m.address, incarnation=m.incarnation)
        for m in members
        if m.kind == "experts"
    ]
    return tuple(sorted(found, key=lambda replica: (replica.group, replica.member_id, replica.incarnation)))
