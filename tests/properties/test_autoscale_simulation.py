"""What holds of every decision, and hours of simulation: targets near the ideal, and no steady load moves them."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from played_cluster import History, PlayedCluster, World
from played_load import Work, day_and_night, moving_hot_spot, recorded, uniform, with_noise, zipf

from cluster.autoscale import Pressure, Report, decide, judge, wanted_replicas
from cluster.autoscale_config import AutoscaleConfig

CHECKED = settings(deadline=None, derandomize=True, max_examples=60)
CONFIG = AutoscaleConfig(max_replicas=6)  # everything else as it comes
NOW_S = 1000.0

shares = st.floats(0, 1)
pressures = st.none() | st.builds(Pressure, direction=st.sampled_from(["up", "down"]), since_s=st.floats(0, NOW_S))
targets = st.integers(1, 12)


@st.composite
def configs(draw: st.DrawFn) -> AutoscaleConfig:
    down, target, up = sorted(draw(st.lists(st.floats(0.05, 0.95), min_size=3, max_size=3, unique=True)))
    least = draw(st.integers(1, 4))
    return AutoscaleConfig(
        min_replicas=least,
        max_replicas=least + draw(st.integers(0, 8)),
        down_busy_share=down,
        target_busy_share=target,
        up_busy_share=up,
        up_delay_s=draw(st.floats(0, 60)),
        down_delay_s=draw(st.floats(0, 300)),
    )


def reports(busy_shares: list[float], *, at_s: float = NOW_S) -> list[Report | None]:
    return [Report(busy_share=share, flops_per_s=1e9 * share, at_s=at_s) for share in busy_shares]


# What holds of every decision.


@CHECKED
@given(config=configs(), target=st.integers(0, 20), pressure=pressures, busy=st.lists(st.none() | shares, max_size=12))
def test_targets_are_within_the_bounds_and_down_is_one_at_a_time(
    config: AutoscaleConfig, target: int, pressure: Pressure | None, busy: list[float | None]
) -> None:
    seen = [None if share is None else Report(busy_share=share, flops_per_s=0.0, at_s=NOW_S) for share in busy]
    verdict = judge(seen, target, pressure, config, now_s=NOW_S)
    assert config.min_replicas <= verdict.target <= config.max_replicas
    assert verdict.target >= config.bounded(target) - 1
    assert verdict.reason.startswith("hold: ") == (verdict.target == target)
    assert (f"{target} -> {verdict.target}" in verdict.reason) == (verdict.target != target)


@CHECKED
@given(config=configs(), target=targets, pressure=pressures, pairs=st.lists(st.tuples(shares, shares), max_size=12))
def test_more_load_never_means_fewer_copies(
    config: AutoscaleConfig, target: int, pressure: Pressure | None, pairs: list[tuple[float, float]]
) -> None:
    little = judge(reports([min(pair) for pair in pairs]), target, pressure, config, now_s=NOW_S)
    much = judge(reports([max(pair) for pair in pairs]), target, pressure, config, now_s=NOW_S)
    assert much.target >= little.target


@CHECKED
@given(
    config=configs(),
    target=targets,
    pressure=pressures,
    busy=st.lists(shares, max_size=8),
    late_s=st.none() | st.floats(0.001, 1000),
)
def test_while_a_running_replica_is_silent_or_none_runs_the_target_is_held(
    config: AutoscaleConfig, target: int, pressure: Pressure | None, busy: list[float], late_s: float | None
) -> None:
    target = config.bounded(target)
    silent = None if late_s is None else reports([0.0], at_s=NOW_S - config.late_after_s - late_s)[0]
    for seen in ([*reports(busy), silent], []):
        verdict = judge(seen, target, pressure, config, now_s=NOW_S)
        assert verdict.target == target and verdict.cause == "unseen" and verdict.pressure is None


@CHECKED
@given(config=configs(), target=targets, pressure=pressures, busy=st.lists(shares, max_size=8))
def test_a_decision_depends_on_nothing_but_its_arguments(
    config: AutoscaleConfig, target: int, pressure: Pressure | None, busy: list[float]
) -> None:
    observed, wanted, before = {"g": reports(busy)}, {"g": target}, {"g": pressure} if pressure else {}
    first = decide(observed, wanted, before, config, now_s=NOW_S)
    assert decide(observed, wanted, before, config, now_s=NOW_S) == first
    assert observed == {"g": reports(busy)} and wanted == {"g": target}
    assert before == ({"g": pressure} if pressure else {})
    later = {"g": reports(busy, at_s=NOW_S + 1e6)}
    moved = {"g": Pressure(direction=pressure.direction, since_s=pressure.since_s + 1e6)} if pressure else {}
    assert decide(later, wanted, moved, config, now_s=NOW_S + 1e6).targets == first.targets


@CHECKED
@given(config=configs(), loads=st.lists(st.lists(shares, min_size=1, max_size=6), min_size=5, max_size=60))
def test_no_change_comes_within_the_hold_time_of_the_one_before(
    config: AutoscaleConfig, loads: list[list[float]]
) -> None:
    target, pressure, changed_s = config.min_replicas, None, -math.inf
    for step, busy in enumerate(loads):
        now_s = 7.0 * step
        verdict = judge(reports(busy, at_s=now_s), target, pressure, config, now_s=now_s)
        if verdict.target != target:
            delay_s = config.up_delay_s if verdict.target > target else config.down_delay_s
            assert now_s - changed_s >= delay_s
            changed_s = now_s
        target, pressure = verdict.target, verdict.pressure


@CHECKED
@given(config=configs(), work=st.floats(0, 12), target=targets)
def test_a_load_that_stays_settles_within_one_copy_of_the_ideal_and_then_moves_nothing(
    config: AutoscaleConfig, work: float, target: int
) -> None:
    target, pressure, seen = config.bounded(target), None, []
    for step in range(100):
        now_s = 20.0 * step
        busy = [min(work / target, 1.0)] * target
        verdict = judge(reports(busy, at_s=now_s), target, pressure, config, now_s=now_s)
        target, pressure = verdict.target, verdict.pressure
        seen.append(target)
    moves = [step for step, (before, after) in enumerate(pairwise(seen)) if before != after]
    directions = {seen[step + 1] > seen[step] for step in moves}
    assert len(directions) <= 1  # it goes there, and not there and back
    if config.down_delay_s <= 100:  # in time for all the way
        assert not moves or moves[-1] < 75
        assert abs(seen[-1] - wanted_replicas(work, config)) <= 1


# The simulation.


def play(work: Work, *, config: AutoscaleConfig = CONFIG, ideal_start: bool = False, **world: float) -> History:
    played = PlayedCluster(config, World(**world))  # pyright: ignore[reportArgumentType]
    noisy = with_noise(work, spread=0.25, drift=0.05, seed=1)
    return played.play(work, noisy, initial=played.ideal(work)[0] if ideal_start else None)


# Each with the seconds of its steps. The day is 6 hours long, so that it changes faster than real ones.
LOADS = {
    "uniform": (uniform(1800, 8, work=1.2), 2.0),
    "zipf": (zipf(1800, 8, total=6.0), 2.0),
    "a hot spot that moves": (moving_hot_spot(3600, 8, stay_steps=450, cold=0.35, hot=2.0), 2.0),
    "day and night": (day_and_night(5400, 4, day_steps=5400, night=0.2, noon=3.5), 4.0),
    "recorded": (recorded(np.full(1800, 1.3), steps_per_window=10), 2.0),
    "recorded, with a day's traffic": (
        recorded(day_and_night(2700, 1, day_steps=2700, night=0.2, noon=3.0)[:, 0], steps_per_window=5),
        4.0,
    ),
}


@pytest.mark.parametrize("name", LOADS)
def test_targets_are_near_the_ideal_and_change_rarely(name: str) -> None:
    work, step_s = LOADS[name]
    history = play(work, step_s=step_s)
    print(f"{name}: near {history.near_ideal.round(3)}, changes in 5 min {history.changes_in_5_min.round(2)}")
    assert history.near_ideal.min() >= 0.95, (history.near_ideal, history.reasons)
    assert history.changes_in_5_min.max() < 1.0, history.reasons


def test_every_group_gets_what_its_own_load_asks_for() -> None:
    final = play(zipf(900, 8, total=6.0)).targets[-1].tolist()
    assert final == sorted(final, reverse=True) and final[0] == 3 and final[-1] == 1


STEADY = np.tile(np.linspace(0.1, 4.0, 12), (1800, 1))  # an hour in steps of 2 s


def test_a_steady_load_with_noise_causes_no_scaling_in_an_hour() -> None:
    history = play(STEADY, ideal_start=True, step_s=2.0)
    assert history.num_changes.tolist() == [0] * 12, history.reasons


def test_from_a_single_copy_a_steady_load_is_reached_and_then_moves_nothing() -> None:
    history = play(STEADY[:750], step_s=2.0)
    assert history.after(1200).num_changes.tolist() == [0] * 12, history.reasons
    assert (abs(history.targets[-1] - history.ideal[-1]) <= 1).all()


def test_copies_that_die_and_reports_that_are_lost_move_no_target() -> None:
    history = play(STEADY[:900], ideal_start=True, step_s=2.0, dies_every_s=400.0, lost=0.3)
    assert history.num_changes.tolist() == [0] * 12, history.reasons


def test_without_band_delays_and_window_the_same_steady_load_would_flap() -> None:
    nervous = AutoscaleConfig(
        max_replicas=6,
        target_busy_share=0.7,
        up_busy_share=0.71,
        down_busy_share=0.7,
        up_delay_s=0.0,
        down_delay_s=0.0,
        window_s=1.0,
    )
    history = play(STEADY[:300], config=nervous, ideal_start=True, step_s=2.0)
    assert history.changes_in_5_min.max() > 10
