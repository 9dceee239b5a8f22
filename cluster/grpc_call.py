"""One RPC of grpc's threaded server as coroutines see it: its reads and writes wait on an event loop, on no thread.

grpc.server would give every RPC a thread, which blocks in each read and write until grpc's own thread says that it is
done. Here the same operations are started from the loop, and grpc's thread tells the loop. Nothing of grpc's public
interface starts one without waiting, so this module, and no other, uses what is behind it; an import of a name that is
not there any more ends the start.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import NoReturn, cast

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc._cython.cygrpc import (  # pyright: ignore[reportMissingImports]  (it is compiled)
    ReceiveMessageOperation,
    SendInitialMetadataOperation,
    SendMessageOperation,
)
from grpc._server import _Context as GrpcContext
from grpc._server import _is_rpc_state_active, _possibly_finish_call, _status

from cluster.grpc_answer import Metadata

_NO_FLAGS = 0
_NO_DEADLINE_S = 1e9  # grpc says billions of years, where it means that there is none


class Call:
    """One RPC. Used on the loop only, except where a method says so.

    A write returns once the message before it has been taken, so that one message at most is on its way: a client that
    does not read stops who writes to it, and who writes seldom never waits. One read and one write at a time.
    """

    def __init__(
        self,
        context: grpc.ServicerContext,
        loop: asyncio.AbstractEventLoop,
        serialize: Callable[[Message], bytes],
    ) -> None:
        """Also on grpc's thread."""
        self._context = cast("GrpcContext", context)
        self._rpc = self._context._rpc_event
        self._state = self._context._state
        self._loop = loop
        self._serialize = serialize
        self._is_writing = False  # this and the next one behind the state's lock
        self._writer: asyncio.Future[None] | None = None  # waits for the message on its way
        self._is_over = False

    def on_lost(self, lost: Callable[[], object]) -> None:
        """`lost` is called once if the RPC ends without our doing: its client left, its deadline passed."""

        def ended() -> None:  # on grpc's thread
            if not self._is_over:
                self._post(lost)

        if not self._context.add_callback(ended):
            lost()

    def time_remaining(self) -> float | None:
        """Seconds until the client's deadline."""
        remaining_s = self._context.time_remaining()
        return None if remaining_s > _NO_DEADLINE_S else remaining_s

    def invocation_metadata(self) -> Metadata:
        return self._context.invocation_metadata() or ()

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        self._context.set_trailing_metadata(trailing_metadata)

    async def read(self) -> bytes | None:
        """The next message as it came; None behind the last one, and where the client has gone."""
        read: asyncio.Future[bytes | None] = self._loop.create_future()

        def ended(event: object) -> object:  # on grpc's thread
            with self._state.condition:  # the next read must not begin before this one has ended
                self._post(_resolve, read, event.batch_operations[0].message())  # type: ignore[attr-defined]
                return _possibly_finish_call(self._state, "read")

        with self._state.condition:
            if not self._start("read", (ReceiveMessageOperation(_NO_FLAGS),), ended):
                return None
        return await read

    async def write(self, message: Message) -> None:
        """Raises CancelledError where the client has gone. Cancelling it while it waits writes nothing."""
        raw = self._serialize(message)
        while (before := self._begin_write(raw)) is not None:
            await before

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """Ends the RPC, behind all that was written."""
        self.end(code, details, trailing_metadata)
        raise grpc.aio.AbortError(details)

    def end(self, code: grpc.StatusCode, details: str, trailing_metadata: Metadata = ()) -> None:
        """The same for whoever is not in the middle of the RPC; also on grpc's thread."""
        self._context.set_code(code)
        self._context.set_details(details)
        if trailing_metadata:
            self._context.set_trailing_metadata(trailing_metadata)
        self.finish()

    def finish(self, last: Message | None = None) -> None:
        """Ends the RPC with its last message, if there is one, and its status."""
        raw = None if last is None else self._serialize(last)
        self._is_over = True
        with self._state.condition:
            if _is_rpc_state_active(self._state):
                _status(self._rpc, self._state, raw)

    def cancel(self) -> None:
        """Ends the RPC at once, where it has not ended yet; what is on its way to the client is dropped."""
        if not self._is_over:
            self._is_over = True
            self._context.cancel()

    def _begin_write(self, raw: bytes) -> "asyncio.Future[None] | None":
        """Waits for the message that is still on its way, and nothing has begun; None: it has."""
        with self._state.condition:
            if self._is_writing:
                self._writer = self._loop.create_future()
                return self._writer
            first = (SendInitialMetadataOperation(None, _NO_FLAGS),) if self._state.initial_metadata_allowed else ()
            if not self._start("write", (*first, SendMessageOperation(raw, _NO_FLAGS)), self._end_write):
                raise asyncio.CancelledError
            self._state.initial_metadata_allowed = False
            self._is_writing = True
            return None

    def _end_write(self, _: object) -> object:
        """On grpc's thread, which wakes the loop only where somebody waits."""
        with self._state.condition:
            self._is_writing = False
            writer, self._writer = self._writer, None
            if writer is not None:
                self._post(_resolve, writer, None)
            return _possibly_finish_call(self._state, "write")

    def _start(self, what: str, operations: Sequence[object], ended: Callable[[object], object]) -> bool:
        """Behind the state's lock. False, and nothing is started, where the RPC is over."""
        if not _is_rpc_state_active(self._state):
            return False
        due = cast("set[str]", self._state.due)
        assert what not in due, f"one {what} at a time"
        self._rpc.call.start_server_batch(operations, ended)
        due.add(what)
        return True

    def _post(self, function: Callable[..., object], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed, and an exception would end grpc's thread
            pass


def _resolve(waiting: "asyncio.Future[object]", result: object) -> None:
    if not waiting.done():
        waiting.set_result(result)
