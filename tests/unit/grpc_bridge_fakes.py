"""A service of coroutines with every kind of RPC, for the tests of the bridge."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import grpc
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import Int64Value

from cluster.gateway_load import OpenRequests
from cluster.grpc_answer import Context, abort_with, answering, remaining_s
from experts.errors import ServingError

SECRET = "secret"


class Numbers:
    """A service of every kind of RPC; `open` counts its RPCs."""

    def __init__(self) -> None:
        self.open = 0
        self.written = 0
        self.remaining_s: float | None = None
        self.load = OpenRequests(8)
        self.padding = b""

    async def double(self, request: Int64Value, context: Context) -> Message:
        context.set_trailing_metadata((("asked", str(request.value)),))
        return Int64Value(value=2 * request.value)

    async def count(self, request: Int64Value, context: Context) -> AsyncGenerator[Message, None]:
        """Up to the number; a negative one aborts behind its last message."""
        for value in range(abs(request.value)):
            self.written = value
            yield Int64Value(value=value)
        if request.value < 0:
            await abort_with(context, ServingError("no more of them"))

    async def total(self, requests: AsyncIterator[Int64Value], context: Context) -> Message:
        return Int64Value(value=sum([request.value async for request in requests]))

    async def echo(self, requests: AsyncIterator[Int64Value], context: Context) -> AsyncGenerator[Message, None]:
        async for request in requests:
            yield request

    async def wait(self, request: Int64Value, context: Context) -> AsyncGenerator[Message, None]:
        """One message, and then nothing more."""
        self.open += 1
        self.remaining_s = remaining_s(context)
        try:
            async with answering(context, self.load):
                yield request
                await asyncio.sleep(60)
        finally:
            self.open -= 1

    async def fail(self, request: Int64Value, context: Context) -> Message:
        raise ZeroDivisionError(SECRET)


def handlers_of(numbers: Numbers) -> grpc.GenericRpcHandler:
    as_messages = {
        "request_deserializer": Int64Value.FromString,
        "response_serializer": lambda answer: answer.SerializeToString() + numbers.padding,
    }
    unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
    return grpc.method_handlers_generic_handler(
        "Numbers",
        {
            "Double": unary(numbers.double, **as_messages),
            "Fail": unary(numbers.fail, **as_messages),
            "Count": stream(numbers.count, **as_messages),
            "Wait": stream(numbers.wait, **as_messages),
            "Total": grpc.stream_unary_rpc_method_handler(numbers.total, **as_messages),
            "Echo": grpc.stream_stream_rpc_method_handler(numbers.echo, **as_messages),
        },
    )
