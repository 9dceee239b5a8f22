"""What a malformed request is: bytes for a TCP connection, or messages of one RPC, and how it may end.

An end is one word: an HTTP status ("400"), a gRPC code ("INVALID_ARGUMENT"), "closed" (the connection, without an
answer), "reset" (an HTTP/2 stream), "answered" (an answer whose code is not readable) or "silent" (nothing in time).
"""

from collections.abc import Sequence
from dataclasses import dataclass

CLOSED = "closed"
RESET = "reset"
ANSWERED = "answered"
SILENT = "silent"

HTTP_REFUSED = frozenset(("400", "404", "405", "408", "411", "413", "414", "415", "422", "431"))
HTTP_GARBAGE = HTTP_REFUSED | {CLOSED}
HTTP_MAYBE = HTTP_REFUSED | {"200"}
GRPC_REFUSED = frozenset(("INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED"))
GRPC_MAYBE = GRPC_REFUSED | {"OK"}
GRPC_GARBAGE = GRPC_REFUSED | {CLOSED, RESET, ANSWERED}
# What gRPC's own core says to headers that it cannot read, before any code of a server's: INTERNAL, by its rules. And
# to streams whose client has gone.
CORE_REFUSED = GRPC_GARBAGE | {"INTERNAL"}
CORE_GONE = CORE_REFUSED | {"UNAVAILABLE", "CANCELLED"}

COMPLETION = b'{"prompt": "hi", "max_tokens": 2}'
_HEADERS = ("Host: localhost", "Content-Type: application/json")


@dataclass(frozen=True, slots=True, kw_only=True)
class WireCase:
    """Bytes for a TCP connection of their own."""

    name: str
    wire: bytes
    allowed: frozenset[str]  # ends
    half_close: bool = False  # our side is shut once all is sent: the server must not wait for more


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcCase:
    """One RPC: its messages as bytes, which need not be messages."""

    name: str
    method: str  # "/package.Service/Method"
    messages: tuple[bytes, ...]
    allowed: frozenset[str]  # codes
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    gzip: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Http1:
    """An HTTP/1.1 request, of which every part may be wrong."""

    method: str = "POST"
    target: str = "/v1/completions"
    headers: Sequence[str] = _HEADERS  # whole lines
    more: Sequence[str] = ()  # further lines
    framing: Sequence[str] | None = None  # the lines that say how long the body is; None: the right one
    body: bytes = COMPLETION

    def wire(self, key: str | None) -> bytes:
        """key: for the Authorization line; None: without that line. Latin-1, as HTTP/1.1 has it."""
        framing = (f"Content-Length: {len(self.body)}",) if self.framing is None else self.framing
        lines = [f"{self.method} {self.target} HTTP/1.1", *self.headers, *framing, *self.more]
        if key is not None:
            lines.append(f"Authorization: Bearer {key}")
        return "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1") + self.body


def get(target: str, *more: str) -> Http1:
    """A GET without a body; more: header lines."""
    return Http1(method="GET", target=target, more=more, framing=(), body=b"")
