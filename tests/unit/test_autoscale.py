"""What the autoscaler decides on each kind of load, and whether its sentences say why."""

from dataclasses import replace

import pytest
from pydantic import ValidationError

from cluster.autoscale import Decision, Pressure, Report, decide, wanted_replicas
from cluster.autoscale_config import AutoscaleConfig

CONFIG = AutoscaleConfig(max_replicas=4)


def report(busy_share: float, *, at_s: float = 1000.0) -> Report:
    return Report(busy_share=busy_share, flops_per_s=2e9, at_s=at_s)


def decided(
    target: int,
    *shares: float | None,
    pressure: Pressure | None = None,
    config: AutoscaleConfig = CONFIG,
    now_s: float = 1000.0,
) -> Decision:
    """The decision on one group, g3, whose running replicas have just reported `shares`; None: nothing yet."""
    reports = [None if share is None else report(share, at_s=now_s) for share in shares]
    return decide({"g3": reports}, {"g3": target}, {"g3": pressure} if pressure else {}, config, now_s=now_s)


def up(since_s: float) -> Pressure:
    return Pressure(direction="up", since_s=since_s)


def down(since_s: float) -> Pressure:
    return Pressure(direction="down", since_s=since_s)


# Up.


def test_a_busy_group_gets_a_copy_after_the_delay() -> None:
    decision = decided(1, 0.92, pressure=up(969.0))
    assert decision.targets == {"g3": 2}
    assert decision.reasons == {"g3": "busy 0.92 of 0.70 for 31 s: 1 -> 2 (1 running, 2 GFLOP/s)"}
    assert decision.causes == {"g3": "busy"}


def test_until_then_it_waits_and_says_for_how_long() -> None:
    first = decided(1, 0.92)
    assert first.targets == {"g3": 1} and first.pressures == {"g3": up(1000.0)}
    assert first.reasons == {"g3": "hold: busy 0.92 of 0.70 for 0 s of 30 s, then 1 -> 2 (1 running, 2 GFLOP/s)"}
    assert first.causes == {"g3": "waiting"}
    later = decide({"g3": [report(0.92, at_s=1029.0)]}, first.targets, first.pressures, CONFIG, now_s=1029.0)
    assert later.targets == {"g3": 1} and later.pressures == first.pressures
    last = decide({"g3": [report(0.92, at_s=1030.0)]}, later.targets, later.pressures, CONFIG, now_s=1030.0)
    assert last.targets == {"g3": 2}


def test_a_moment_within_the_band_begins_the_delay_anew() -> None:
    assert decided(1, 0.79, pressure=up(900.0)).pressures == {}
    assert decided(1, 0.92, pressure=down(0.0)).pressures == {"g3": up(1000.0)}


def test_up_goes_as_far_as_the_load_asks_for() -> None:
    assert decided(2, 0.95, 1.0, pressure=up(0.0)).targets == {"g3": 3}
    many = CONFIG.model_copy(update={"max_replicas": 20})
    assert decided(8, *[1.0] * 8, pressure=up(0.0), config=many).targets == {"g3": 12}


def test_after_a_change_the_delay_begins_anew() -> None:
    assert decided(1, 0.92, pressure=up(0.0)).pressures == {}


def test_at_the_most_copies_it_says_so() -> None:
    decision = decided(4, 0.9, 1.0, 1.0, 0.9, pressure=up(0.0))
    assert decision.targets == {"g3": 4}
    assert decision.reasons == {"g3": "hold: busy 0.95 of 0.70, and 4 copies are the most (4 running, 8 GFLOP/s)"}


# Down.


def test_an_idle_group_gives_back_one_copy_at_a_time() -> None:
    decision = decided(3, 0.1, 0.2, 0.15, pressure=down(800.0))
    assert decision.targets == {"g3": 2}
    assert decision.reasons == {"g3": "busy 0.15 of 0.70 for 200 s: 3 -> 2 (3 running, 6 GFLOP/s)"}
    assert decision.causes == {"g3": "idle"} and decision.pressures == {}


def test_a_copy_is_kept_while_the_others_would_be_too_busy_without_it() -> None:
    assert decided(2, 0.31, 0.31, pressure=down(0.0)).causes == {"g3": "steady"}
    assert decided(2, 0.29, 0.29, pressure=down(0.0)).targets == {"g3": 1}


def test_the_least_number_of_copies_stays() -> None:
    assert decided(1, 0.0, pressure=down(0.0)).targets == {"g3": 1}
    two = CONFIG.model_copy(update={"min_replicas": 2})
    assert decided(2, 0.0, 0.0, pressure=down(0.0), config=two).targets == {"g3": 2}


# Bounds.


@pytest.mark.parametrize(("target", "bounded"), [(9, 4), (0, 1)])
def test_bounds_are_obeyed_at_once_even_where_the_load_is_not_known(target: int, bounded: int) -> None:
    decision = decided(target, None, pressure=up(0.0))
    assert decision.targets == {"g3": bounded} and decision.causes == {"g3": "bounds"}
    assert decision.reasons == {"g3": f"1 to 4 copies are allowed: {target} -> {bounded}"}


