"""Who is alive, and which placement follows: versions only grow, and a restart takes nothing away."""

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.membership import Membership
from experts.placement import Member, Replica

CHECKED = settings(deadline=None, derandomize=True, max_examples=60)


def experts(group: int, incarnation: int = 1, *, name: str | None = None) -> Member:
    return Member(
        kind="experts",
        member_id=name or f"experts-{group}",
        incarnation=incarnation,
        address=f"unix:/{group}-{incarnation}",
        node_id="n",
        pid=1,
        group=group,
        num_experts=8,
    )


def other(kind: str) -> Member:
    return Member(kind=kind, member_id=kind, incarnation=1, address="", node_id="n", pid=2)  # pyright: ignore


def two_groups(*, epoch: int = 1000) -> Membership:
    membership = Membership(num_groups=2, lease_s=5.0, epoch=epoch)
    membership.renew(experts(0), now_s=0.0)
    membership.renew(experts(1), now_s=0.0)
    return membership


def named(membership: Membership) -> list[tuple[str, int]]:
    return [(replica.member_id, replica.incarnation) for replica in membership.placement.replicas]


def test_a_placement_names_the_expert_replicas_and_nobody_else() -> None:
    membership = two_groups()
    version = membership.placement.version
    assert not membership.renew(other("router"), now_s=1.0)
    assert not membership.renew(other("attention"), now_s=1.0)
    assert membership.placement.replicas == (
        Replica(member_id="experts-0", group=0, address="unix:/0-1", incarnation=1),
        Replica(member_id="experts-1", group=1, address="unix:/1-1", incarnation=1),
    )
    assert membership.placement.version == version
    assert [member.kind for member in membership.members] == ["attention", "experts", "experts", "router"]


def test_a_renewal_changes_no_version_and_an_arrival_makes_one() -> None:
    membership = two_groups()
    version = membership.placement.version
    assert not membership.renew(experts(0), now_s=3.0)
    assert membership.placement.version == version
    assert membership.renew(experts(0, name="experts-0b"), now_s=3.0)
    assert membership.placement.version == version + 1


def test_a_lease_that_runs_out_leaves_the_placement() -> None:
    membership = two_groups()
    membership.renew(experts(1), now_s=4.0)
    assert not membership.expire(now_s=4.9)
    assert membership.expire(now_s=5.0)
    assert named(membership) == [("experts-1", 1)]
    assert membership.placement.missing_groups == (0,)
    assert membership.expire(now_s=9.1)
    assert named(membership) == [] and membership.placement.missing_groups == (0, 1)


def test_a_replica_that_was_started_anew_stands_beside_its_former_self_until_that_expires() -> None:
    membership = two_groups()
    assert membership.renew(experts(0, incarnation=2), now_s=2.0)
    assert named(membership) == [("experts-0", 1), ("experts-0", 2), ("experts-1", 1)]
    membership.renew(experts(1), now_s=2.0)
    assert membership.expire(now_s=5.5)
    assert named(membership) == [("experts-0", 2), ("experts-1", 1)]


def test_who_leaves_is_gone_at_once_and_a_late_renewal_does_not_bring_it_back() -> None:
    membership = two_groups()
    assert membership.leave("experts-0", 1)
    assert named(membership) == [("experts-1", 1)]
    assert not membership.leave("experts-0", 1)
    assert not membership.renew(experts(0), now_s=1.0)
    assert named(membership) == [("experts-1", 1)]
    assert membership.renew(experts(0, incarnation=2), now_s=1.0)


def test_leaving_under_another_incarnation_changes_nothing() -> None:
    membership = two_groups()
    assert not membership.leave("experts-0", 99)
    assert not membership.leave("nobody", 1)
    assert len(named(membership)) == 2


def test_a_restarted_controller_never_issues_an_older_version() -> None:
    before = two_groups(epoch=1000)
    for incarnation in range(2, 50):
        before.renew(experts(0, incarnation), now_s=1.0)
    after = two_groups(epoch=2000)
    assert 1000 < before.placement.version < after.placement.version


def test_a_restarted_controller_takes_nothing_away_before_it_knows_who_lives() -> None:
    """A router that already has a placement ignores version 0, and the first real one is complete."""
    after = Membership(num_groups=2, lease_s=5.0, epoch=2000)
    assert after.placement.version == 0
    assert not after.renew(experts(0), now_s=0.0)
    assert after.placement.version == 0
    assert after.renew(experts(1), now_s=0.9)
    assert after.placement.version > 2000 and len(named(after)) == 2


def test_a_group_that_does_not_come_back_holds_the_others_up_for_one_lease_only() -> None:
    after = Membership(num_groups=2, lease_s=5.0, epoch=2000)
    after.renew(experts(0), now_s=0.0)
    assert not after.renew(experts(0), now_s=4.0)
    assert not after.expire(now_s=4.5)
    assert after.expire(now_s=5.0)
    assert named(after) == [("experts-0", 1)]


def test_the_order_of_arrival_does_not_matter() -> None:
    forth, back = (Membership(num_groups=3, lease_s=5.0, epoch=1) for _ in range(2))
    for group in range(3):
        forth.renew(experts(group), now_s=0.0)
        back.renew(experts(2 - group), now_s=0.0)
    assert forth.placement.replicas == back.placement.replicas
    assert forth.placement.of_group(1) == (Replica(member_id="experts-1", group=1, address="unix:/1-1", incarnation=1),)


@CHECKED
@given(
    events=st.lists(
        st.tuples(st.sampled_from(["renew", "leave", "expire"]), st.integers(0, 2), st.integers(1, 3), st.floats(0, 3)),
        max_size=40,
    )
)
def test_versions_only_grow_and_grow_exactly_when_the_replicas_change(
    events: list[tuple[str, int, int, float]],
) -> None:
    membership = Membership(num_groups=3, lease_s=5.0, epoch=100)
    now_s = 0.0
    for what, group, incarnation, seconds in events:
        now_s += seconds
        before = membership.placement
        if what == "renew":
            changed = membership.renew(experts(group, incarnation), now_s=now_s)
        elif what == "leave":
            changed = membership.leave(f"experts-{group}", incarnation)
        else:
            changed = membership.expire(now_s=now_s)
        after = membership.placement
        assert changed == (after.version > before.version) == (after.replicas != before.replicas)
        assert after.version >= before.version
        assert after.version == 0 or after.version > 100
