"""The data plane of a router: questions from attention engines in, rows to expert replicas out, sums back."""

import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from experts.counting import MAX_NOTES
from experts.errors import FrameError
from experts.handshake import Identity, Role, Welcome
from experts.link import Bytes, Conn, connect
from experts.loop import DataPlaneLoop
from experts.placement import Placement, Replica
from experts.room import Room
from experts.server import TORCH_DTYPES
from experts.wire import DType, Header, Kind, Limits
from router.dispatch import Dispatcher, Gate
from router.jobs import Failure, Job

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
RECONNECT_S = 0.25
LEAVE_S = 1.0  # a copy that leaves the placement may answer what it has been asked
BUSY_TICK_S = 0.01  # by so much rows are asked elsewhere too late at most
_NUMPY = {DType.FLOAT32: np.dtype(np.float32), DType.BFLOAT16: np.dtype(np.uint16), DType.FLOAT16: np.dtype(np.float16)}


class RouterServer(DataPlaneLoop):
    """Owns the links of one router; what to do with their frames is Dispatcher's business."""

    def __init__(
        self,
        gate: Gate,
        *,
        identity: Identity,
        secret: bytes,
        address: str,
        limits: Limits,
        num_groups: int,
        dispatch_timeout_s: float,
        capacity_factor: float | None = None,
    ) -> None:
        super().__init__(
            address=address,
            secret=secret,
            fingerprint=identity.fingerprint,
            incarnation=identity.incarnation,
            group=-1,
            roles=frozenset({Role.ATTENTION}),
            limits=limits,
            name="router",
        )
        self._identity = identity
        self._secret = secret
        self.dispatcher: Dispatcher[Conn] = Dispatcher(
            gate,
            self,  # this loop is the dispatcher's Transport, see send_rows
            num_experts=limits.num_experts,
            num_groups=num_groups,
            dispatch_timeout_s=dispatch_timeout_s,
            capacity_factor=capacity_factor,
        )
        self.combine_notes: deque[float] = deque(maxlen=MAX_NOTES)  # seconds from each answer's last partial sums on
        self._connecting = ThreadPoolExecutor(max_workers=4, thread_name_prefix="router-connect")
        self._links: dict[Replica, Conn] = {}
        self._replicas: dict[Conn, Replica] = {}
        self._tried_s: dict[Replica, float] = {}  # when a connect was last begun
        self._pending: set[Replica] = set()
        self._leaving: dict[Replica, float] = {}  # out of the placement, and when its link is cut at the latest

    # Transport, for the dispatcher.

    def send_rows(self, replica: Replica, header: Header, parts: Sequence[Bytes]) -> bool:
        conn = self._links.get(replica)
        return conn is not None and self.send(conn, header, *parts)

    # Events of the loop.

    def on_frame(self, conn: Conn, header: Header, payload: memoryview) -> None:
        replica = self._replicas.get(conn)
        now_s = time.monotonic()
        if replica is None:
            self._on_question(conn, header, payload, now_s)
        elif header.kind is Kind.PARTIAL:
            partial = np.frombuffer(payload, dtype=np.float32).reshape(header.num_rows, -1)
            job = self.dispatcher.on_partial(replica, header, partial, now_s=now_s)
            if job is not None:
                self._answer(job, begun_s=now_s)
        elif header.kind is Kind.NACK:
            self.dispatcher.on_nack(replica, header, now_s=now_s)
        else:
            raise FrameError(f"{header.kind.name} frame from an expert group")

    def on_close(self, conn: Conn) -> None:
        replica = self._replicas.pop(conn, None)
        if replica is None:
            self.dispatcher.on_asker_gone(conn)
        elif self._links.get(replica) is conn:
            del self._links[replica]
            log.warning("expert replica lost", extra={"replica": replica.member_id, "group": replica.group})
            self._tried_s.pop(replica, None)
            self.dispatcher.on_replica_down(replica, now_s=time.monotonic())

    def on_tick(self, now_s: float) -> None:
        for conn, failure in self.dispatcher.on_tick(now_s):
            self._fail(conn, failure)
        self._keep_links(now_s)

    @property
    def tick_s(self) -> float:
        """Shorter while somebody waits: nothing is asked elsewhere before the first tick (HEDGE_FLOOR_S)."""
        return BUSY_TICK_S if self.dispatcher.open_questions else super().tick_s

    # What others may call, from any thread.

    def set_placement(self, placement: Placement) -> None:
        self.post(lambda: self._on_placement(placement))

    @property
    def connected_groups(self) -> frozenset[int]:
        return frozenset(replica.group for replica in list(self._links))

    def stop(self, timeout_s: float = 5.0) -> None:
        super().stop(timeout_s)
        self._connecting.shutdown(wait=False, cancel_futures=True)

    # Questions and answers.

    def _on_question(self, conn: Conn, header: Header, payload: memoryview, now_s: float) -> None:
        if header.kind is not Kind.QUESTION:
            raise FrameError(f"{header.kind.name} frame from an attention engine")
        num_rows, hidden_size = header.num_rows, self.limits.hidden_size
        x_bytes = num_rows * hidden_size * header.dtype.itemsize
        x = np.frombuffer(payload[:x_bytes], dtype=_NUMPY[header.dtype]).reshape(num_rows, hidden_size)
        logits = np.frombuffer(payload[x_bytes:], dtype=_NUMPY[header.logits_dtype]).reshape(num_rows, -1)
        self.dispatcher.on_question(conn, header, x, logits, now_s=now_s)

    def _answer(self, job: Job[Conn], *, begun_s: float) -> None:
        header = job.header
        y = to_wire(job.y, header.dtype, job.room, truncate=header.truncate)
        self.combine_notes.append(time.monotonic() - begun_s)
        answer = Header(
            Kind.ANSWER,
            dtype=header.dtype,
            layer=header.layer,
            num_rows=len(y),
            num_extra=job.dropped_rows,
            seq=header.seq,
        )
        self.send(job.asker, answer, y.data.cast("B"))

    def _fail(self, conn: Conn, failure: Failure) -> None:
        log.warning("question failed", extra={"link": conn.name, "reason": failure.reason})
        text = failure.reason.encode()
        header = Header(Kind.FAILURE, num_extra=len(text), seq=failure.seq)
        self.send(conn, header, text)

    # Links to the expert replicas.

    def _on_placement(self, placement: Placement) -> None:
        if placement.version <= self.dispatcher.placement.version:
            return
        log.info("placement", extra={"version": placement.version, "replicas": len(placement.replicas)})
        # First the snapshot, then the links: rows of a dropped link are sent by the new placement.
        self.dispatcher.on_placement(placement, now_s=time.monotonic())
        wanted = set(placement.replicas)
        leaving_s = time.monotonic() + LEAVE_S
        self._leaving = {r: self._leaving.get(r, leaving_s) for r in self._links if r not in wanted}
        self._tried_s = {replica: at for replica, at in self._tried_s.items() if replica in wanted}
        self._keep_links(time.monotonic())

    def _keep_links(self, now_s: float) -> None:
        """Cuts the links to those who left and owe nothing any more, and opens those that the placement names.

        Opened on other threads, since a hung peer may take seconds.
        """
        for replica, cut_s in list(self._leaving.items()):
            if now_s > cut_s or not self.dispatcher.owes(replica):
                del self._leaving[replica]
                if replica in self._links:
                    self.drop(self._links[replica], "left the placement")
        for replica in self.dispatcher.placement.replicas:
            if replica in self._links or replica in self._pending or now_s < self._tried_s.get(replica, 0.0):
                continue
            self._tried_s[replica] = now_s + RECONNECT_S
            self._pending.add(replica)
            future = self._connecting.submit(
                connect, replica.address, self._secret, self._identity, timeout_s=CONNECT_TIMEOUT_S
            )
            future.add_done_callback(lambda done, replica=replica: self.post(lambda: self._on_connected(replica, done)))

    def _on_connected(self, replica: Replica, future: Future) -> None:  # type: ignore[type-arg]
        self._pending.discard(replica)
        try:
            sock, welcome = future.result()
        except Exception as error:  # LinkError for what a network does; whatever else it is, it is tried again
            log.info("expert replica not reached", extra={"replica": replica.member_id, "reason": str(error)})
            return
        if replica not in self.dispatcher.placement.replicas or not _is(welcome, replica):
            sock.close()
            return
        conn = self.adopt(sock, welcome, name=f"router to {replica.member_id}")
        self._links[replica] = conn
        self._replicas[conn] = replica
        self.dispatcher.on_replica_up(now_s=time.monotonic())


def to_wire(y: NDArray[np.float32], dtype: DType, room: Room, *, truncate: bool = False) -> NDArray[np.generic]:
    """float32 sums in the type the asker wants; bfloat16 as uint16 bits.

    truncate: cut off the low bits of a bfloat16, as some builds of vLLM's kernel do; else to nearest, ties to even.
    """
    if dtype is DType.FLOAT32:
        return y
    rounded = room.take(y.shape, _NUMPY[dtype])
    if dtype is DType.BFLOAT16 and truncate:
        np.right_shift(y.view(np.uint32), 16, out=rounded, casting="unsafe")
    else:
        torch.from_numpy(rounded).view(TORCH_DTYPES[dtype]).copy_(torch.from_numpy(y))
    return rounded


def _is(welcome: Welcome, replica: Replica) -> bool:
    """Whether the process that answered is the one that registered: not a newer one at the same address."""
    return welcome.incarnation == replica.incarnation and welcome.group == replica.group