# What is not known.


def test_a_running_replica_without_a_report_holds_the_target() -> None:
    for pressure in (up(0.0), down(0.0)):
        decision = decided(2, 1.0, None, pressure=pressure)
        assert decision.targets == {"g3": 2} and decision.pressures == {}
        assert decision.reasons == {"g3": "hold: 1 of 2 running copies have not reported their load"}
        assert decision.causes == {"g3": "unseen"}


def test_a_report_that_is_late_counts_as_none() -> None:
    late = {"g3": [report(0.0, at_s=989.9), report(0.0)]}
    assert decide(late, {"g3": 2}, {"g3": down(0.0)}, CONFIG, now_s=1000.0).causes == {"g3": "unseen"}
    in_time = {"g3": [report(0.0, at_s=990.0), report(0.0)]}
    assert decide(in_time, {"g3": 2}, {"g3": down(0.0)}, CONFIG, now_s=1000.0).causes == {"g3": "idle"}


def test_a_group_without_a_running_replica_is_not_an_idle_one() -> None:
    assert decided(2, pressure=down(0.0)).reasons == {"g3": "hold: no copy of 2 is running"}
    assert decide({}, {"g3": 2}, {"g3": down(0.0)}, CONFIG, now_s=1000.0).targets == {"g3": 2}


def test_a_full_copy_whose_peers_are_missing_is_not_too_little_load() -> None:
    decision = decided(3, 1.0, pressure=down(0.0))
    assert decision.targets == {"g3": 3}
    assert decision.reasons == {"g3": "hold: busy 1.00 of 0.70 (1 of 3 running, 2 GFLOP/s)"}


def test_copies_that_cannot_start_are_given_up_when_the_others_suffice() -> None:
    assert decided(3, 0.3, 0.2, pressure=down(0.0)).targets == {"g3": 2}


# Groups.


def test_each_group_is_decided_by_its_own_load() -> None:
    observed = {"g0": [report(1.0)], "g1": [report(0.1), report(0.1)], "g2": [report(0.5)]}
    pressures = {"g0": up(0.0), "g1": down(0.0)}
    decision = decide(observed, {"g0": 1, "g1": 2, "g2": 1}, pressures, CONFIG, now_s=1000.0)
    assert decision.targets == {"g0": 2, "g1": 1, "g2": 1}
    assert decision.causes == {"g0": "busy", "g1": "idle", "g2": "steady"}
    assert decision.reasons.keys() == decision.targets.keys()


def test_the_wanted_number_does_not_hang_on_the_last_bit_of_a_sum() -> None:
    assert 2.1 / CONFIG.target_busy_share > 3
    assert wanted_replicas(2.1, CONFIG) == 3
    assert wanted_replicas(2.11, CONFIG) == 4
    assert wanted_replicas(0.0, CONFIG) == 1


def test_with_many_copies_the_wanted_number_itself_is_the_limit() -> None:
    many = CONFIG.model_copy(update={"max_replicas": 100})
    # 20 copies at 0.75 are within the band of shares, yet 22 are wanted.
    assert decided(20, *[0.75] * 20, pressure=up(0.0), config=many).targets == {"g3": 22}
    assert decided(20, *[0.60] * 20, pressure=down(0.0), config=many).targets == {"g3": 19}


# The settings.


def refusal(**values: float) -> str:
    with pytest.raises(ValidationError) as caught:
        AutoscaleConfig.model_validate(values)
    return str(caught.value)


def test_settings_that_contradict_each_other_are_refused_with_their_numbers() -> None:
    assert "max_replicas (2) is below min_replicas (3)" in refusal(min_replicas=3, max_replicas=2)
    assert "down_busy_share (0.75) must not be above target_busy_share (0.7)" in refusal(down_busy_share=0.75)
    assert "nor that above up_busy_share (0.65)" in refusal(up_busy_share=0.65)
    equal = {"down_busy_share": 0.7, "target_busy_share": 0.7, "up_busy_share": 0.7}
    assert "down_busy_share and up_busy_share are both 0.7" in refusal(**equal)


@pytest.mark.parametrize("key", ["target_busy_share", "up_busy_share", "window_s", "late_after_s", "min_replicas"])
def test_settings_are_above_0(key: str) -> None:
    assert "greater than" in refusal(**{key: 0})


def test_groups_scale_where_there_is_room_between_the_bounds() -> None:
    assert not AutoscaleConfig().enabled
    assert AutoscaleConfig(max_replicas=2).enabled
    assert not AutoscaleConfig(min_replicas=2, max_replicas=2).enabled


def test_decisions_are_values() -> None:
    decision = decided(1, 0.5)
    assert decision == decided(1, 0.5)
    assert replace(decision, targets={}) != decision
