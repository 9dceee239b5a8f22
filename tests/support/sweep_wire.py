"""One malformed request over a real connection, and how it ended."""

import re
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from malformed_case import ANSWERED, CLOSED, RESET, SILENT, RpcCase, WireCase

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")
_INTERIM = re.compile(rb"\AHTTP/1\.[01] 1\d\d.*?\r\n\r\n", re.DOTALL)  # "100 Continue"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
# HPACK as gRPC's own servers write it: the name, one byte of length, the digits. Not every server does.
_GRPC_STATUS = re.compile(rb"grpc-status[\x01\x02](\d{1,2})")
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}
_RST_STREAM, _GOAWAY, _HEADERS, _END_STREAM = 3, 7, 1, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """end: a word of `malformed_case`. text: all that came back, status lines and details included."""

    end: str
    text: bytes
    seconds: float


def http_answer(address: str, case: WireCase, timeout_s: float) -> Answer:
    """Raises OSError where nobody listens."""
    text, is_closed, seconds = _exchange(address, case, timeout_s, _is_whole)
    text = _INTERIM.sub(b"", text)
    status = _STATUS.match(text)
    if status is not None and (is_closed or _is_whole(text)):
        return Answer(end=status[1].decode(), text=text, seconds=seconds)
    return Answer(end=CLOSED if is_closed else SILENT, text=text, seconds=seconds)


def http2_answer(address: str, case: WireCase, timeout_s: float) -> Answer:
    """The end of stream 1, or of the connection. Raises OSError where nobody listens."""
    text, is_closed, seconds = _exchange(address, case, timeout_s, lambda text: _end_of(text) is not None)
    end = _end_of(text)
    code = _GRPC_STATUS.search(text)
    if code is not None:
        end = _CODES.get(int(code[1]), "UNKNOWN")
    return Answer(end=end or (CLOSED if is_closed else SILENT), text=text, seconds=seconds)


def grpc_answer(address: str, case: RpcCase, timeout_s: float) -> Answer:
    """Every RPC is called as one of streams both ways, which is the same on the wire; bytes in, bytes out."""
    begin = time.monotonic()
    # Without a pool of its own, a channel would share the connection that the case before has spoilt.
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]) as channel:
        call = channel.stream_stream(case.method)(
            iter(case.messages),
            metadata=case.metadata,
            timeout=timeout_s,
            compression=grpc.Compression.Gzip if case.gzip else None,
        )
        messages: list[bytes] = []
        try:
            messages.extend(call)
        except grpc.RpcError:  # its code and details are the call's
            pass
        code, details = call.code(), call.details()
    seconds = time.monotonic() - begin
    is_late = code is grpc.StatusCode.DEADLINE_EXCEEDED and seconds >= timeout_s
    text = (details or "").encode() + b"\n" + b"\n".join(messages)
    return Answer(end=SILENT if is_late else code.name, text=text, seconds=seconds)


def _exchange(
    address: str, case: WireCase, timeout_s: float, is_whole: Callable[[bytes], bool]
) -> tuple[bytes, bool, float]:
    """Sends and reads at once, since a server may answer before it has read all. Returns text, closed, seconds."""
    begin = time.monotonic()
    host, _, port = address.rpartition(":")
    text, rest = b"", memoryview(case.wire)
    with socket.create_connection((host.strip("[]"), int(port)), timeout_s) as connection:
        connection.setblocking(False)
        if not rest and case.half_close:
            connection.shutdown(socket.SHUT_WR)
        while (left := begin + timeout_s - time.monotonic()) > 0:
            readable, writable, _ = select.select([connection], [connection] if rest else [], [], left)
            if readable:
                data = _received(connection)
                text += data
                if not data or (not case.half_close and is_whole(text)):
                    return text, not data, time.monotonic() - begin
            elif writable:
                rest = _sent(connection, rest)
                if not rest and case.half_close:
                    _shut(connection)
    return text, False, time.monotonic() - begin


def _received(connection: socket.socket) -> bytes:
    """Empty at the end of the connection, however it came."""
    try:
        return connection.recv(1 << 16)
    except ConnectionError:
        return b""


def _sent(connection: socket.socket, rest: memoryview) -> memoryview:
    """What is still to be sent; nothing, once the other side takes no more."""
    try:
        return rest[connection.send(rest[: 1 << 16]) :]
    except ConnectionError:
        return rest[:0]


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_WR)
    except OSError:  # it is closed already
        pass


def _is_whole(text: bytes) -> bool:
    """True once an HTTP/1 answer is there to its end; one without a length ends with the connection."""
    head, blank, body = _INTERIM.sub(b"", text).partition(b"\r\n\r\n")
    length = _LENGTH.search(head)
    if not blank:
        return False
    return len(body) >= int(length[1]) if length is not None else body.endswith(b"0\r\n\r\n")


def _end_of(text: bytes) -> str | None:
    """How stream 1 or the connection ended, by the HTTP/2 frames so far; None: it has not."""
    at = 0
    while at + 9 <= len(text):
        length, kind, flags = int.from_bytes(text[at : at + 3]), text[at + 3], text[at + 4]
        stream = int.from_bytes(text[at + 5 : at + 9])
        if kind == _GOAWAY:
            return CLOSED
        if stream == 1 and kind == _RST_STREAM:
            return RESET
        if stream == 1 and kind == _HEADERS and flags & _END_STREAM:
            return ANSWERED
        at += 9 + length
    return None
