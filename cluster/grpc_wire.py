"""What gRPC leaves open, for every RPC: messages that are none or never come, and clients that do not read.

No service has to think of any of it.
"""

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Protocol, cast

import grpc
from google.protobuf.message import DecodeError, Message

from cluster.grpc_answer import Context
from experts.errors import RequestError

log = logging.getLogger(__name__)

WRITE_TIMEOUT_S = 30.0  # for a client to take a message of a stream


class WireCall(Context, Protocol):
    """An RPC before its messages are read."""

    async def read(self) -> bytes | None:
        """The next message as it came; None behind the last one."""
        ...

    def cancel(self) -> None:
        """Ends the RPC at once."""
        ...


def serving(handler: grpc.RpcMethodHandler) -> Callable[[WireCall], Awaitable[Message | None]]:
    """Serves one RPC, of whatever kind, and returns its last message where that is not written yet.

    Messages are read here: gRPC would call bytes that are none the server's own fault. Raises RequestError for them.
    """
    read = cast("Callable[[bytes], Message]", handler.request_deserializer)
    if handler.request_streaming:
        behave = handler.stream_stream if handler.response_streaming else handler.stream_unary
    else:
        behave = handler.unary_stream if handler.response_streaming else handler.unary_unary

    async def serve(call: WireCall) -> Message | None:
        request = _messages(call, read) if handler.request_streaming else await _only_message(call, read)
        answer = cast("Callable", behave)(request, call)
        if inspect.isasyncgen(answer):
            await _write_all(cast("AsyncGenerator[Message, None]", answer), call)
            return None
        return await answer  # None: a handler of a stream has written by itself

    return serve


async def _only_message(call: WireCall, read: Callable[[bytes], Message]) -> Message:
    raw = await call.read()
    if raw is None:
        raise RequestError("the call ended without a message")
    return _message(raw, read)


async def _messages(call: WireCall, read: Callable[[bytes], Message]) -> AsyncGenerator[Message, None]:
    while (raw := await call.read()) is not None:
        yield _message(raw, read)


def _message(raw: bytes, read: Callable[[bytes], Message]) -> Message:
    try:
        return read(raw)
    except DecodeError:
        raise RequestError("the bytes are not a message of this RPC") from None


async def _write_all(answers: AsyncGenerator[Message, None], call: WireCall) -> None:
    async with aclosing(answers):  # whatever ends this ends the engine's request, too
        async for answer in answers:
            try:
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await call.write(answer)
            except TimeoutError:
                log.warning("a client does not read its stream", extra={"s": WRITE_TIMEOUT_S})
                call.cancel()  # a status would wait behind what is not read, and say that all of it was sent
                return
