"""Connections of the data plane: addresses, how a client connects, how bytes go out and come in."""

import os
import socket
import stat
import time
from collections.abc import Sequence

from experts.errors import ConfigError, HandshakeError, LinkError
from experts.handshake import GREETING_BYTES, WELCOME_BYTES, ClientSide, Identity, Welcome
from experts.wire import FrameReader, Header, Limits, encode

Bytes = bytes | bytearray | memoryview

MAX_UNIX_PATH_BYTES = 107
_BACKLOG = 512  # a full one refuses Unix clients at once, even those that would wait
_SOCKET_BUFFER_BYTES = 4 << 20  # the kernel takes what its own limit allows


def listen(address: str) -> tuple[socket.socket, str]:
    """A listening socket and its address with the real port.

    address: `unix:/path`, or `tcp:host:port` (port 0: any free one).
    A Unix socket file that is already there is replaced: its owner is gone, or hands over.
    """
    scheme, _, rest = address.partition(":")
    if scheme == "unix":
        if len(rest.encode()) > MAX_UNIX_PATH_BYTES:
            raise ConfigError(
                f"socket path {rest} is longer than {MAX_UNIX_PATH_BYTES} bytes: use a shorter runtime_dir"
            )
        server = socket.socket(socket.AF_UNIX)
        if os.path.exists(rest) and stat.S_ISSOCK(os.stat(rest).st_mode):
            os.unlink(rest)
        server.bind(rest)
        os.chmod(rest, 0o600)
    elif scheme == "tcp":
        host, port = _host_port(rest)
        server = socket.create_server((host, port))
        address = f"tcp:{host}:{server.getsockname()[1]}"
    else:
        raise ConfigError(f"address {address!r} must begin with unix: or tcp:")
    server.listen(_BACKLOG)
    server.setblocking(False)
    return server, address


def socket_id(address: str) -> int | None:
    """What tells a Unix socket's file from a later one of the same name; None for TCP."""
    scheme, _, path = address.partition(":")
    return os.stat(path).st_ino if scheme == "unix" else None


def unlink_if_ours(address: str, known_id: int | None) -> None:
    """Removes a Unix socket's file, unless a successor has put its own there."""
    try:
        if known_id is not None and socket_id(address) == known_id:
            os.unlink(address.partition(":")[2])
    except OSError:
        pass  # gone already, with its folder


def connect(address: str, secret: bytes, identity: Identity, *, timeout_s: float) -> tuple[socket.socket, Welcome]:
    """A blocking, authenticated connection. Raises LinkError (HandshakeError) within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    try:
        sock = _connect(address, timeout_s)
    except (OSError, ValueError, ConfigError) as error:  # ValueError: a host name that cannot be encoded
        raise LinkError(f"{address}: {error}") from None
    try:
        client = ClientSide(secret, identity)
        sock.sendall(client.hello(_receive_exactly(sock, GREETING_BYTES, deadline)))
        return sock, client.check(_receive_exactly(sock, WELCOME_BYTES, deadline))
    except (OSError, LinkError) as error:
        sock.close()
        # A server that refuses us closes the connection without a word, so name the usual reasons.
        if isinstance(error, HandshakeError):
            raise
        raise LinkError(f"{address}: no handshake ({error}): dead, busy, or another secret or checkpoint") from None


def tune(sock: socket.socket) -> None:
    """Socket options of every data-plane connection."""
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)


class BlockingLink:
    """A client's end for one question at a time: every call ends by its deadline or raises LinkError."""

    def __init__(self, sock: socket.socket, limits: Limits) -> None:
        self._sock = sock
        self._limits = limits
        self._reader = FrameReader(limits)

    def send(self, header: Header, parts: Sequence[Bytes], *, deadline_s: float) -> None:
        """Sends one frame. deadline_s: on time.monotonic()."""
        pending: list[Bytes] = [encode(header, self._limits), *parts]
        try:
            while pending:
                self._sock.settimeout(_left(deadline_s))
                pending = _drop(pending, self._sock.sendmsg(pending))
        except OSError as error:
            raise LinkError(str(error) or type(error).__name__) from None

    def receive(self, *, deadline_s: float) -> tuple[Header, memoryview]:
        """The next frame; its payload stays valid until the next call. Raises LinkError, TimeoutError."""
        while (frame := self._reader.next_frame()) is None:
            room = self._reader.writable()
            try:
                self._sock.settimeout(_left(deadline_s))
                count = self._sock.recv_into(room)
            except TimeoutError:
                raise
            except OSError as error:
                raise LinkError(str(error)) from None
            if count == 0:
                raise LinkError("the peer closed the connection")
            self._reader.wrote(count)
        return frame

    def close(self) -> None:
        self._sock.close()


