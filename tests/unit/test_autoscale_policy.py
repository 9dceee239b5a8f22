"""The decision inside Serve's own autoscaler, without a cluster: what Serve calls, what it hands in, what it does."""

import json
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from ray.experimental import internal_kv
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import DeploymentID, ReplicaID, ReplicaMetricReport, TimeStampedValue
from ray.serve._private.config import DeploymentConfig, ReplicaConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from cluster import autoscale_policy
from cluster.autoscale_config import AutoscaleConfig
from cluster.autoscale_policy import ExpertLoadPolicy, read_notes, reports_of
from experts.load import ReplicaLoad

GROUP = DeploymentID(name="experts-3", app_name="expertmesh")
SETTINGS = AutoscaleConfig(max_replicas=4, up_delay_s=0.0, down_delay_s=0.0).model_dump()


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Ray's key-value store, without Ray."""
    kept: dict[str, bytes] = {}

    def put(key: str, value: str, *, namespace: str) -> None:
        kept[f"{namespace} {key}"] = value.encode()

    monkeypatch.setattr(internal_kv, "_internal_kv_put", put)
    monkeypatch.setattr(internal_kv, "_internal_kv_get", lambda key, *, namespace: kept.get(f"{namespace} {key}"))
    return kept


def replica(name: str) -> ReplicaID:
    return ReplicaID(name, GROUP)


class Serve:
    """What Serve's controller keeps of one deployment; `tick` is one round of its loop."""

    def __init__(self, *, max_replicas: int) -> None:
        policy = AutoscalingPolicy(
            policy_function="cluster.autoscale_policy:ExpertLoadPolicy", policy_kwargs=dict(SETTINGS)
        )
        config = AutoscalingConfig(
            min_replicas=1, max_replicas=max_replicas, upscale_delay_s=0, downscale_delay_s=0, policy=policy
        )
        # There and back again, as it comes to Serve's controller.
        carried = DeploymentConfig.from_proto_bytes(DeploymentConfig(autoscaling_config=config).to_proto_bytes())
        self._state = DeploymentAutoscalingState(GROUP)
        info = DeploymentInfo(
            deployment_config=carried,
            replica_config=ReplicaConfig.create(lambda: None),
            start_time_ms=0,
            deployer_job_id="01000000",
        )
        self.target = self._state.register(info, 0)

    def tick(self, loads: dict[str, float | None]) -> int:
        """loads: running replica -> the busy share that it reports now, None for nothing."""
        self._state.update_running_replica_ids([replica(name) for name in loads])
        for name, busy_share in loads.items():
            if busy_share is not None:
                stats = ReplicaLoad(busy_share=busy_share, flops_per_s=2e9).stats()
                series = {key: [TimeStampedValue(time.time(), value)] for key, value in stats.items()}
                report = ReplicaMetricReport(replica_id=replica(name), timestamp=time.time(), metrics=series)
                self._state.record_request_metrics_for_replica(report)
        self.target = self._state.get_decision_num_replicas(self.target)
        return self.target


def test_serve_asks_the_policy_and_does_what_it_says() -> None:
    serve = Serve(max_replicas=3)
    assert serve.target == 1
    assert serve.tick({"a": 0.5}) == 1
    assert serve.tick({"a": 1.0}) == 2
    assert serve.tick({"a": 1.0}) == 2  # the second copy is starting
    assert serve.tick({"a": 1.0, "b": None}) == 2  # and has just begun
    assert serve.tick({"a": 1.0, "b": 1.0}) == 3
    assert serve.tick({"a": 0.1, "b": 0.1, "c": 0.1}) == 2
    assert serve.tick({"a": 0.1, "b": 0.1}) == 1
    assert serve.tick({"a": 0.0}) == 1


def test_bounds_are_those_that_serve_has_now() -> None:
    serve = Serve(max_replicas=2)  # the policy's own settings allow 4
    serve.tick({"a": 1.0})
    assert serve.tick({"a": 1.0, "b": 1.0}) == 2


def test_a_group_that_has_lost_all_copies_keeps_its_target() -> None:
    serve = Serve(max_replicas=3)
    serve.tick({"a": 1.0})
    assert serve.tick({}) == 2


# What the policy makes of a context.


def context(series: dict[str, list[tuple[float, float]]], **fields: object) -> SimpleNamespace:
    """series: running replica -> (timestamp, busy share) of its report; empty where it has none."""
    busy_share = {replica(name): [TimeStampedValue(*point) for point in points] for name, points in series.items()}
    flops_per_s = {name: [TimeStampedValue(point.timestamp, 2e9) for point in busy_share[name]] for name in busy_share}
    usual: dict[str, object] = {
        "deployment_name": GROUP.name,
        "target_num_replicas": 1,
        "running_replicas": [replica(name) for name in series],
        "raw_metrics": {"busy_share": busy_share, "flops_per_s": flops_per_s},
        "capacity_adjusted_min_replicas": 1,
        "capacity_adjusted_max_replicas": 4,
        "policy_state": {},
    }
    return SimpleNamespace(**(usual | fields))


