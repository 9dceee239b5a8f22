"""What gRPC leaves open, for every RPC: messages that are none or never come, and clients that do not read.

An interceptor behind that of the keys, so that no service has to think of any of it.
"""

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from cluster.grpc_answer import Context, abort_with
from experts.errors import RequestError

log = logging.getLogger(__name__)

WRITE_TIMEOUT_S = 30.0  # for a client to take a message of a stream
_Raws = AsyncIterator[bytes]


class WireGuard(grpc.aio.ServerInterceptor):
    """Serves every RPC as a stream of bytes on both sides, and reads the messages itself.

    gRPC would call bytes that are no message the server's own fault, and wait for ever for one that never comes.
    """

    async def intercept_service(  # pyright: ignore[reportIncompatibleMethodOverride]  (the stub is generic)
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = cast("grpc.RpcMethodHandler | None", await continuation(handler_call_details))
        if handler is None or handler.request_deserializer is None:  # no such RPC, or a refusal
            return cast("grpc.RpcMethodHandler", handler)
        return grpc.stream_stream_rpc_method_handler(_guarded(handler), None, handler.response_serializer)


def _guarded(handler: grpc.RpcMethodHandler) -> Callable[[_Raws, Context], Awaitable[None]]:
    read = cast("Callable[[bytes], Message]", handler.request_deserializer)
    if handler.request_streaming:
        behave = handler.stream_stream if handler.response_streaming else handler.stream_unary
    else:
        behave = handler.unary_stream if handler.response_streaming else handler.unary_unary

    async def guarded(raws: _Raws, context: Context) -> None:
        messages = _messages(raws, read, context)
        request = messages if handler.request_streaming else await anext(messages, None)
        if request is None:
            await abort_with(context, RequestError("the call ended without a message"))
        answer = cast("Callable", behave)(request, context)
        if inspect.isasyncgen(answer):
            await _write_all(cast("AsyncGenerator[Message, None]", answer), context)
        elif (message := await answer) is not None:  # a handler of a stream may write by itself
            await context.write(message)

    return guarded


async def _messages(raws: _Raws, read: Callable[[bytes], Message], context: Context) -> AsyncGenerator[Message, None]:
    async for raw in raws:
        try:
            message = read(raw)
        except DecodeError:
            await abort_with(context, RequestError("the bytes are not a message of this RPC"))
        yield message


async def _write_all(answers: AsyncGenerator[Message, None], context: Context) -> None:
    async with aclosing(answers):  # whatever ends this ends the engine's request, too
        async for answer in answers:
            try:
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await context.write(answer)
            except TimeoutError:
                log.warning("a client does not read its stream", extra={"s": WRITE_TIMEOUT_S})
                return
