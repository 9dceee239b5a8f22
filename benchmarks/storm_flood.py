"""A flood of requests that costs its sender little: gRPC's frames written by hand, over a few connections.

A client of grpc's takes about as long for a request as the gateway takes to refuse it, and on a machine that both
share, what the flood costs its sender would be counted as what it costs the cluster.
"""

import asyncio
import struct
import time
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count

from cluster.proto.expertmesh.v1 import inference_pb2 as pb

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 0x1, 0x1, 0x4
_WINDOW = (1 << 31) - 1  # bytes: nobody has to be told that something was read
_FRAME_HEADER = struct.Struct("!BHBBI")  # length as 8 and 16 bits, kind, flags, stream
_MESSAGE_HEADER = struct.Struct("!BI")


@dataclass(slots=True)
class Ending:
    """What became of one request; it was refused where it ended without a token."""

    begun_s: float
    ended_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    _unread: bytes = b""

    def take(self, data: bytes, now_s: float) -> None:
        """The next bytes of its messages."""
        self._unread += data
        while len(self._unread) >= _MESSAGE_HEADER.size:
            _, length = _MESSAGE_HEADER.unpack_from(self._unread)
            end = _MESSAGE_HEADER.size + length
            if len(self._unread) < end:
                return
            chunk = pb.GenerateChunk.FromString(self._unread[_MESSAGE_HEADER.size : end])
            self.token_times_s += [now_s] * len(chunk.token_ids)
            self._unread = self._unread[end:]


class Connection(asyncio.Protocol):
    """One connection to a gateway without keys or TLS. `ended` has the requests that are over."""

    def __init__(self, timeout_s: int) -> None:
        headers = (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", b"/expertmesh.v1.Inference/GenerateStream"),
            (b":authority", b"localhost"),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"grpc-timeout", b"%dS" % timeout_s),
        )
        # HPACK without its tables (RFC 7541, 6.2.2): every name and value as it is, each shorter than 127 bytes.
        self._headers = b"".join(b"\0%c%b%c%b" % (len(name), name, len(value), value) for name, value in headers)
        self._streams = count(1, 2)
        self._open: dict[int, Ending] = {}
        self._received = b""
        self._is_idle = asyncio.Event()
        self.ended: list[Ending] = []

    def send(self, request: pb.GenerateRequest) -> None:
        stream, message = next(self._streams), request.SerializeToString()
        self._open[stream] = Ending(time.monotonic())
        self._is_idle.clear()
        self._transport.writelines(
            [
                _frame(_HEADERS, self._headers, flags=_END_HEADERS, stream=stream),
                _frame(_DATA, _MESSAGE_HEADER.pack(0, len(message)) + message, flags=_END_STREAM, stream=stream),
            ]
        )

    async def answered(self, timeout_s: float) -> None:
        """Returns when no request is open any more, or the time is over."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._is_idle.wait(), timeout_s)

    def close(self) -> None:
        self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        windows = struct.pack("!HI", 4, _WINDOW)  # SETTINGS_INITIAL_WINDOW_SIZE; the connection's is 65,535 by itself
        more = _frame(_WINDOW_UPDATE, struct.pack("!I", _WINDOW - 65535))
        transport.write(_PREFACE + _frame(_SETTINGS, windows) + more)

    def data_received(self, data: bytes) -> None:
        now_s = time.monotonic()
        received, begin = self._received + data, 0
        while len(received) - begin >= _FRAME_HEADER.size:
            high, low, kind, flags, stream = _FRAME_HEADER.unpack_from(received, begin)
            end = begin + _FRAME_HEADER.size + (high << 16 | low)
            if len(received) < end:
                break
            self._on_frame(kind, flags, stream, received[begin + _FRAME_HEADER.size : end], now_s)
            begin = end
        self._received = received[begin:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.clear()  # they are in no list, and who counts misses them
        self._is_idle.set()

    def _on_frame(self, kind: int, flags: int, stream: int, payload: bytes, now_s: float) -> None:
        if kind in (_SETTINGS, _PING) and not flags & _ACK:
            self._transport.write(_frame(kind, payload if kind == _PING else b"", flags=_ACK))
        elif kind == _GOAWAY:
            self._transport.close()
        elif (request := self._open.get(stream)) is not None:
            if kind == _DATA:
                request.take(payload, now_s)
            if kind == _RST_STREAM or (kind in (_DATA, _HEADERS) and flags & _END_STREAM):
                request.ended_s = now_s
                self.ended.append(self._open.pop(stream))
                if not self._open:
                    self._is_idle.set()


def _frame(kind: int, payload: bytes, *, flags: int = 0, stream: int = 0) -> bytes:
    return _FRAME_HEADER.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload
