"""HTTP/1 that is not quite HTTP/1, and what else arrives at a port that speaks it: written by hand."""

import hashlib
from collections.abc import Iterator

from malformed_case import (
    CLOSED,
    COMPLETION,
    HTTP_GARBAGE,
    HTTP_MAYBE,
    HTTP_REFUSED,
    Http1,
    WireCase,
    get,
)

# Written down and not read from the gateway, whose modules import vLLM; a test compares.
ROUTES = {
    "/v1/models": "GET",
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/health": "GET",
    "/ready": "GET",
    "/version": "GET",
    "/metrics": "GET",
    "/expertmesh/status": "GET",
    "/openapi.json": "GET",
}

_CHUNKED = "Transfer-Encoding: chunked"
_FRAMING: dict[str, tuple[tuple[str, ...], bytes]] = {
    "a chunk size of letters": ((_CHUNKED,), b"zz\r\nhi\r\n0\r\n\r\n"),
    "a negative chunk size": ((_CHUNKED,), b"-1\r\nhi\r\n0\r\n\r\n"),
    "a chunk size with a prefix": ((_CHUNKED,), b"0x21\r\n" + COMPLETION + b"\r\n0\r\n\r\n"),
    "a chunk size with an underscore": ((_CHUNKED,), b"2_1\r\n" + COMPLETION + b"\r\n0\r\n\r\n"),
    "a chunk size of 100 000 digits": ((_CHUNKED,), b"0" * 100_000 + b"\r\n\r\n"),
    "no chunk size": ((_CHUNKED,), b"\r\nhi\r\n0\r\n\r\n"),
    "a chunk longer than its size": ((_CHUNKED,), b"2\r\nhello\r\n0\r\n\r\n"),
    "a chunk without its end": ((_CHUNKED,), b"2\r\nhi0\r\n\r\n"),
    "a chunk extension of 100 000 bytes": ((_CHUNKED,), b"2;" + b"a" * 100_000 + b"\r\nhi\r\n0\r\n\r\n"),
    "trailers of 100 000 bytes": ((_CHUNKED,), b"2\r\nhi\r\n0\r\n" + b"a: b\r\n" * 16_000 + b"\r\n"),
    "a negative length": (("Content-Length: -1",), COMPLETION),
    "a length of letters": (("Content-Length: abc",), COMPLETION),
    "a length with a plus": (("Content-Length: +33",), COMPLETION),
    "a fraction as length": (("Content-Length: 33.0",), COMPLETION),
    "an empty length": (("Content-Length:",), COMPLETION),
    "a length in other digits": (("Content-Length: \xb2",), COMPLETION),
    "a length of 2^64": ((f"Content-Length: {2**64}",), COMPLETION),
    "a length of 10^400": ((f"Content-Length: {10**400}",), COMPLETION),
    "two lengths": (("Content-Length: 33", "Content-Length: 5"), COMPLETION),
    "two lengths in one line": (("Content-Length: 33, 5",), COMPLETION),
    "a length that is too short": (("Content-Length: 5",), COMPLETION),
    "chunks and a length": ((_CHUNKED, "Content-Length: 5"), b"21\r\n" + COMPLETION + b"\r\n0\r\n\r\n"),
    "chunks twice": (("Transfer-Encoding: chunked, chunked",), b"2\r\nhi\r\n0\r\n\r\n"),
    "chunks, and then not": (("Transfer-Encoding: chunked, identity",), COMPLETION),
    "an unknown encoding": (("Transfer-Encoding: xchunked",), COMPLETION),
    "a vertical tab before chunked": (("Transfer-Encoding: \x0bchunked",), b"2\r\nhi\r\n0\r\n\r\n"),
    "a blank before the colon": (("Transfer-Encoding : chunked",), b"2\r\nhi\r\n0\r\n\r\n"),
    "no length at all": ((), COMPLETION),
}
_UNENDED: dict[str, tuple[tuple[str, ...], bytes]] = {
    "a length and chunks": (("Content-Length: 33", _CHUNKED), COMPLETION),
    "a chunk size of 17 digits": ((_CHUNKED,), b"FFFFFFFFFFFFFFFFF\r\nhi\r\n0\r\n\r\n"),
    "a length that is too long": (("Content-Length: 500",), COMPLETION),
    "chunks without an end": ((_CHUNKED,), b"2\r\nhi\r\n"),
    "a chunk that is too short": ((_CHUNKED,), b"100\r\nhi"),
    "a length and no body": (("Content-Length: 33",), b""),
}
_HEADERS: dict[str, str] = {
    "one of 20 KiB": "X-Long: " + "a" * 20_000,
    "one of 1 MiB": "X-Long: " + "a" * (1 << 20),
    "a name of 20 KiB": "a" * 20_000 + ": b",
    "400 of 64 bytes": "\r\n".join(f"X-Flood-{i:03}: {'a' * 51}" for i in range(400)),
    "20 000 without a value": "\r\n".join(f"X{i}:" for i in range(20_000)),
    "one without a colon": "X-Nothing",
    "one without a name": ": value",
    "a NUL in a value": "X-Nul: a\0b",
    "a carriage return in a value": "X-Return: a\rb",
    "a control character in a name": "X-\x01: a",
    "a blank in a name": "X Blank: a",
    "not ASCII in a name": "X-\xe9: a",
}
_MAYBE_HEADERS: dict[str, str] = {
    "one folded": "X-Folded: a\r\n b",
    "not ASCII in a value": "X-Value: \xff\xfe",
    "Expect of nonsense": "Expect: nonsense",
    "Expect of a body that comes at once": "Expect: 100-continue",
    "an upgrade to h2c": "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__",
    "a cookie of 8 KiB": "Cookie: " + "a" * 8000,
    "a forged path": "X-Original-URL: /health\r\nX-Rewrite-URL: /health\r\nX-Forwarded-Prefix: /health",
    "another method": "X-HTTP-Method-Override: GET",
    "a range": "Range: bytes=0-18446744073709551615",
    "a hostile Forwarded": 'Forwarded: for="_;\\""\r\nX-Forwarded-For: ::::,999.1.1.1\r\nX-Forwarded-Proto: x',
}
_IDS = ("", "x" * 129, "a b", "../../a", "http://127.0.0.1:1/", "'; DROP TABLE x; --", "{{7*7}}", "%00", "\xe9", "a/b")
_TIMEOUTS = ("-1", "0", "abc", "1.5", "1e3", "", "9" * 13, "3600001", "\xb2", "0x10", "1 000", "NaN")
_HOSTS = (
    "x/health?y=",
    "a/?x=",
    "#",
    "x#/health",
    "user@localhost",
    "[::1",
    "a b",
    "a" * 9000,
    "\xff",
    "localhost:99999",
)
_TARGETS = (
    *(
        "/",
        "/v1",
        "/v2/models",
        "/admin",
        "/V1/COMPLETIONS",
        "/v1/completions/",
        "//v1/completions",
        "/v1//completions",
    ),
    *(
        "/v1/../health",
        "/v1/completions/../../health",
        "/v1/completions;a=b",
        "/v1/completions%2f",
        "/v1/completions%00",
    ),
    *("/%00", "/%2e%2e/%2e%2e/a", "/%ff%fe", "/health%20", "/" + "a" * 8000, "/api/jobs/", "/-/routes", "/reset"),
    *("/inference/v1/generate", "/scale_elastic_ep", "/invocations", "/reset_prefix_cache", "/sleep", "/pause"),
    *("/collective_rpc", "/load_lora_adapter"),
)
_LINES: dict[str, bytes] = {
    "HTTP/0.9": b"GET /v1/models\r\n",
    "no target": b"GET\r\n\r\n",
    "no version": b"GET /v1/models\r\nHost: localhost\r\n\r\n",
    "version 9.9": b"GET /v1/models HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "half a version": b"GET /v1/models HTTP/1\r\nHost: localhost\r\n\r\n",
    "another protocol": b"GET /v1/models FTP/1.0\r\nHost: localhost\r\n\r\n",
    "a blank first": b" GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "blanks in the target": b"GET /v1 /models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a target without a slash": b"GET v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a target of bytes": b"GET /\xff\xfe\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a method of bytes": b"\x00\x01\x02 / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a method of 20 KiB": b"A" * 20_000 + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a target of 20 KiB": b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "100 000 bytes without an end": b"A" * 100_000,
    "line feeds only": b"\n" * 100,
    "NULs": b"\0" * 1000,
    "noise": b"".join(hashlib.sha256(bytes([i])).digest() for i in range(32)),
    "the h2c preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    "a TLS hello": bytes.fromhex("16030100680100006403036a") + bytes(range(32)) + b"\0\0\2\x13\1\1\0" + bytes(57),
    "a TLS alert": b"\x15\x03\x01\0\2\2\x28",
    "SSH": b"SSH-2.0-OpenSSH_9.9\r\n",
    "SMTP": b"EHLO localhost\r\nMAIL FROM:<a@b>\r\n",
    "Redis": b"*1\r\n$4\r\nINFO\r\n",
    "SOCKS": b"\x05\x01\x00",
    "a PROXY line": b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n",
    "a pickle": b"\x80\x04\x8c\x08builtins\x8c\x05print\x93\x8c\x02hi\x85R.",
}