def test_the_newest_value_of_each_running_replica_counts() -> None:
    reports, _ = reports_of(context({"a": [(5.0, 0.1), (6.0, 0.9)], "b": []}), {}, now_s=50.0)  # pyright: ignore
    assert reports[1] is None
    assert reports[0] is not None and reports[0].busy_share == 0.9 and reports[0].at_s == 50.0


def test_a_reports_age_does_not_hang_on_the_clock_of_its_node() -> None:
    silent = context({"a": [(1e9, 0.9)]})
    _, seen = reports_of(silent, {}, now_s=50.0)  # pyright: ignore
    (again, *_), seen = reports_of(silent, seen, now_s=70.0)  # pyright: ignore
    assert again is not None and again.at_s == 50.0
    (fresh, *_), _ = reports_of(context({"a": [(0.0, 0.9)]}), seen, now_s=71.0)  # pyright: ignore
    assert fresh is not None and fresh.at_s == 71.0


def test_a_replica_that_falls_silent_holds_the_target() -> None:
    policy = ExpertLoadPolicy(**AutoscaleConfig(max_replicas=4).model_dump())
    silent = context({"a": [(1.0, 1.0)]})
    for now_s in (50.0, 60.0, 61.0, 80.0):
        target, silent.policy_state = policy.decide(silent, now_s=now_s)  # pyright: ignore
        assert target == 1
        assert (silent.policy_state["pressure"] is None) == (now_s > 60.0)


def test_the_delay_runs_from_one_call_to_the_next() -> None:
    policy = ExpertLoadPolicy(**AutoscaleConfig(max_replicas=4, up_delay_s=15.0).model_dump())
    busy = context({})
    for now_s, wanted in ((50.0, 1), (58.0, 1), (65.0, 2)):
        busy = context({"a": [(now_s, 1.0)]}, policy_state=busy.policy_state)
        target, busy.policy_state = policy.decide(busy, now_s=now_s)  # pyright: ignore
        assert target == wanted


def test_the_bounds_of_the_context_win_over_the_settings() -> None:
    at_most = context({"a": [(1.0, 1.0)], "b": [(1.0, 1.0)]}, target_num_replicas=2, capacity_adjusted_max_replicas=2)
    assert ExpertLoadPolicy(**SETTINGS).decide(at_most, now_s=50.0)[0] == 2  # pyright: ignore


def test_replicas_that_are_gone_are_forgotten() -> None:
    _, seen = reports_of(context({"a": [(1.0, 0.9)]}), {}, now_s=50.0)  # pyright: ignore
    _, seen = reports_of(context({"b": [(1.0, 0.9)]}), seen, now_s=50.0)  # pyright: ignore
    assert seen.keys() == {"b"}


def test_a_policy_never_raises_keeps_the_target_and_says_so_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(autoscale_policy.log, "exception", said.append)
    policy = ExpertLoadPolicy(**SETTINGS)
    broken = context({"a": []}, raw_metrics=7, policy_state={"pressure": "kept"})
    for _ in range(3):
        assert policy(broken) == (1, {"pressure": "kept"})  # pyright: ignore
    assert said == ["experts-3: no autoscaling decision, its target is kept"]


# Notes.


def eventually(condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return condition()


def test_a_note_says_why_a_group_has_as_many_copies_as_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscale_policy, "NOTE_EVERY_S", 0.0)
    policy = ExpertLoadPolicy(**SETTINGS)
    change = policy(context({"a": [(1.0, 1.0)]}))  # pyright: ignore
    assert change[0] == 2
    held = context({"a": [(2.0, 0.6)], "b": [(2.0, 0.6)]}, target_num_replicas=2)

    def told() -> bool:
        policy(held)  # pyright: ignore
        notes = read_notes(["experts-3", "experts-4"])
        return "experts-3" in notes and notes["experts-3"]["reason"].startswith("hold: busy 0.60 of 0.70")

    assert eventually(told)
    note = read_notes(["experts-3", "experts-4"])["experts-3"]
    assert note["last_change"] == "busy 1.00 of 0.70 for 0 s: 1 -> 2 (1 running, 2 GFLOP/s)"
    assert note["target"] == 2 and note["changes"] == {"up busy": 1}


def test_an_old_note_is_of_a_policy_that_no_longer_runs(store: dict[str, bytes]) -> None:
    note = {"target": 2, "reason": "", "last_change": None, "changes": {}, "at_s": time.time() - 61}
    store["expertmesh autoscale/experts-3"] = json.dumps(note).encode()
    assert read_notes(["experts-3"]) == {}


def test_a_store_that_is_away_costs_the_note_and_not_the_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise ConnectionError("no store")

    monkeypatch.setattr(internal_kv, "_internal_kv_put", away)
    policy = ExpertLoadPolicy(**SETTINGS)
    assert policy(context({"a": [(1.0, 1.0)]}))[0] == 2  # pyright: ignore
