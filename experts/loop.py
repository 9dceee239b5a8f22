"""The event loop that every data-plane server runs on a thread of its own: accept, authenticate, frames in and out.

A subclass decides what frames mean: `on_frame` for each, `on_pass` once all that was readable has been read.
One thread owns all its sockets, so nothing here is locked; other threads talk to it through `post`.
"""

import logging
import select
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable

from experts.errors import HandshakeError, LinkError
from experts.handshake import HELLO_BYTES, Role, ServerSide, Welcome
from experts.link import Bytes, Conn, listen, socket_id, tune, unlink_if_ours
from experts.wire import Header, Limits

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 2.0
MAX_PENDING_HANDSHAKES = 64
STALL_TIMEOUT_S = 15.0  # a peer that has taken nothing of what waits for it for so long is gone
TICK_S = 0.05
_READ = select.EPOLLIN | select.EPOLLRDHUP
_GONE = select.EPOLLHUP | select.EPOLLERR


class DataPlaneLoop(threading.Thread):
    """One listening address and the links opened to it or handed to it, served until `stop`."""

    def __init__(
        self,
        *,
        address: str,
        secret: bytes,
        fingerprint: bytes,
        incarnation: int,
        group: int,
        roles: frozenset[Role],
        limits: Limits,
        name: str,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.limits = limits
        self.incarnation = incarnation
        self.refused: Counter[str] = Counter()  # links refused or cut, by reason
        self._server_side = lambda: ServerSide(
            secret, fingerprint=fingerprint, incarnation=incarnation, group=group, roles=roles
        )
        self._listener, self.address = listen(address)
        self._socket_id = socket_id(self.address)
        self._epoll = select.epoll()
        self._waker, self._wakee = socket.socketpair()
        self._waker.setblocking(False)  # a loop that is stuck must not hang those who post to it
        self._wakee.setblocking(False)
        self._posted: deque[Callable[[], None]] = deque()
        self._conns: dict[int, Conn] = {}
        self._shaking: dict[int, tuple[ServerSide, float]] = {}  # fileno -> handshake, its deadline
        self._writing: set[int] = set()
        self._stopping = False
        self._beat_s = time.monotonic()
        for fd in (self._listener.fileno(), self._wakee.fileno()):
            self._epoll.register(fd, select.EPOLLIN)

    # What a subclass says.

    def on_open(self, conn: Conn) -> None:
        """A link is authenticated; `conn.peer` says who it is."""

    def on_frame(self, conn: Conn, header: Header, payload: memoryview) -> None:
        """One frame; `payload` stays valid until `on_pass` has returned."""
        raise NotImplementedError  # abstract: a loop without a meaning for frames is of no use

    def on_close(self, conn: Conn) -> None:
        """An authenticated link is gone."""

    def on_pass(self) -> None:
        """Everything that was readable has been given to on_frame."""

    def on_round(self, woke_s: float, now_s: float) -> None:
        """One time round the loop has taken from woke_s to now_s, waiting not counted; on time.monotonic()."""

    def on_tick(self, now_s: float) -> None:
        """About every `tick_s`; `now_s` on time.monotonic()."""

    @property
    def tick_s(self) -> float:
        """From this tick to the next; asked after each."""
        return TICK_S

    # What others may call.

    def post(self, action: Callable[[], None]) -> None:
        """Runs `action` on the loop's thread, soon."""
        self._posted.append(action)
        try:
            self._waker.send(b"\0")
        except OSError:
            pass  # the loop has stopped, or has a wake-up waiting

    def drain(self, timeout_s: float) -> None:
        """Waits until nobody has a link to us any more: whoever learns that we leave cuts its own."""
        deadline_s = time.monotonic() + timeout_s
        while self._conns and self.is_alive() and time.monotonic() < deadline_s:
            time.sleep(0.01)

    def stop(self, timeout_s: float = 5.0) -> None:
        """Closes every link and ends the thread."""
        self._stopping = True
        self.post(lambda: None)
        if self.is_alive():
            self.join(timeout_s)

    @property
    def silent_s(self) -> float:
        """Seconds since the loop last came round; what a health check asks."""
        return time.monotonic() - self._beat_s

    # For subclasses, on the loop's thread.

    def beat(self) -> float:
        """Says that the loop is alive, also in the middle of long work; the time, on time.monotonic()."""
        self._beat_s = time.monotonic()
        return self._beat_s

    def adopt(self, sock: socket.socket, welcome: Welcome, *, name: str) -> Conn:
        """Takes over a link that was opened, and authenticated, from this side."""
        conn = Conn(sock, self.limits, name=name)
        conn.peer = welcome
        self._conns[conn.fileno()] = conn
        self._epoll.register(conn.fileno(), _READ)
        return conn

    def send(self, conn: Conn, header: Header, *parts: Bytes) -> bool:
        """Sends or queues a frame. False where the link is gone (on_close has been called then)."""
        try:
            conn.send(header, parts)
        except LinkError as error:
            self.drop(conn, str(error))
            return False
        self._watch_writes(conn)
        return True

    def drop(self, conn: Conn, reason: str) -> None:
        """Closes a link and says so once."""
        fd = conn.fileno()
        if fd < 0 or self._conns.pop(fd, None) is None:
            return
        self._shaking.pop(fd, None)
        self._writing.discard(fd)
        self._epoll.unregister(fd)
        conn.close()
        log.info("link closed", extra={"link": conn.name, "reason": reason})
        if conn.peer is not None:
            self.on_close(conn)

    # The loop.

    def run(self) -> None:
        try:
            self._run()
        finally:
            self._shut()  # also after an error: peers see a reset at once and not a silence

    def _run(self) -> None:
        next_tick_s = time.monotonic() + TICK_S
        while not self._stopping:
            events = self._epoll.poll(max(next_tick_s - time.monotonic(), 0))
            woke_s = time.monotonic()
            for fd, event in events:
                self._handle(fd, event)
            while self._posted:
                self._posted.popleft()()
            self.on_pass()
            now_s = self.beat()
            self.on_round(woke_s, now_s)
            if now_s >= next_tick_s:
                self._expire(now_s)
                self.on_tick(now_s)
                next_tick_s = now_s + self.tick_s

    def _handle(self, fd: int, event: int) -> None:
        if fd == self._listener.fileno():
            self._accept()
        elif fd == self._wakee.fileno():
            self._wakee.recv(4096)
        elif (conn := self._conns.get(fd)) is not None:
            try:
                self._serve(conn, event)
            except HandshakeError as error:
                self._refuse(conn, "handshake", str(error))
            except LinkError as error:
                # Both a dead peer and a malformed frame end this link, and no other.
                self._refuse(conn, type(error).__name__, str(error))
            except Exception as error:  # a bug of ours, that one frame has found: it ends that link only
                log.exception("frame not served", extra={"link": conn.name})
                self._refuse(conn, "internal", str(error))

    def _serve(self, conn: Conn, event: int) -> None:
        if conn.peer is None:
            self._shake(conn)
            return
        if event & select.EPOLLOUT:
            conn.flush()
            self._watch_writes(conn)
        if event & (_READ | _GONE) and conn.receive():
            while (frame := conn.next_frame()) is not None:
                self.on_frame(conn, *frame)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            # Out of file descriptors, most likely: the next tick asks again, and not the next moment.
            log.warning("link not accepted", extra={"reason": str(error)})
            self._epoll.modify(self._listener.fileno(), 0)
            return
        if len(self._shaking) >= MAX_PENDING_HANDSHAKES:
            # The oldest goes: an honest peer proves itself in a moment, those who only hold a place do not.
            self._refuse(self._conns[next(iter(self._shaking))], "pending", "too many links without a proof")
        try:
            tune(sock)
        except OSError:  # reset already
            sock.close()
            return
        conn = Conn(sock, self.limits, name=f"{self.name} from {sock.fileno()}")
        handshake = self._server_side()
        self._conns[conn.fileno()] = conn
        self._shaking[conn.fileno()] = handshake, time.monotonic() + HANDSHAKE_TIMEOUT_S
        self._epoll.register(conn.fileno(), _READ)
        try:
            conn.send_bytes([handshake.greeting])
        except LinkError as error:
            self.drop(conn, str(error))

    def _shake(self, conn: Conn) -> None:
        hello = conn.receive_handshake(HELLO_BYTES)
        if hello is None:
            return
        handshake, _ = self._shaking.pop(conn.fileno())
        identity, welcome = handshake.answer(hello)
        conn.peer = identity
        conn.name = f"{self.name} from {identity.role.name.lower()} {identity.member_id}"
        conn.send_bytes([welcome])
        self._watch_writes(conn)
        self.on_open(conn)

    def _refuse(self, conn: Conn, kind: str, reason: str) -> None:
        self.refused[kind] += 1
        if conn.peer is None:
            log.warning("link refused", extra={"link": conn.name, "reason": reason})
        self.drop(conn, reason)

    def _expire(self, now_s: float) -> None:
        self._epoll.modify(self._listener.fileno(), select.EPOLLIN)
        for fd, (_, deadline_s) in list(self._shaking.items()):
            if now_s > deadline_s:
                self._refuse(self._conns[fd], "handshake", "no proof in time")
        for conn in [self._conns[fd] for fd in self._writing]:
            if now_s - conn.moved_s > STALL_TIMEOUT_S:
                self._refuse(conn, "stalled", "does not take what it is sent")

    def _watch_writes(self, conn: Conn) -> None:
        fd = conn.fileno()
        if conn.wants_write != (fd in self._writing):
            self._epoll.modify(fd, _READ | (select.EPOLLOUT if conn.wants_write else 0))
            (self._writing.add if conn.wants_write else self._writing.discard)(fd)

    def _shut(self) -> None:
        for conn in list(self._conns.values()):
            conn.peer = None  # no on_close: nobody is left to react
            self.drop(conn, "stopping")
        self._listener.close()
        unlink_if_ours(self.address, self._socket_id)
        self._epoll.close()
        self._waker.close()
        self._wakee.close()