def http_cases(key: str | None) -> Iterator[WireCase]:
    yield from _bodies(key)
    yield from _headers(key)
    yield from _routes(key)
    yield from _hosts(key)
    without_key = HTTP_GARBAGE | ({"401"} if key else set())
    for what, wire in _LINES.items():
        yield WireCase(name=f"HTTP: {what}", wire=wire, allowed=without_key, half_close=True)
    whole = Http1().wire(key)
    ends = {1, 3, 4, 5, 12, 20, 28, 29, 30, 40, 60, len(whole) - len(COMPLETION) - 1, len(whole) - 10, len(whole) - 1}
    for end in sorted(ends):
        name = f"HTTP: a request that ends behind {end - len(whole) if end > 60 else end} bytes"
        yield WireCase(name=name, wire=whole[:end], allowed=HTTP_GARBAGE, half_close=True)
    yield WireCase(name="HTTP: nothing", wire=b"", allowed=HTTP_GARBAGE, half_close=True)
    pair = get("/v1/models").wire(key).replace(b"Connection: close\r\n", b"")
    yield WireCase(name="HTTP: noise behind a request (valid)", wire=pair + b"\0\1\2", allowed=HTTP_GARBAGE | {"200"})


def _bodies(key: str | None) -> Iterator[WireCase]:
    for what, (lines, body) in _FRAMING.items():
        wire = Http1(framing=lines, body=body).wire(key)
        yield WireCase(name=f"HTTP framing: {what}", wire=wire, allowed=HTTP_GARBAGE)
    for what, (lines, body) in _UNENDED.items():
        wire = Http1(framing=lines, body=body).wire(key)
        yield WireCase(name=f"HTTP framing: {what}", wire=wire, allowed=HTTP_GARBAGE, half_close=True)


