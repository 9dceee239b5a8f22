"""Routers of one node that stand by for each other."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from peers import wait_until

from router.turn import Turn

HOLDER = """
import sys, time
from pathlib import Path
from router.turn import Turn
folder = Path(sys.argv[1])
(folder / "own").touch()
turn = Turn(own=folder / "own", shared=folder / "router.sock")
turn.start()
turn.join()
print("works", flush=True)
time.sleep(600)
"""


@pytest.fixture
def routers(tmp_path: Path):
    """Makes a turn for a socket of the given name."""
    turns: list[Turn] = []
    sockets: list[socket.socket] = []

    def make(name: str) -> Turn:
        listener = socket.socket(socket.AF_UNIX)
        sockets.append(listener)
        listener.bind(str(tmp_path / name))
        listener.listen()
        turns.append(Turn(own=tmp_path / name, shared=tmp_path / "router.sock"))
        turns[-1].start()
        return turns[-1]

    yield make
    for turn in turns:
        turn.stop()
    for listener in sockets:
        listener.close()


def inode(path: Path) -> int:
    return path.stat().st_ino


def test_the_first_one_works_and_the_others_stand_by(tmp_path: Path, routers) -> None:
    first, second = routers("a.sock"), None
    wait_until(lambda: first.has_come)
    second = routers("b.sock")
    second.join(0.2)
    assert second.is_alive() and not second.has_come
    assert inode(tmp_path / "router.sock") == inode(tmp_path / "a.sock")


def test_whoever_stands_by_gets_the_name_when_the_first_one_stops(tmp_path: Path, routers) -> None:
    first = routers("a.sock")
    wait_until(lambda: first.has_come)
    second = routers("b.sock")
    first.stop()
    wait_until(lambda: second.has_come)
    assert inode(tmp_path / "router.sock") == inode(tmp_path / "b.sock")


def test_whoever_stands_by_and_stops_never_takes_the_name(tmp_path: Path, routers) -> None:
    first = routers("a.sock")
    wait_until(lambda: first.has_come)
    second = routers("b.sock")
    second.stop()
    first.stop()
    second.join(5)
    assert not second.is_alive() and not second.has_come
    assert inode(tmp_path / "router.sock") == inode(tmp_path / "a.sock")


def test_a_router_that_is_killed_leaves_its_turn(tmp_path: Path, routers) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "works\n"
        standby = routers("b.sock")
        standby.join(0.2)
        assert not standby.has_come
        holder.kill()
        wait_until(lambda: standby.has_come)
