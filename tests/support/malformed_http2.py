"""HTTP/2 that is not quite HTTP/2, for a port that speaks gRPC: frames written by hand."""

import hashlib
import struct
from collections.abc import Iterator, Sequence

from malformed_case import CORE_GONE, CORE_REFUSED, GRPC_GARBAGE, Http1, WireCase, get
from malformed_grpc import GENERATE, RPCS

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED = 0x1, 0x1, 0x4, 0x8

Header = tuple[str, str]


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0, length: int | None = None) -> bytes:
    """length: what the frame says of itself; None: the truth."""
    said = len(payload) if length is None else length
    return struct.pack("!I", said)[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def block(headers: Sequence[Header]) -> bytes:
    """HPACK without its tables: every name and value as it is."""
    texts = (text.encode("latin-1") for header in headers for text in header)
    sized = [_size(len(text)) + text for text in texts]
    return b"".join(b"\0" + name + value for name, value in zip(sized[::2], sized[1::2]))


def message(payload: bytes, *, compressed: int = 0, length: int | None = None) -> bytes:
    """gRPC's five bytes before each message, and the message."""
    return struct.pack("!BI", compressed, len(payload) if length is None else length) + payload


_START = PREFACE + frame(SETTINGS)
_GOOD = message(RPCS[0].request)


def http2_cases(key: str | None) -> Iterator[WireCase]:
    call = _call(key)
    yield from (_ended(what, wire) for what, wire in _openings().items())
    yield from (_ended(what, _START + wire) for what, wire in _frames(call).items())
    for what, request in (
        ("a GET", get("/v1/models")),
        ("a POST", Http1()),
        ("a POST of another path", Http1(target="/")),
    ):
        yield _ended(f"{what} of HTTP/1", request.wire(key))
    for what, changed in _calls(call).items():
        # What has no path is no call of anything, and gRPC's server drops it.
        yield _asked(what, changed, _GOOD, CORE_REFUSED | {"CANCELLED" if what == "the path ''" else "OK"})
    for what, payload in _payloads().items():
        yield _asked(what, call, payload)
    noise = [*_call(None), ("authorization", "Bearer \xff\xfe")]
    twice = [*call, ("authorization", "Bearer x"), ("authorization", "Bearer y")]
    denied = GRPC_GARBAGE | {"UNAUTHENTICATED"} | (frozenset() if key else {"OK"})
    yield _asked("three authorizations", twice, _GOOD, denied)
    yield _asked("noise as authorization", noise, _GOOD, denied)


def _call(key: str | None) -> list[Header]:
    """The headers of an RPC that is in order."""
    pseudo = [(":method", "POST"), (":scheme", "http"), (":path", GENERATE), (":authority", "localhost")]
    own = [] if key is None else [("authorization", f"Bearer {key}")]
    return [*pseudo, ("te", "trailers"), ("content-type", "application/grpc"), *own]


def _openings() -> dict[str, bytes]:
    return {
        "the preface only": PREFACE,
        "half of the preface": PREFACE[:12],
        "a preface that goes wrong": PREFACE[:-4] + b"XX\r\n",
        "no settings": PREFACE + frame(PING, bytes(8)),
        "settings on a stream": PREFACE + frame(SETTINGS, stream=5),
        "settings of 5 bytes": PREFACE + frame(SETTINGS, bytes(5)),
        "an answer to no settings": PREFACE + frame(SETTINGS, bytes(6), flags=ACK),
        "a window of 2^31": PREFACE + frame(SETTINGS, struct.pack("!HI", 4, 2**31)),
        "frames of at most 0 bytes": PREFACE + frame(SETTINGS, struct.pack("!HI", 5, 0)),
        "an unknown setting": PREFACE + frame(SETTINGS, struct.pack("!HI", 0xFFFF, 2**32 - 1)),
        "settings cut short": PREFACE + frame(SETTINGS, bytes(3), length=6),
        "half of a frame's head": PREFACE + frame(SETTINGS)[:5],
        "settings of 16 MiB": PREFACE + frame(SETTINGS, bytes(1000), length=2**24 - 1),
        "noise": b"".join(hashlib.sha256(bytes([i])).digest() for i in range(32)),
        "nothing": b"",
        "a TLS hello": bytes.fromhex("16030100680100006403036a") + bytes(range(32)) + b"\0\0\2\x13\1\1\0" + bytes(57),
        "a settings flood": PREFACE + frame(SETTINGS, struct.pack("!HI", 3, 100)) * 1000,
        "a flood of answers to no settings": PREFACE + frame(SETTINGS) + frame(SETTINGS, flags=ACK) * 1000,
    }


def _frames(call: Sequence[Header]) -> dict[str, bytes]:
    """Behind a good start."""
    head = frame(HEADERS, block(call), flags=END_HEADERS, stream=1)
    part = block(call)[:20]
    streams = range(1, 401, 2)
    resets = b"".join(
        frame(HEADERS, block(call), flags=END_HEADERS, stream=i) + frame(RST_STREAM, struct.pack("!I", 8), stream=i)
        for i in streams
    )
    return {
        "a frame of 16 MiB": frame(DATA, bytes(100), stream=1, length=2**24 - 1),
        "a frame of an unknown kind": frame(0xFA, bytes(100), stream=1),
        "200 streams that are reset at once": resets,
        "resets of streams that never were": b"".join(frame(RST_STREAM, bytes(4), stream=i) for i in streams),
        "a reset of 3 bytes": head + frame(RST_STREAM, bytes(3), stream=1),
        "a reset of stream 0": frame(RST_STREAM, bytes(4)),
        "a ping flood": frame(PING, bytes(8)) * 1000,
        "a ping of 7 bytes": frame(PING, bytes(7)),
        "a ping on a stream": frame(PING, bytes(8), stream=1),
        "data on stream 0": frame(DATA, b"hi"),
        "data on a stream that is not open": frame(DATA, b"hi", stream=7),
        "data behind the end of a stream": head + frame(DATA, _GOOD, flags=END_STREAM, stream=1) * 2,
        "padding that is longer than its frame": head + frame(DATA, b"\xffhi", flags=PADDED, stream=1),
        "a flood of empty data": head + frame(DATA, stream=1) * 5000,
        "headers on stream 0": frame(HEADERS, block(call), flags=END_HEADERS),
        "headers on stream 2": frame(HEADERS, block(call), flags=END_HEADERS, stream=2),
        "headers without an end": frame(HEADERS, part, stream=1),
        "headers without an end, and then data": frame(HEADERS, part, stream=1) + frame(DATA, _GOOD, stream=1),
        "headers and no data": head,
        "headers cut short": frame(HEADERS, part, flags=END_HEADERS, stream=1, length=500),
        "headers without an entry": frame(HEADERS, b"", flags=END_HEADERS | END_STREAM, stream=1),
        "headers of noise": frame(HEADERS, b"\xff" * 100, flags=END_HEADERS, stream=1),
        "an entry of no table": frame(HEADERS, b"\xfe", flags=END_HEADERS, stream=1),
        "a length of headers without an end": frame(HEADERS, b"\0\x7f" + b"\xff" * 20, flags=END_HEADERS, stream=1),
        "a table of 4 GiB": frame(HEADERS, b"\x3f\xe1\xff\xff\xff\x0f", flags=END_HEADERS, stream=1),
        "a Huffman code of ones": frame(HEADERS, b"\0\x84\xff\xff\xff\xff\x01a", flags=END_HEADERS, stream=1),
        "headers continued 1000 times": frame(HEADERS, part, stream=1) + frame(CONTINUATION, stream=1) * 1000,
        "1 MiB of continued headers": frame(HEADERS, part, stream=1)
        + frame(CONTINUATION, block([("x-long", "a" * 16_000)]), stream=1) * 65,
        "a continuation of nothing": frame(CONTINUATION, part, stream=1),
        "a window of no more": head + frame(WINDOW_UPDATE, bytes(4), stream=1),
        "a window that overflows": frame(WINDOW_UPDATE, struct.pack("!I", 2**31 - 1)) * 2,
        "a stream that depends on itself": frame(PRIORITY, struct.pack("!IB", 1, 0), stream=1),
        "a promise": head + frame(PUSH_PROMISE, struct.pack("!I", 2) + part, flags=END_HEADERS, stream=1),
        "a farewell, and then headers": frame(GOAWAY, bytes(8)) + head,
        "headers twice": head + head,
        "a message cut short": head + frame(DATA, _GOOD[:-1], stream=1),
    }


def _calls(call: list[Header]) -> dict[str, list[Header]]:
    """RPCs whose headers are wrong."""

    def without(*names: str) -> list[Header]:
        return [header for header in call if header[0] not in names]

    made = {
        f"grpc-timeout {text!r}": [*call, ("grpc-timeout", text)]
        for text in ("", "abc", "-1S", "1", "S", "1X", "123456789S", "1.5S", " 1S", "\xb9S")
    }
    made |= {f"the method {text!r}": [(":method", text), *without(":method")] for text in ("GET", "PUT", "", "post")}
    no_text = ("/\xff\xfe", GENERATE + "\xff")  # the server of grpc.aio 1.85.1 does not survive these
    for text in (*no_text, "", "expertmesh.v1.Inference/Generate", "//", "/", "*", GENERATE + "?a=b", "/a" * 7000):
        made[f"the path {text[:40]!r}"] = [*without(":path")[:2], (":path", text), *without(":path")[2:]]
    for text in ("text/html", "application/json", "application/grpcx", ""):
        made[f"the type {text!r}"] = [*without("content-type"), ("content-type", text)]
    return made | {
        "no method": without(":method"),
        "no path": without(":path"),
        "no scheme": without(":scheme"),
        "no te": without("te"),
        "no type": without("content-type"),
        "two paths": [(":path", "/grpc.health.v1.Health/Check"), *call],
        "a pseudo-header behind others": [*without(":path"), (":path", GENERATE)],
        "an unknown pseudo-header": [(":nothing", "x"), *call],
        "a name in capitals": [*call, ("X-Capital", "x")],
        "a line break in a value": [*call, ("x-break", "a\r\nb: c")],
        "a connection header": [*call, ("connection", "close")],
        "an unknown encoding": [*call, ("grpc-encoding", "lzma")],
        "noise as grpc-trace-bin": [*call, ("grpc-trace-bin", "!!!")],
        "a forged authority": [(":authority", "x/health?y="), *without(":authority")],
    }


def _payloads() -> dict[str, bytes]:
    """What an RPC that is in order so far may carry."""
    return {
        "a message longer than its stream": message(b"hi", length=100),
        "a message of 4 GiB, it says": message(b"hi", length=2**32 - 1),
        "three bytes of a message's head": _GOOD[:3],
        "a head of 255": message(b"hi", compressed=255),
        "a good message and half of another": _GOOD + _GOOD[:4],
        "noise": b"\xff" * 100,
    }


def _ended(what: str, wire: bytes) -> WireCase:
    """Our side is shut behind it, and then so must theirs be."""
    return WireCase(name=f"HTTP/2: {what}", wire=wire, half_close=True, allowed=CORE_GONE)


def _asked(what: str, headers: Sequence[Header], payload: bytes, allowed: frozenset[str] | None = None) -> WireCase:
    """One RPC on stream 1, which must be answered while the connection stays open."""
    head = frame(HEADERS, block(headers), flags=END_HEADERS, stream=1)
    wire = _START + head + frame(DATA, payload, flags=END_STREAM, stream=1)
    maybe = GRPC_GARBAGE | {"OK"}  # some servers are lenient here, and need not be otherwise
    return WireCase(name=f"HTTP/2 RPC: {what}", wire=wire, allowed=allowed or maybe)


def _size(size: int) -> bytes:
    """HPACK's length of a text that is not Huffman-coded."""
    if size < 127:
        return bytes([size])
    rest, out = size - 127, [127]
    while rest > 127:
        out.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*out, rest])