def _headers(key: str | None) -> Iterator[WireCase]:
    for what, line in _HEADERS.items():
        yield WireCase(name=f"HTTP headers: {what}", wire=Http1(more=(line,)).wire(key), allowed=HTTP_GARBAGE)
    for what, line in _MAYBE_HEADERS.items():
        wire = Http1(more=(line,)).wire(key)
        yield WireCase(name=f"HTTP headers: {what} (valid)", wire=wire, allowed=HTTP_MAYBE | {"417"})
    for value in _IDS:
        for request in (Http1(more=(f"x-request-id: {value}",)), get("/v1/models", f"x-request-id: {value}")):
            name = f"{request.method} {request.target}: x-request-id is {value[:40]!r}"
            yield WireCase(name=name, wire=request.wire(key), allowed=HTTP_REFUSED)
    for value in _TIMEOUTS:
        name = f"HTTP headers: x-request-timeout-ms is {value!r}"
        wire = Http1(more=(f"x-request-timeout-ms: {value}",)).wire(key)
        yield WireCase(name=name, wire=wire, allowed=HTTP_REFUSED)
    denied = HTTP_REFUSED | {"401"} | (set() if key else {"200"})
    for value in (
        "Bearer",
        "Bearer ",
        "Basic Og==",
        "\xff\xfe",
        "Bearer " + "a" * 8000,
        "Bearer a\tb",
        '"',
        "bearer: x",
    ):
        wire = Http1(more=(f"Authorization: {value}",)).wire(None)
        name = f"HTTP headers: Authorization is {value[:40]!r}"
        yield WireCase(name=name, wire=wire, allowed=frozenset(denied))


