"""The order of things in benchmarks/drill.py, and what becomes of it when something goes wrong; all else is faked."""

import json
from collections.abc import Collection
from pathlib import Path

import pytest

from benchmarks import drill_script
from benchmarks.drill_cluster import DrillError, View
from benchmarks.drill_faults import Applied
from benchmarks.drill_options import Options, parse
from benchmarks.drill_plan import Fault
from benchmarks.drill_script import Clients, run_script


class FakeView(View):
    """At full strength, until it has been waited for so often."""

    patience = 1000

    def wait_until_whole(self, gone: Collection[int], *, timeout_s: float) -> None:
        FakeView.patience -= 1
        if FakeView.patience < 0:
            raise DrillError("not at full strength: 1 of 2 copies of group 0")


class FakeClients(Clients):
    def __init__(self) -> None:
        self.did: list[str] = []

    def begin(self) -> None:
        self.did.append("begin")

    def counts(self) -> dict[str, int]:
        return {"begun": 4, "ended": 3, "failed": 0}

    def probe(self, index: int) -> str | None:
        self.did.append(f"probe {index}")
        return None

    def end(self) -> dict[str, int]:
        self.did.append("end")
        return self.counts()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(fault: Fault, view: View, lengths: object) -> Applied:
        return Applied(kind=fault.kind, victim="a victim", began_s=0.0, gone=frozenset({5}))

    monkeypatch.setattr(drill_script, "apply", apply)
    monkeypatch.setattr(drill_script, "WARM_UP_S", 0.0)
    monkeypatch.setattr(FakeView, "patience", 1000)


def view() -> FakeView:
    options = short()
    return FakeView(http="", owner_pid=1, size=options.size)


def short() -> Options:
    shortest = ["--minutes=0.001", "--streams=3", "--times=2", "--pause=0.001"]
    return parse([*shortest, "--faults=experts-kill,router-kill"])


def test_every_fault_is_followed_by_a_probe_and_the_load_ends_last(tmp_path: Path):
    clients = FakeClients()
    windows, problems = run_script(view(), clients, short(), tmp_path)
    assert not problems
    assert clients.did == ["begin", "probe 0", "probe 1", "probe 2", "probe 3", "end"]
    assert sorted(window.kind for window in windows) == ["experts-kill"] * 2 + ["router-kill"] * 2
    kept = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert [one["kind"] for one in kept] == [window.kind for window in windows]


def test_a_cluster_that_does_not_recover_ends_the_script_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FakeView, "patience", 3)  # before and after the first fault, and before the second
    clients = FakeClients()
    windows, problems = run_script(view(), clients, short(), tmp_path)
    assert problems == ["not at full strength: 1 of 2 copies of group 0"]
    assert [window.whole_s is None for window in windows] == [False, True]
    assert clients.did == ["begin", "probe 0", "end"]


def test_clients_that_fail_are_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(self: FakeClients) -> dict[str, int]:
        raise DrillError("the process clients has ended")

    monkeypatch.setattr(FakeClients, "end", fail)
    _, problems = run_script(view(), FakeClients(), short(), tmp_path)
    assert problems == ["the process clients has ended"]
