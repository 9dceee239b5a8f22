"""What happens when parts of the running cluster die or hang: right tokens or a typed error, and never a hang."""

import os
import signal
import threading
import time

import grpc
import psutil
import pytest
from ray_cluster import Cluster

PROMPT = [11, 12, 13, 14, 15]
TOKENS = 120
DEADLINE_S = 60


class Background:
    """A request in another thread, so that something can happen to the cluster meanwhile."""

    def __init__(self, cluster: Cluster) -> None:
        self.tokens: list[int] | None = None
        self.error: grpc.RpcError | None = None
        self._cluster = cluster
        self._thread = threading.Thread(target=self._run)
        self._started = time.monotonic()
        self._thread.start()

    def _run(self) -> None:
        try:
            self.tokens = self._cluster.generate(PROMPT, TOKENS, timeout_s=DEADLINE_S)
        except grpc.RpcError as error:
            self.error = error

    def end(self) -> float:
        """Waits for the answer or the error; seconds since it was asked."""
        self._thread.join(DEADLINE_S + 10)
        assert not self._thread.is_alive(), "the request hangs"
        return time.monotonic() - self._started

    def assert_right_or_typed(self, expected: list[int]) -> None:
        if self.error is None:
            assert self.tokens == expected
        else:
            assert self.error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)  # type: ignore[attr-defined]


def right_again(cluster: Cluster, expected: list[int], *, timeout_s: float = 90) -> None:
    """The next request that is answered at all is answered right."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            assert cluster.generate(PROMPT, TOKENS, timeout_s=DEADLINE_S) == expected
            return
        except grpc.RpcError:
            assert time.monotonic() < deadline, "no answer after the replacement"
            time.sleep(1)


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> list[int]:
    return cluster.generate(PROMPT, TOKENS)


@pytest.mark.parametrize("kind", ["experts", "router"])
def test_a_killed_part_costs_no_token_and_no_engine(cluster: Cluster, expected: list[int], kind: str) -> None:
    engines = cluster.engine_pids()
    members = cluster.members(kind)
    count = len(members)
    victim = next(member["pid"] for member in members if member.get("state") != "stands by")
    request = Background(cluster)
    time.sleep(0.5)
    os.kill(victim, signal.SIGKILL)
    request.end()
    request.assert_right_or_typed(expected)
    right_again(cluster, expected)
    cluster.wait_for(kind, count, without=victim)
    assert cluster.engine_pids() == engines


def test_a_hung_expert_group_hangs_nothing_else(cluster: Cluster, expected: list[int]) -> None:
    engines = cluster.engine_pids()
    victim = cluster.members("experts")[1]["pid"]
    os.kill(victim, signal.SIGSTOP)
    try:
        request = Background(cluster)
        request.end()
        request.assert_right_or_typed(expected)
    finally:
        try:
            os.kill(victim, signal.SIGCONT)
        except ProcessLookupError:
            pass  # Serve has replaced it meanwhile
    right_again(cluster, expected)
    assert cluster.engine_pids() == engines


def test_the_streams_of_a_killed_engine_go_on_with_the_same_tokens(cluster: Cluster, expected: list[int]) -> None:
    victim = min(cluster.engine_pids())
    requests = [Background(cluster) for _ in range(4)]
    time.sleep(0.5)
    os.kill(victim, signal.SIGKILL)
    for request in requests:
        request.end()
        assert request.error is None
        assert request.tokens == expected
    cluster.wait_for_engines(2, without=victim)


def test_a_killed_controller_is_not_missed(cluster: Cluster, expected: list[int]) -> None:
    version = cluster.status()["controller"]["placement_version"]
    replicas = cluster.status()["controller"]["members"]
    controller = _pid_of("controller", cluster.owner_pid)
    os.kill(controller, signal.SIGKILL)
    assert cluster.generate(PROMPT, TOKENS) == expected
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status = cluster.status().get("controller")
        if status and len(status["members"]) >= len(replicas) - 1 and not status["missing_groups"]:
            assert status["placement_version"] > version
            return
        time.sleep(0.5)
    raise AssertionError("the new controller has not learned of the members")


def _pid_of(deployment: str, owner_pid: int) -> int:

    for process in psutil.Process(owner_pid).children(recursive=True):
        if f"expertmesh:{deployment}" in " ".join(process.cmdline()):
            return process.pid
    raise AssertionError(f"no process of {deployment}")
