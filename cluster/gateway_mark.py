"""The ASGI layer that says in an OpenAI answer how many rows were dropped for it: `"expertmesh": {"dropped_rows": 12}`.

It is the outermost one, and touches nothing unless a request's mark is set (see cluster/drop_mark.py).
A whole answer has the field beside `choices`; a stream has it in the chunk with which a choice ends and in all that
follow, so that the last chunk has the sum.
"""

import json
from contextvars import ContextVar
from dataclasses import dataclass
from typing import cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass(slots=True)
class Mark:
    """Of one HTTP request, whose engine client counts here; vLLM's server has no place for it."""

    dropped_rows: int = 0


MARK: ContextVar[Mark] = ContextVar("mark")


class MarkedAnswers:
    """An ASGI app round another one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            mark = Mark()
            MARK.set(mark)
            send = _Answer(send, mark).send
        await self._app(scope, receive, send)


class _Answer:
    """Passes an answer on; a marked one that is not a stream is held back until it is whole: its length changes."""

    def __init__(self, send: Send, mark: Mark) -> None:
        self._send = send
        self._mark = mark
        self._held: Message | None = None  # the start of a marked answer
        self._body = bytearray()
        self._streams = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._streams = kind.startswith(b"text/event-stream")
            # Such an answer begins when its last token is there, so the mark is complete.
            if self._mark.dropped_rows and message["status"] == 200 and kind.startswith(b"application/json"):
                self._held = message
                return
        elif self._held is not None:
            await self._collect(message)
            return
        elif self._streams and self._mark.dropped_rows:
            events = message.get("body", b"").split(b"\n\n")
            message = {**message, "body": b"\n\n".join(map(self._marked_event, events))}
        await self._send(message)

    async def _collect(self, message: Message) -> None:
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        held, self._held = self._held, None
        assert held is not None
        body = self._marked(bytes(self._body))
        kept = [(name, value) for name, value in held["headers"] if name.lower() != b"content-length"]
        await self._send({**held, "headers": [*kept, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})

    def _marked_event(self, event: bytes) -> bytes:
        if not event.startswith(b"data: {") or event.startswith(b'data: {"error"'):
            return event
        return b"data: " + self._marked(event.removeprefix(b"data: "))

    def _marked(self, body: bytes) -> bytes:
        answer = cast("dict[str, object]", json.loads(body))
        answer["expertmesh"] = {"dropped_rows": self._mark.dropped_rows}
        return json.dumps(answer, separators=(",", ":")).encode()
