"""A data plane without compute: the product's router and expert servers, each in a process of its own."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from benchmarks.micro_processes import Peer, until_closed
from benchmarks.serving_process import ChildError
from cluster.router_client import RouterAddress, RouterClient
from cluster.step import Step
from experts.checkpoint import Checkpoint
from experts.handshake import Identity, Role, fresh_incarnation, read_secret, write_secret
from experts.pairs import Pairs
from experts.placement import Placement, Replica
from experts.server import ExpertServer
from experts.shape import MoEShape
from experts.wire import Limits
from router.server import RouterServer
from router.service import make_gate

START_TIMEOUT_S = 120.0
STEP_TIMEOUT_S = 20.0
DISPATCH_TIMEOUT_S = 2.0
MAX_ROWS = 1024
LAYER = 1
_FINGERPRINT = bytes(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneSpec:
    """What all members of one plane agree on."""

    shape: MoEShape
    num_groups: int  # D
    folder: str  # of its sockets and its secret

    @property
    def secret(self) -> bytes:
        return read_secret(Path(self.folder) / "secret")

    @property
    def router_address(self) -> str:
        return f"unix:{self.folder}/router.sock"

    @property
    def limits(self) -> Limits:
        return Limits.of(self.shape, max_rows=MAX_ROWS)

    def identity(self, role: Role) -> Identity:
        return Identity(
            role=role, member_id=role.name.lower(), incarnation=fresh_incarnation(), fingerprint=_FINGERPRINT
        )


class Plane:
    """D expert processes and a router process, and the client that asks them: a context manager."""

    def __init__(self, shape: MoEShape, num_groups: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="em-")
        write_secret(Path(self._folder.name) / "secret")
        self._spec = PlaneSpec(shape=shape, num_groups=num_groups, folder=self._folder.name)
        self._peers: list[Peer] = []
        self._step = Step()
        self._client: RouterClient | None = None
        self.router_pid: int | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def ask(self, x: Tensor, logits: Tensor) -> Tensor:
        """One trip, as an engine makes it for one layer. Raises ChildError where it is not answered."""
        assert self._client is not None
        self._client.ask(LAYER, x, logits, scale=1.0)
        y = self._client.answer(x)
        reason = self._step.take()
        if reason is not None:
            raise ChildError(reason)
        return y

    def _start(self) -> None:
        spec = self._spec
        for group in range(spec.num_groups):
            self._peers.append(Peer(f"experts-{group}", serve_experts, spec, group))
        replicas = [peer.answer(timeout_s=START_TIMEOUT_S) for peer in self._peers]
        router = Peer("router", serve_router, spec, replicas)
        self._peers.append(router)
        router.answer(timeout_s=START_TIMEOUT_S)
        self.router_pid = router.pid
        address = RouterAddress(address=spec.router_address, secret=spec.secret, identity=spec.identity(Role.ATTENTION))
        self._client = RouterClient(address, spec.limits, self._step, step_timeout_s=STEP_TIMEOUT_S)
        self._client.connect(timeout_s=START_TIMEOUT_S)

    def _end(self) -> None:
        for peer in reversed(self._peers):  # the router first, which would try to reach the others again
            peer.end()
        self._folder.cleanup()


class NoCompute:
    """An ExpertFFN whose sums are there already."""

    def __init__(self, hidden_size: int) -> None:
        self._zeros = torch.zeros(MAX_ROWS, hidden_size)

    def __call__(self, layer: int, x: Tensor, pairs: Pairs, out: Tensor | None = None) -> Tensor:
        return self._zeros[: len(x)]


def serve_experts(pipe: Connection, spec: PlaneSpec, group: int) -> None:
    """As experts/group.py does, less weights and lease; sends its Replica."""
    torch.set_num_threads(1)
    server = ExpertServer(
        NoCompute(spec.shape.hidden_size),
        held=spec.shape.home_experts(group, spec.num_groups),
        layers=frozenset(spec.shape.moe_layers),
        dtype=torch.bfloat16,
        num_experts=spec.shape.num_experts,
        address=f"unix:{spec.folder}/e{group}.sock",
        secret=spec.secret,
        fingerprint=_FINGERPRINT,
        incarnation=fresh_incarnation(),
        group=group,
        limits=spec.limits,
    )
    server.start()
    pipe.send(
        Replica(member_id=f"experts-{group}", group=group, address=server.address, incarnation=server.incarnation)
    )
    until_closed(pipe)


def serve_router(pipe: Connection, spec: PlaneSpec, replicas: Sequence[Replica]) -> None:
    """As router/service.py does, less lease and controller; sends None once it has a link to every group."""
    torch.set_num_threads(1)
    server = RouterServer(
        make_gate(_checkpoint(spec.shape)),
        identity=spec.identity(Role.ROUTER),
        secret=spec.secret,
        address=spec.router_address,
        limits=spec.limits,
        num_groups=spec.num_groups,
        dispatch_timeout_s=DISPATCH_TIMEOUT_S,
    )
    server.start()
    server.set_placement(Placement(version=1, num_groups=spec.num_groups, replicas=tuple(replicas)))
    while len(server.connected_groups) < spec.num_groups:  # whoever waits for us has a deadline
        time.sleep(0.01)
    pipe.send(None)
    until_closed(pipe)


def _checkpoint(shape: MoEShape) -> Checkpoint:
    """As much of one as a gate without a bias looks at."""
    return Checkpoint(
        path=Path(),
        config={},
        shape=shape,
        tensors={},
        fingerprint="",
        dtype=torch.bfloat16,
        expert_names={},
        layer_homes={},
    )
