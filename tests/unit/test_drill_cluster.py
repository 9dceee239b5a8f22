"""What benchmarks/drill.py sees of a cluster, and what it does to processes: with processes of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from benchmarks.drill_cluster import DrillError, Process, Size, View, lacking_deployment, lacking_member, members_of
from benchmarks.drill_faults import Lengths, apply
from benchmarks.drill_links import CannotCut, count_links, cut_links
from benchmarks.drill_plan import Fault
from benchmarks.drill_scale import with_replicas
from deploy.config import load

SIZE = Size(groups=2, replicas=2, attention=1)
LENGTHS = Lengths(stop_s=0.3, cut_s=0.2, slow_s=0.5, scale_timeout_s=1)
ECHO = """
import socket, sys
server = socket.socket(socket.AF_UNIX) if sys.argv[1] != "tcp" else socket.create_server(("127.0.0.1", 0))
if sys.argv[1] != "tcp":
    server.bind(sys.argv[1])
    server.listen()
print(sys.argv[1] if sys.argv[1] != "tcp" else server.getsockname()[1], flush=True)
kept = []
while True:
    kept.append(server.accept()[0])
    kept[-1].sendall(b"hello")
"""


def status(replicas: dict[str, int] | None = None, *, health: str = "HEALTHY") -> dict[str, object]:
    counts = {"RUNNING": 2, "STARTING": 0} if replicas is None else replicas
    healthy = {"status": "HEALTHY", "replicas": {"RUNNING": 1}}
    return {
        "deployments": {
            "experts-0": {"status": health, "replicas": counts},
            "experts-1": {"status": "HEALTHY", "replicas": {"RUNNING": 2}},
            "attention": healthy,
            "router": healthy,
        },
        "controller": {"members": [{"kind": "router", "member_id": "r", "pid": 4, "address": "unix:/r"}]},
    }


def member(pid: int = 5, *, group: int = 0, address: str = "unix:/x") -> Process:
    return Process(kind="experts", member_id=f"e{pid}", pid=pid, address=address, group=group)


# Full strength.


def test_members_are_read_from_the_status_page():
    (router,) = members_of(status()) or []
    assert (router.kind, router.pid, router.group, str(router)) == ("router", 4, -1, "router (pid 4)")
    assert members_of({"controller": None}) is None


def test_every_deployment_must_be_healthy_with_all_its_replicas_and_no_others():
    assert lacking_deployment(status(), SIZE) is None
    assert "experts-0" in (lacking_deployment(status(health="UPDATING"), SIZE) or "")
    assert "experts-0" in (lacking_deployment(status({"RUNNING": 1, "STARTING": 1}), SIZE) or "")
    assert "experts-0" in (lacking_deployment(status({"RUNNING": 3}), SIZE) or "")


def test_every_group_must_have_its_copies():
    others = [Process(kind=kind, member_id="m", pid=1, address="", group=-1) for kind in ("router", "attention")]
    alive = [*others, member(2), member(3), member(4, group=1), member(5, group=1)]
    assert lacking_member(alive, SIZE) is None
    assert lacking_member(alive[1:], SIZE) == "0 of 1 router members"
    assert lacking_member([*alive[:-1], member(5)], SIZE) == "3 of 2 copies of group 0"


def test_a_cluster_that_does_not_answer_is_not_whole():
    view = View(http="http://127.0.0.1:1", owner_pid=os.getpid(), size=SIZE)
    with pytest.raises(DrillError, match="not at full strength after 0 s: the gateway does not answer"):
        view.wait_until_whole((), timeout_s=0.1)
    with pytest.raises(DrillError, match="does not say who its members are"):
        view.members("experts")


# Faults.


class Played(View):
    """A view of one process."""

    __slots__ = ("_victim",)

    def members(self, kind: str) -> list[Process]:
        return [self._victim]

    @staticmethod
    def of(victim: Process) -> "Played":
        view = Played(http="", owner_pid=os.getpid(), size=SIZE)
        object.__setattr__(view, "_victim", victim)
        return view


@pytest.fixture(params=["unix", "tcp"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Process]:
    """A process that greets everyone who connects."""
    argument = "tcp" if request.param == "tcp" else str(tmp_path / "s")
    child = subprocess.Popen([sys.executable, "-c", ECHO, argument], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    told = child.stdout.readline().strip()
    yield member(child.pid, address=f"tcp:127.0.0.1:{told}" if request.param == "tcp" else f"unix:{told}")
    child.kill()
    child.wait()
    child.stdout.close()


def connected(server: Process) -> socket.socket:
    scheme, _, rest = server.address.partition(":")
    client = socket.socket(socket.AF_UNIX) if scheme == "unix" else socket.socket()
    client.connect(rest if scheme == "unix" else ("127.0.0.1", int(rest.rpartition(":")[2])))
    client.settimeout(10)
    assert client.recv(5) == b"hello"
    return client


@pytest.fixture(autouse=True)
def _may_cut(request: pytest.FixtureRequest) -> None:
    if "server" in request.fixturenames:
        try:
            count_links(os.getpid(), "unix:/none")
        except CannotCut as error:
            pytest.skip(str(error))


def test_a_cut_closes_every_link_and_the_process_takes_new_ones(server: Process):
    with connected(server) as first, connected(server) as second:
        assert count_links(server.pid, server.address) == 2
        assert cut_links(server.pid, server.address) == 2
        assert first.recv(1) == second.recv(1) == b""
    connected(server).close()
    assert psutil.Process(server.pid).is_running()


def test_a_cut_fault_says_how_many_links_it_cut(server: Process):
    with connected(server):
        applied = apply(Fault(kind="experts-cut", pick=0.5), Played.of(server), LENGTHS)
    assert "links" in applied.victim
    assert not applied.gone


def test_where_nothing_is_connected_there_is_nothing_to_cut(server: Process):
    with pytest.raises(DrillError, match="nothing to cut"):
        apply(Fault(kind="experts-cut", pick=0), Played.of(server), LENGTHS)


@pytest.mark.parametrize(("kind", "at_least_s"), [("experts-stop", 0.3), ("experts-slow", 0.5)])
def test_a_stopped_and_a_slowed_process_run_again_afterwards(server: Process, kind: str, at_least_s: float):
    began_s = time.monotonic()
    applied = apply(Fault(kind=kind, pick=0), Played.of(server), LENGTHS)  # type: ignore[arg-type]
    assert time.monotonic() - began_s >= at_least_s
    assert not applied.gone
    connected(server).close()
    assert psutil.Process(server.pid).status() != psutil.STATUS_STOPPED


def test_a_killed_process_is_gone(server: Process):
    applied = apply(Fault(kind="experts-kill", pick=0.99), Played.of(server), LENGTHS)
    assert applied.gone == {server.pid}
    _, alive = psutil.wait_procs([psutil.Process(server.pid)], timeout=5)
    assert not alive


def test_a_changed_number_of_copies_is_a_whole_config(tmp_path: Path):
    config = load(Path(__file__).parents[2] / "deploy/configs/laptop.yaml")
    changed = with_replicas(config.model_dump(), 3)
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(changed))
    assert load(tmp_path / "changed.yaml").experts.replicas == 3
    assert changed | {"experts": None} == config.model_dump() | {"experts": None}
