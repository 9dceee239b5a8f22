"""The ASGI layer round vLLM's OpenAI server: what may come in, and what an error may look like on its way out.

In: only listed paths and methods, bodies of bounded size that `gateway_body` has read, and a deadline.
Out: every error in one shape, nothing of our own faults but an id, and a real status for a stream that fails before
its first token, although vLLM's server has by then announced a 200.
"""

import asyncio
import json
import re
from collections.abc import Mapping
from typing import cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.gateway_body import read_body
from cluster.gateway_errors import (
    BodyTooLarge,
    NoSuchRoute,
    Overloaded,
    Refusal,
    SlowBody,
    WrongMethod,
    internal_error,
    refusal_of,
    refusal_of_status,
)
from cluster.gateway_format import schema_of
from cluster.gateway_load import OpenRequests
from cluster.gateway_schema import SchemaCheck
from cluster.gateway_vllm import ADMISSION, Admission, new_request_id
from cluster.metrics import GATEWAY
from cluster.timeout_header import TIMEOUT_HEADER, seconds_of
from cluster.traces import continue_from
from cluster.validate import REQUEST_ID, Limits, check_request_id
from experts.errors import RequestError, ServingError

# All that the gateway serves over HTTP; the built app's other routes are removed and their paths answer 404.
ROUTES: Mapping[str, str] = {
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
BODY_TIMEOUT_S = 30.0
GENERATIONS = frozenset({"/v1/completions", "/v1/chat/completions"})
_PYDANTIC = re.compile(r"""'msg': (['"])(.*?)\1""")
_SSE_ERROR = b'data: {"error":'


class Guard:
    """An ASGI app round another one."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        served_name: str,
        request_timeout_s: float,
        max_body_bytes: int,
        load: OpenRequests,
        schemas: SchemaCheck,
    ) -> None:
        self._app = app
        self._limits = limits
        self._served_name = served_name
        self._request_timeout_s = request_timeout_s
        self._max_body_bytes = max_body_bytes
        self._load = load
        self._schemas = schemas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        admission = Admission(asyncio.get_running_loop().time() + self._request_timeout_s)
        ADMISSION.set(admission)
        answer = _Answer(send, admission, request_id=_given_id(scope) or new_request_id())
        if scope.get("path") not in GENERATIONS or scope.get("method") == "OPTIONS":
            await self._answer(scope, receive, answer)
            return
        continue_from(scope["headers"])
        with GATEWAY.request("http") as counted:
            try:
                with self._load.one_more():
                    await self._answer(scope, receive, answer)
            except Overloaded as exc:
                await answer.refuse(refusal_of(exc))
            # A client that leaves ends the app without an error, and its answer in the middle.
            counted.outcome = answer.outcome if answer.complete else "cancelled"

    async def _answer(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        try:
            if scope["type"] != "http":
                raise NoSuchRoute("only HTTP requests are served here")
            scope, receive = await self._admit(scope, receive, answer)
            await self._app(scope, receive, answer.send)
        except (RequestError, ServingError) as exc:
            await answer.refuse(refusal_of(exc))
        except Exception as exc:
            refusal = internal_error("an HTTP request failed", exc)
            if not answer.complete:  # Starlette answers and then raises all the same, for the server's log
                await answer.refuse(refusal)

    async def _admit(self, scope: Scope, receive: Receive, answer: "_Answer") -> tuple[Scope, Receive]:
        """The request as the app may see it. Raises RequestError for whatever must not pass."""
        path, method = scope["path"], scope["method"]
        allowed = ROUTES.get(path)
        if allowed is None:
            raise NoSuchRoute("there is nothing under this path")
        if method == "OPTIONS":  # browsers ask before they send; answered by the app's CORS layer
            return scope, receive
        if method != allowed:
            raise WrongMethod(f"{path} takes {allowed}")
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        timeout_s = _timeout_of(headers)
        if timeout_s is not None:
            answer.admission.deadline += timeout_s - self._request_timeout_s
        check_request_id(headers.get("x-request-id"), self._limits)
        if allowed == "POST":
            try:
                async with asyncio.timeout(BODY_TIMEOUT_S):
                    raw = await self._read(headers, receive)
            except TimeoutError:
                raise SlowBody(f"the body was not there within {BODY_TIMEOUT_S:.0f} s") from None
            body = read_body(path, raw, limits=self._limits, served_name=self._served_name, timeout_s=timeout_s)
            if (schema := schema_of(body)) is not None:
                await self._schemas.check(schema)
            answer.admission.max_tokens = cast("int | None", body.get("max_completion_tokens", body.get("max_tokens")))
            scope, receive = _replay(answer.with_id(scope), json.dumps(body).encode(), receive)
        return scope, receive

    async def _read(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        length = headers.get("content-length", "")
        raw = bytearray()
        more = True
        while more and len(raw) <= self._max_body_bytes:
            if length.isdigit() and int(length[:20]) > self._max_body_bytes:
                break
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RequestError("the client left before its body was whole")
            raw += message.get("body", b"")
            more = message.get("more_body", False)
        if more or len(raw) > self._max_body_bytes:
            raise BodyTooLarge(f"the body has more than {self._max_body_bytes} bytes")
        return bytes(raw)


def _given_id(scope: Scope) -> str | None:
    """The client's own id, if it may be echoed; `_admit` refuses any other."""
    given = [value for name, value in scope.get("headers", ()) if name.lower() == b"x-request-id"]
    return (
        given[0].decode()
        if given and len(given[0]) <= 128 and REQUEST_ID.fullmatch(given[0].decode("latin-1"))
        else None
    )


def _timeout_of(headers: Mapping[str, str]) -> float | None:
    asked = headers.get(TIMEOUT_HEADER)
    return None if asked is None else seconds_of(asked)


def _replay(scope: Scope, body: bytes, receive: Receive) -> tuple[Scope, Receive]:
    """The same request with another body; after it, `receive` reports what it always did (a disconnect)."""
    kept = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return pending.pop() if pending else await receive()

    return {**scope, "headers": [*kept, (b"content-length", str(len(body)).encode())]}, receive_again


class _Answer:
    """Passes an answer on, message by message, and rewrites errors.

    The start of an error or of an event stream is held back until its first bytes tell what it is.
    """

    def __init__(self, send: Send, admission: Admission, *, request_id: str) -> None:
        self._send = send
        self._id_header = (b"x-request-id", request_id.encode())
        self.admission = admission
        self.outcome = "ok"  # or of the error that the client is told
        self._held: Message | None = None  # a start that waits for its first bytes
        self._error_body: bytearray | None = None  # of an error answer, until complete
        self._begun = False
        self.complete = False

    def with_id(self, scope: Scope) -> Scope:
        """The request with the id that its answer will have."""
        kept = [(name, value) for name, value in scope["headers"] if name.lower() != self._id_header[0]]
        return {**scope, "headers": [*kept, self._id_header]}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            is_stream = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
            if message["status"] >= 400:
                self._error_body = bytearray()
            if is_stream or message["status"] >= 400:
                self._held = message
                return
            await self._pass(message)
        elif self._error_body is not None:
            await self._collect_error(message, self._error_body)
        else:
            await self._pass_body(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answers with an error, as a whole answer or, when one has begun, as its last event."""
        self.outcome = refusal.outcome
        if self._begun:
            await self._pass({"type": "http.response.body", "body": _event(refusal)})
            return
        for message in refusal.http_answer:
            await self._pass(message)

    async def _collect_error(self, message: Message, body: bytearray) -> None:
        assert self._held is not None
        body += message.get("body", b"")
        if not message.get("more_body", False) and not self.complete:
            await self.refuse(self._read_error(bytes(body), self._held["status"]))

    async def _pass_body(self, message: Message) -> None:
        if message.get("body", b"").startswith(_SSE_ERROR):
            refusal = self._read_error(message["body"].removeprefix(b"data: "), 500)
            if self._held is not None:  # nothing was sent yet: the stream never was one
                self._error_body = bytearray()
                await self.refuse(refusal)
                return
            self.outcome = refusal.outcome
            message = {**message, "body": _event(refusal)}
        if self._held is not None:
            held, self._held = self._held, None
            await self._pass(held)
        await self._pass(message)

    async def _pass(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [(name, value) for name, value in message["headers"] if name.lower() != self._id_header[0]]
            message = {**message, "headers": [*kept, self._id_header]}
        self._begun = True
        self.complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    def _read_error(self, body: bytes, status: int) -> Refusal:
        """An error that vLLM's server has written, in our words; a refusal that passed through it, as it was."""
        if self.admission.refusal is not None:
            return self.admission.refusal
        try:
            error = json.loads(body)["error"]
            message, field, code = str(error["message"]), error.get("param"), error.get("code")
        except (ValueError, KeyError, TypeError, AttributeError):
            return refusal_of_status(status, "the request failed", None)
        field = field.removeprefix("body.") if isinstance(field, str) else None
        return refusal_of_status(code if isinstance(code, int) else status, _plain(message, field), field)


def _plain(message: str, field: str | None) -> str:
    """vLLM's sentence without pydantic's rendering of itself."""
    found = _PYDANTIC.search(message) if "validation error" in message else None
    if found is not None:
        return f"{field}: {found[2]}"
    return re.sub(r" \(parameter=.*\)$", "", message, flags=re.DOTALL)


def _event(refusal: Refusal) -> bytes:
    return b"data: " + json.dumps(refusal.body).encode() + b"\n\n"