class Conn:
    """A non-blocking end of a link, owned by one event loop."""

    def __init__(self, sock: socket.socket, limits: Limits, *, name: str) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.name = name
        self.peer: Identity | Welcome | None = None  # None until the handshake is done
        self._limits = limits
        self._reader: FrameReader | None = None
        self._out: list[Bytes] = []
        self._early = bytearray()  # of a handshake message that is not complete
        self.moved_s = 0.0  # when something that waited was last taken by the socket

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def wants_write(self) -> bool:
        return bool(self._out)

    def send(self, header: Header, parts: Sequence[Bytes] = ()) -> None:
        """Sends one frame, or queues what the socket does not take at once. Raises LinkError."""
        self.send_bytes([encode(header, self._limits), *parts])

    def send_bytes(self, parts: Sequence[Bytes]) -> None:
        if self._out:
            # Order is kept behind what waits already; views are copied, their buffers will be reused.
            self._out.extend(bytes(part) for part in parts)
            return
        try:
            rest = _drop(list(parts), self.sock.sendmsg(parts))
        except BlockingIOError:
            rest = list(parts)
        except OSError as error:
            raise LinkError(f"{self.name}: {error}") from None
        self._out = [bytes(part) for part in rest]
        self.moved_s = time.monotonic()

    def flush(self) -> None:
        """Sends what waits, as far as the socket takes it. Raises LinkError."""
        try:
            while self._out:
                self._out = _drop(self._out, self.sock.sendmsg(self._out[:16]))
                self.moved_s = time.monotonic()
        except BlockingIOError:
            return
        except OSError as error:
            raise LinkError(f"{self.name}: {error}") from None

    def receive(self) -> bool:
        """Takes what the socket has into the reader. False where there was nothing. Raises LinkError."""
        if self._reader is None:
            self._reader = FrameReader(self._limits)
        try:
            count = self.sock.recv_into(self._reader.writable())
        except BlockingIOError:
            return False
        except OSError as error:
            raise LinkError(f"{self.name}: {error}") from None
        if count == 0:
            raise LinkError(f"{self.name}: closed by the peer")
        self._reader.wrote(count)
        return True

    def next_frame(self) -> tuple[Header, memoryview] | None:
        return None if self._reader is None else self._reader.next_frame()

    def receive_handshake(self, num_bytes: int) -> bytes | None:
        """Exactly `num_bytes` before any frame, or None while they are not all there. Raises LinkError."""
        try:
            # Taken at once: bytes left in the socket would wake the loop again and again.
            piece = self.sock.recv(num_bytes - len(self._early))
        except BlockingIOError:
            return None
        except OSError as error:
            raise LinkError(f"{self.name}: {error}") from None
        if not piece:
            raise LinkError(f"{self.name}: closed in the handshake")
        self._early += piece
        return bytes(self._early) if len(self._early) == num_bytes else None

    def close(self) -> None:
        self.sock.close()


def _connect(address: str, timeout_s: float) -> socket.socket:
    scheme, _, rest = address.partition(":")
    if scheme == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(timeout_s)
        try:
            sock.connect(rest)
        except OSError:
            sock.close()
            raise
    else:
        sock = socket.create_connection(_host_port(rest), timeout=timeout_s)
    tune(sock)
    return sock


def _host_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not port.isdecimal():
        raise ConfigError(f"address tcp:{text} must end with a port")
    return host.strip("[]"), int(port)


def _receive_exactly(sock: socket.socket, num_bytes: int, deadline: float) -> bytes:
    received = b""
    while len(received) < num_bytes:
        sock.settimeout(_left(deadline))
        piece = sock.recv(num_bytes - len(received))
        if not piece:
            raise LinkError("closed by the peer")
        received += piece
    return received


def _left(deadline_s: float) -> float:
    """Seconds until the deadline. Raises TimeoutError after it, so that a peer which drips bytes cannot stretch it."""
    left = deadline_s - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline has passed")
    return max(left, 0.001)  # a settimeout of 0 would mean non-blocking


def _drop(parts: list[Bytes], sent: int) -> list[Bytes]:
    """What is left of `parts` when their first `sent` bytes are gone."""
    for index, part in enumerate(parts):
        size = part.nbytes if isinstance(part, memoryview) else len(part)
        if sent < size:
            return [memoryview(part)[sent:] if sent else part, *parts[index + 1 :]]
        sent -= size
    return []