def _routes(key: str | None) -> Iterator[WireCase]:
    for target in _TARGETS:
        for request in (Http1(target=target), get(target)):
            name = f"{request.method} {target[:40]}, which is not served"
            yield WireCase(name=name, wire=request.wire(key), allowed=HTTP_REFUSED)
    for path, method in ROUTES.items():
        other = "GET" if method == "POST" else "POST"
        for wrong in (other, "DELETE", "PATCH"):
            wire = Http1(method=wrong, target=path).wire(key)
            yield WireCase(name=f"{wrong} {path}, a wrong method", wire=wire, allowed=HTTP_REFUSED)
    for wrong in ("PUT", "HEAD", "TRACE", "CONNECT", "PROPFIND", "BREW", "post", "GET,POST", "X" * 300):
        wire = Http1(method=wrong).wire(key)
        name = f"{wrong[:20]} /v1/completions, a wrong method"
        yield WireCase(name=name, wire=wire, allowed=HTTP_GARBAGE)
    upgrade = ("Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")
    for path in ("/v1/completions", "/v1/realtime"):
        wire = get(path, "Connection: Upgrade", *upgrade).wire(key)
        yield WireCase(name=f"a websocket at {path}", wire=wire, allowed=HTTP_REFUSED | {"403", "426"})
    wire = Http1(method="OPTIONS").wire(key)
    yield WireCase(name="OPTIONS /v1/completions (valid)", wire=wire, allowed=HTTP_MAYBE | {"204"})


def _hosts(key: str | None) -> Iterator[WireCase]:
    """Forged hosts are ignored or refused, and with keys in use never open a route to who has none."""
    kind = "Content-Type: application/json"
    forged = {f"is {host[:40]!r}": (f"Host: {host}", kind) for host in (*_HOSTS, "")}
    forged |= {
        "is there twice": ("Host: localhost", "Host: x/health?y=", kind),
        "is there twice, with a blank": ("Host: localhost", "Host : x/health?y=", kind),
        "is missing": (kind,),
    }
    without_key = HTTP_GARBAGE | ({"401"} if key else {"200"})
    for what, headers in forged.items():
        request = Http1(headers=headers)
        name = f"POST /v1/completions: Host {what}"
        yield WireCase(name=f"{name} (valid)", wire=request.wire(key), allowed=HTTP_MAYBE | {CLOSED})
        yield WireCase(name=f"{name}, without a key", wire=request.wire(None), allowed=without_key)
    for target in ("http://localhost/health", "http://x/health?/v1/completions", "localhost:443", "*", "?/health"):
        request = Http1(target=target)
        yield WireCase(name=f"POST {target}: not a path", wire=request.wire(key), allowed=HTTP_GARBAGE | {"200"})
        yield WireCase(name=f"POST {target}: not a path, without a key", wire=request.wire(None), allowed=without_key)
