"""ModelStreamInfer: many requests side by side on one stream of gRPC, each of which may fail without the others.

One task for each open request, which also writes its messages: so each has at most one message that waits, and a
client that does not read stops its own engine requests, and after a while loses the stream.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

from google.protobuf.message import Message

from cluster.gateway_errors import Refusal, refusal_of
from cluster.grpc_answer import Context, abort
from cluster.grpc_wire import WRITE_TIMEOUT_S
from cluster.kserve_tensors import InferRequest
from cluster.metrics import GATEWAY
from experts.errors import DeadlineExceeded, RequestError

MAX_OPEN = 64  # requests of one stream; the next ones are left in the connection until one of these has ended


class StreamFailed(Exception):
    """Ends the whole stream with a status."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class InferStream:
    """One stream.

    answer: a request's messages; closing it aborts the request in the engine.
    error: the message that tells of one request's error. ends_on_error: the client wants a status instead.
    """

    def __init__(
        self,
        context: Context,
        answer: Callable[[InferRequest], AsyncGenerator[Message, None]],
        error: Callable[[InferRequest, str], Message],
        *,
        ends_on_error: bool,
    ) -> None:
        self._context = context
        self._answer = answer
        self._error = error
        self._ends_on_error = ends_on_error
        self._free = asyncio.Semaphore(MAX_OPEN)
        self._turn = asyncio.Lock()  # to write
        self._written: asyncio.Future[None] | None = None  # the newest message, once it has left

    async def serve(self, requests: AsyncIterator[InferRequest]) -> None:
        """Returns when the client has sent all its requests and has all its answers."""
        failed: list[StreamFailed] = []
        try:
            async with asyncio.TaskGroup() as tasks:
                async for request in requests:
                    await self._free.acquire()
                    tasks.create_task(self._serve_one(request)).add_done_callback(lambda _: self._free.release())
        except* StreamFailed as group:
            failed += [exc for exc in group.exceptions if isinstance(exc, StreamFailed)]
        except* RequestError as group:  # bytes that are no message
            failed += [StreamFailed(refusal_of(exc)) for exc in group.exceptions]
        if failed:
            await self._all_written()  # gRPC takes no status while a message is on its way
            await abort(self._context, failed[0].refusal)

    async def _serve_one(self, request: InferRequest) -> None:
        with GATEWAY.request("grpc") as counted:
            try:
                async with aclosing(self._answer(request)) as messages:
                    async for message in messages:
                        await self._write(message)
            except StreamFailed as exc:
                counted.outcome = exc.refusal.outcome
                raise
            except Exception as exc:
                refusal = refusal_of(exc)
                counted.outcome = refusal.outcome
                if self._ends_on_error:
                    raise StreamFailed(refusal) from None
                await self._write(self._error(request, refusal.sentence))

    async def _write(self, message: Message) -> None:
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S), self._turn:
                await self._all_written()
                self._written = asyncio.ensure_future(self._context.write(message))
                self._written.add_done_callback(_look_at)
                await self._all_written()
        except TimeoutError:
            late = DeadlineExceeded(f"an answer was not read for {WRITE_TIMEOUT_S:g} s")
            raise StreamFailed(refusal_of(late)) from None

    async def _all_written(self) -> None:
        """Returns when no message is on its way; one that has begun is not cut off by whoever stops to wait for it."""
        if self._written is not None:
            await asyncio.shield(self._written)


def _look_at(written: asyncio.Future[None]) -> None:
    """Takes note of a failure that nobody waits for any more, or asyncio would log it."""
    if not written.cancelled():
        written.exception()
