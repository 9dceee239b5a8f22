"""A router and its expert groups on threads of the calling process: the real data plane, without Ray."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from subprocess import PIPE
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import torch

from experts.checkpoint import open_checkpoint
from experts.compute import make_expert_ffn
from experts.handshake import Identity, Role, fresh_incarnation, read_secret, write_secret
from experts.placement import Placement, Replica
from experts.served_model import ServedModel
from experts.server import ExpertServer
from experts.weights import load_group
from experts.wire import Limits

if TYPE_CHECKING:
    from router.routing_counts import RoutingCounts
    from router.server import RouterServer


class LocalPlane:
    """Begins empty; `start_router` and `start_group` may be called, and undone, at any time."""

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        dtype: str,
        num_groups: int,
        max_rows: int = 512,
        capacity_factor: float | None = None,
    ) -> None:
        self._capacity_factor = capacity_factor
        self._folder = tempfile.TemporaryDirectory(prefix="em-")
        self.model = ServedModel(
            checkpoint=str(checkpoint),
            dtype=dtype,
            num_groups=num_groups,
            max_rows=max_rows,
            runtime_dir=self._folder.name,
        )
        write_secret(self.model.secret_file)
        self._checkpoint = open_checkpoint(checkpoint)
        self.limits = Limits.of(self._checkpoint.shape, max_rows=max_rows)
        self.router: RouterServer | None = None
        self.routing: RoutingCounts | None = None  # what the router's gate has decided
        self.groups: dict[Replica, ExpertServer] = {}
        self._version = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for replica in list(self.groups):
            self.groups.pop(replica).stop()
        self.stop_router()
        self._folder.cleanup()

    def start(self) -> Self:
        for group in range(self.model.num_groups):
            self.start_group(group)
        self.start_router()
        return self

    def start_router(self, *, dispatch_timeout_s: float = 2.0) -> None:
        # Not at the top: these import numba, beside which vLLM does not start in one process.
        from router.routing_counts import RoutingCounts
        from router.server import RouterServer
        from router.service import make_gate

        self.routing = RoutingCounts(self._checkpoint.shape, num_groups=self.model.num_groups)
        identity = Identity(
            role=Role.ROUTER,
            member_id="router",
            incarnation=fresh_incarnation(),
            fingerprint=self.model.fingerprint(self._checkpoint),
        )
        self.router = RouterServer(
            self.routing.counted(make_gate(self._checkpoint)),
            identity=identity,
            secret=read_secret(self.model.secret_file),
            address=self.model.router_address,
            limits=self.limits,
            num_groups=self.model.num_groups,
            dispatch_timeout_s=dispatch_timeout_s,
            capacity_factor=self._capacity_factor,
        )
        self.router.start()
        self._publish()

    def stop_router(self) -> None:
        if self.router is not None:
            self.router.stop()
            self.router = None

    def start_group(self, group: int, *, path: Literal["auto", "loop", "kernel", "grouped"] = "auto") -> Replica:
        shape = self._checkpoint.shape
        held = shape.home_experts(group, self.model.num_groups)
        incarnation = fresh_incarnation()
        server = ExpertServer(
            make_expert_ffn(load_group(self._checkpoint, held, self.model.torch_dtype), path=path),
            held=held,
            layers=frozenset(shape.moe_layers),
            dtype=self.model.torch_dtype,
            num_experts=shape.num_experts,
            address=f"unix:{self._folder.name}/e{group}-{incarnation:x}.sock",
            secret=read_secret(self.model.secret_file),
            fingerprint=self.model.fingerprint(self._checkpoint),
            incarnation=incarnation,
            group=group,
            limits=self.limits,
        )
        server.start()
        replica = Replica(member_id=f"experts-{group}", group=group, address=server.address, incarnation=incarnation)
        self.groups[replica] = server
        self._publish()
        return replica

    def stop_group(self, replica: Replica) -> None:
        """As a crash would: the links break, and the placement still names the replica."""
        self.groups.pop(replica).stop()

    def forget(self, replica: Replica) -> None:
        """As an expired lease would."""
        self.groups.pop(replica, None)
        self._publish()

    def retire(self, replica: Replica) -> None:
        """As a replica that is scaled down: out of the placement first, gone when nobody waits for it any more."""
        server = self.groups.pop(replica)
        self._publish()
        server.drain(5.0)
        server.stop()

    def _publish(self) -> None:
        self._version += 1
        if self.router is not None:
            self.router.set_placement(
                Placement(version=self._version, num_groups=self.model.num_groups, replicas=tuple(self.groups))
            )


class PlaneProcess:
    """A LocalPlane in a child process, driven by lines on its standard input.

    Needed beside an engine in the test's own process: vLLM's start trips over numba being imported there.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        dtype: str,
        num_groups: int,
        max_rows: int = 512,
        capacity_factor: float | None = None,
    ) -> None:
        numbers = json.dumps({"num_groups": num_groups, "max_rows": max_rows, "capacity_factor": capacity_factor})
        command = [sys.executable, __file__, str(checkpoint), dtype, numbers]
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(
            command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, stdin=PIPE, stdout=PIPE, text=True
        )
        self.model = ServedModel(**json.loads(self._answer()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def do(self, command: str) -> str:
        """start_router, stop_router, hang_router S, counts;
        start_group G, stop_group G, forget_group G, hang_group G S.

        G: number of a group; S: seconds.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the plane's process has died"
        return line.strip()


def _serve(plane: LocalPlane, verb: str, arguments: list[int]) -> str:
    of_group = {replica.group: replica for replica in plane.groups}
    match verb:
        case "start_router":
            plane.start_router()
        case "stop_router":
            plane.stop_router()
        case "start_group":
            plane.start_group(arguments[0])
        case "stop_group":
            plane.groups[of_group[arguments[0]]].stop()
        case "forget_group":
            plane.forget(of_group[arguments[0]])
        case "hang_group":  # the thread sleeps, the socket stays
            seconds = arguments[1]
            plane.groups[of_group[arguments[0]]].post(lambda: time.sleep(seconds))
        case "hang_router":
            assert plane.router is not None
            seconds = arguments[0]
            plane.router.post(lambda: time.sleep(seconds))
        case "counts":
            assert plane.router is not None
            return json.dumps(plane.router.dispatcher.counts)
    return "ok"


def main() -> None:
    checkpoint, dtype, numbers = sys.argv[1:]
    torch.set_num_threads(1)
    with LocalPlane(checkpoint, dtype=dtype, **json.loads(numbers)) as plane:
        plane.start()
        print(json.dumps(asdict(plane.model)), flush=True)
        for line in sys.stdin:
            verb, *arguments = line.split()
            print(_serve(plane, verb, [int(argument) for argument in arguments]), flush=True)


if __name__ == "__main__":
    main()
