"""What a drill sees of its cluster: members, processes, and whether everything is there that should be."""

import http.client
import json
import time
import urllib.request
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import psutil

from benchmarks.drill_links import CannotCut, count_links
from experts.errors import ServingError

POLL_S = 0.25
STATUS_TIMEOUT_S = 15.0
MemberKind = Literal["experts", "router", "attention"]


class DrillError(ServingError):
    """The drill cannot go on; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much of everything there should be."""

    groups: int  # D
    replicas: int  # of each group
    attention: int
    routers: int = 1  # one of them works

    @property
    def members(self) -> dict[MemberKind, int]:
        return {"experts": self.groups * self.replicas, "router": self.routers, "attention": self.attention}


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One member of the cluster."""

    kind: MemberKind
    member_id: str
    pid: int
    address: str
    group: int  # -1: it is no expert replica
    stands_by: bool = False  # a router while another one works

    def __str__(self) -> str:
        of_group = "" if self.group < 0 else f" of group {self.group}"
        return f"{self.kind}{of_group} (pid {self.pid})"


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A running cluster, looked at from outside."""

    http: str  # base URL
    owner_pid: int  # of `expertmesh up`
    size: Size

    def status(self) -> Mapping[str, object] | None:
        """What /expertmesh/status says; None while it says nothing."""
        url = f"{self.http}/expertmesh/status"
        try:
            with urllib.request.urlopen(url, timeout=STATUS_TIMEOUT_S) as answer:  # noqa: S310  (http only)
                return json.load(answer)
        except (OSError, ValueError, http.client.HTTPException):
            return None

    def members(self, kind: MemberKind) -> list[Process]:
        """Those that are alive. Raises DrillError where the cluster does not say."""
        status = self.status()
        found = None if status is None else members_of(status)
        if found is None:
            raise DrillError("the cluster does not say who its members are; its controller or gateway does not answer")
        return [member for member in found if member.kind == kind and _is_alive(member.pid)]

    def engines(self) -> list[int]:
        """Process ids of vLLM's engines below the attention replicas. Raises DrillError."""
        return [pid for member in self.members("attention") for pid in _engines_below(member.pid)]

    def controller(self) -> int | None:
        """Process id of the replica of our controller; None while there is none."""
        try:
            for process in psutil.Process(self.owner_pid).children(recursive=True):
                if _has_name(process, "expertmesh:controller"):
                    return process.pid
        except psutil.NoSuchProcess:
            pass
        return None

    def lacks(self, gone: Collection[int]) -> str | None:
        """What there should be and is not, in words; None at full strength. gone: pids that do not count."""
        status = self.status()
        if status is None:
            return "the gateway does not answer"
        members = members_of(status)
        if members is None:
            return "the controller does not answer"
        missing = lacking_deployment(status, self.size)
        if missing is not None:
            return missing
        alive = [member for member in members if member.pid not in gone and _is_alive(member.pid)]
        missing = lacking_member(alive, self.size)
        if missing is not None:
            return missing
        controller = self.controller()
        if controller is None or controller in gone:
            return "no controller"
        engines = [pid for one in alive if one.kind == "attention" for pid in _engines_below(one.pid)]
        if len(set(engines) - set(gone)) != self.size.attention:
            return f"{len(set(engines) - set(gone))} of {self.size.attention} engines"
        return _without_link(alive)

    def wait_until_whole(self, gone: Collection[int], *, timeout_s: float) -> None:
        """Returns at full strength. Raises DrillError with what is missing after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while (missing := self.lacks(gone)) is not None:
            if time.monotonic() > deadline_s:
                raise DrillError(f"not at full strength after {timeout_s:.0f} s: {missing}")
            time.sleep(POLL_S)


def members_of(status: Mapping[str, object]) -> list[Process] | None:
    """None while the controller does not answer."""
    controller = cast("Mapping[str, object] | None", status.get("controller"))
    if controller is None:
        return None
    return [
        Process(
            kind=member["kind"],
            member_id=member["member_id"],
            pid=member["pid"],
            address=member["address"],
            group=member.get("group", -1),
            stands_by=member.get("state") == "stands by",
        )
        for member in cast("list[dict]", controller["members"])
    ]


def lacking_deployment(status: Mapping[str, object], size: Size) -> str | None:
    """The first deployment that is not healthy, or has another number of replicas than it should."""
    deployments = cast("Mapping[str, Mapping[str, object]]", status["deployments"])
    wanted = {f"experts-{group}": size.replicas for group in range(size.groups)} | {"attention": size.attention}
    for name, deployment in sorted(deployments.items()):
        replicas = {state: count for state, count in cast("dict[str, int]", deployment["replicas"]).items() if count}
        count = wanted.get(name, replicas.get("RUNNING", 0))
        if deployment["status"] != "HEALTHY" or not count or replicas != {"RUNNING": count}:
            return f"{name} is {deployment['status']} with {replicas}"
    return None


def lacking_member(alive: Collection[Process], size: Size) -> str | None:
    """The first kind or group that has another number of live members than it should."""
    for kind, count in size.members.items():
        found = sum(member.kind == kind for member in alive)
        if found != count:
            return f"{found} of {count} {kind} members"
    for group in range(size.groups):
        found = sum(member.group == group for member in alive)
        if found != size.replicas:
            return f"{found} of {size.replicas} copies of group {group}"
    return None


def _without_link(members: Collection[Process]) -> str | None:
    """An expert replica that no router is connected to, or the working router where no engine is."""
    for member in members:
        if member.kind == "attention" or member.stands_by:
            continue
        try:
            if not count_links(member.pid, member.address):
                return f"no link to {member}"
        except ProcessLookupError:
            return f"{member} is gone"
        except CannotCut:
            return None  # it cannot be seen here
    return None


def _engines_below(pid: int) -> list[int]:
    try:
        children = psutil.Process(pid).children(recursive=True)
        return [child.pid for child in children if _is_alive(child.pid) and is_engine(child)]
    except psutil.NoSuchProcess:
        return []


def is_engine(process: psutil.Process) -> bool:
    """Of a process below an attention replica. Raises psutil.NoSuchProcess where it has ended.

    Its title is VLLM::EngineCore, of which the kernel keeps 15 bytes as its name; psutil adds the rest where it can.
    Now and then an engine has no title: what sets it finds no place where its environment was changed. Then it is
    known by how it was started.
    """
    return process.name().startswith("VLLM::EngineCor") or "multiprocessing.spawn" in " ".join(process.cmdline())


def _has_name(process: psutil.Process, name: str) -> bool:
    try:
        return name in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
