"""Keys at both doors: an ASGI layer and a check of RPCs. Whatever is not health is refused without a key."""

import grpc
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.gateway_errors import HeadersTooLarge, refusal_of
from cluster.keys import Keys
from experts.errors import RequestError

MAX_HEADER_BYTES = 16 << 10  # of a request's headers, or an RPC's metadata
OPEN_PATHS = frozenset({"/health", "/ready"})
OPEN_SERVICE = "/grpc.health.v1.Health/"


class KeyedApp:
    """An ASGI app round another one."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["type"] == "http":
                _check_wire(scope)
            # The scope's path, and never a URL made from the Host header, which the client can forge.
            if scope["type"] != "http" or scope["path"] not in OPEN_PATHS:
                self._keys.check(_authorization(scope))
        except RequestError as exc:
            await _refuse(exc, scope, send)
            return
        await self._app(scope, receive, send)


class KeyedServices:
    """Judges every RPC before its first message is read, also one of a service that is not there."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def check(self, details: grpc.HandlerCallDetails) -> None:
        """Raises Unauthenticated."""
        if details.method.startswith(OPEN_SERVICE):
            return
        found = [value for name, value in details.invocation_metadata or () if name == "authorization"]
        self._keys.check(found[0] if len(found) == 1 and isinstance(found[0], str) else None)


def _check_wire(scope: Scope) -> None:
    """Raises RequestError for what the server's parser lets pass and others may read otherwise."""
    headers = scope["headers"]
    if sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        raise HeadersTooLarge(f"the headers have more than {MAX_HEADER_BYTES} bytes")
    if scope["http_version"] not in ("1.0", "1.1"):
        raise RequestError("only HTTP/1.0 and 1.1 are spoken here")
    if {b"content-length", b"transfer-encoding"} <= {name.lower() for name, _ in headers}:
        raise RequestError("a body has a length or comes in chunks, and not both")


def _authorization(scope: Scope) -> str | None:
    """None also where it is there twice: which one counts must not be a matter of taste."""
    found = [value.decode("latin-1") for name, value in scope.get("headers", ()) if name.lower() == b"authorization"]
    return found[0] if len(found) == 1 else None


async def _refuse(exc: RequestError, scope: Scope, send: Send) -> None:
    if scope["type"] != "http":  # a websocket: refused before it is one
        await send({"type": "websocket.close", "code": 1008})
        return
    for message in refusal_of(exc).http_answer:
        await send(message)
