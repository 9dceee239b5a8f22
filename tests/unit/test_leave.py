"""The preStop hook: what it sees in a pod's processes, what it asks of Ray, and how long it waits."""

from types import SimpleNamespace

import pytest

from deploy import leave
from deploy.leave import APPLICATION, drain_command, node_id, replicas_left, wait_until_left

NODE = "df3e044d4b57c922e7cee021663aa843d963588d14a98edba1da3253"
POD = [
    ["/bin/bash", "-c", "ray start --block"],
    ["/opt/venv/ray/core/src/ray/raylet/raylet", "--raylet_socket_name=/tmp/ray/raylet", f"--node_id={NODE}"],
    ["/opt/venv/bin/python", "agent.py", "--node-id=another"],
    ["ray::DashboardAgent"],
    ["ray::ServeReplica:expertmesh:router", ""],
    ["ray::SERVE_REPLICA::expertmesh#attention#f9uppynj:ServeReplica:expertmesh:attention.__init__"],
    ["ray::ServeReplica:another:router"],
    ["VLLM::EngineCore"],
    [],
]


def test_a_pods_node_is_the_one_that_its_raylet_was_given():
    assert node_id(POD) == NODE
    assert node_id([command for command in POD if not command[:1] or "raylet" not in command[0]]) is None


def test_replicas_are_found_by_the_titles_that_ray_gives_processes():
    assert replicas_left(POD) == ["attention", "router"]
    assert replicas_left([["ray::ServeReplica:expertmesh:experts-3.handle_request", "", ""]]) == ["experts-3"]


def test_the_application_is_called_as_where_it_is_built():
    from deploy.app import APP_NAME

    assert APPLICATION == APP_NAME


def test_rays_hidden_command_still_takes_what_we_give_it():
    from ray.scripts.scripts import drain_node

    context = drain_node.make_context("drain-node", drain_command(NODE, 359.9)[2:])
    assert context.params["node_id"] == NODE
    assert context.params["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert context.params["deadline_remaining_seconds"] == 359


def test_it_waits_until_the_last_replica_has_gone():
    pod = FakePod(["attention", "router"], gone_s={"router": 3.0, "attention": 25.0})
    assert pod.wait(end_s=60.0)
    assert 25.0 <= pod.now_s < 27.0
    assert pod.said[0] == "waiting, at most 60 s, for attention, router"
    assert pod.said[1:] == [
        "waiting, at most 50 s, for attention",
        "waiting, at most 40 s, for attention",
        "no replica is left here",
    ]


def test_it_waits_no_longer_than_the_deadline():
    pod = FakePod(["gateway"], gone_s={"gateway": 1e9})
    assert not pod.wait(end_s=30.0)
    assert 30.0 <= pod.now_s < 32.0
    assert pod.said[-1] == "the deadline is over, and these are stopped as they are: gateway"


def test_the_hook_drains_waits_and_stops_ray(monkeypatch: pytest.MonkeyPatch):
    ray = FakeRay(monkeypatch, refusals=2)
    assert leave.main(["--deadline-s", "100"]) == 0
    assert ray.calls == ["drain-node", "drain-node", "drain-node", "stop"]
    assert ray.now_s < 20.0


def test_without_a_head_it_gives_up_asking_and_stops_ray(monkeypatch: pytest.MonkeyPatch):
    ray = FakeRay(monkeypatch, refusals=1000)
    assert leave.main(["--deadline-s", "900"]) == 0
    assert ray.calls[-1] == "stop"
    assert 50.0 <= ray.now_s <= 60.0


def test_ray_is_stopped_even_where_the_hook_has_a_bug(monkeypatch: pytest.MonkeyPatch):
    ray = FakeRay(monkeypatch, refusals=0)
    monkeypatch.setattr(leave, "node_id", lambda commands: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        leave.main(["--deadline-s", "100"])
    assert ray.calls == ["stop"]


class FakeRay:
    """The command `ray` in a pod, whose replicas go when the node is drained."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, refusals: int) -> None:
        self._refusals = refusals
        self.calls: list[str] = []
        self.now_s = 0.0
        monkeypatch.setattr(leave, "time", SimpleNamespace(monotonic=lambda: self.now_s, sleep=self._sleep))
        monkeypatch.setattr(leave, "_call", self._call)
        monkeypatch.setattr(leave, "_commands", lambda: [*POD[:2]] if self.has_drained else POD)
        monkeypatch.setattr(leave, "_say", lambda text: None)

    @property
    def has_drained(self) -> bool:
        return self.calls.count("drain-node") > self._refusals

    def _call(self, command: list[str]) -> str | None:
        self.calls.append(command[1])
        return None if command[1] == "stop" or self.has_drained else "no head"

    def _sleep(self, seconds: float) -> None:
        self.now_s += seconds


class FakePod:
    """Replicas that go at their times, on a clock that moves by sleeping."""

    def __init__(self, replicas: list[str], gone_s: dict[str, float]) -> None:
        self._replicas, self._gone_s = replicas, gone_s
        self.now_s = 0.0
        self.said: list[str] = []

    def wait(self, end_s: float) -> bool:
        return wait_until_left(self._left, end_s, say=self.said.append, now=lambda: self.now_s, sleep=self._sleep)

    def _left(self) -> list[str]:
        return [replica for replica in self._replicas if self.now_s < self._gone_s[replica]]

    def _sleep(self, seconds: float) -> None:
        self.now_s += seconds
