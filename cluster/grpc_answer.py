"""How every RPC of ours ends: counted, with the code that its error stands for, and never with a traceback."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import NoReturn, Protocol

import grpc
import grpc.aio
from google.protobuf.message import Message

from cluster.gateway_errors import Refusal, refusal_of
from cluster.gateway_load import OpenRequests
from cluster.metrics import GATEWAY, RequestCount
from cluster.timeout_header import TIMEOUT_HEADER, seconds_of

Metadata = Sequence[tuple[str, str | bytes]]


class Context(Protocol):
    """What services use of an RPC: that much of grpc.aio's context."""

    def time_remaining(self) -> float | None:
        """Seconds until the client's deadline; None where it has none."""
        ...

    def invocation_metadata(self) -> Metadata | None: ...

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None: ...

    async def write(self, message: Message) -> None: ...

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """Ends the RPC. Raises grpc.aio.AbortError."""
        ...


@asynccontextmanager
async def answering(context: Context, load: OpenRequests) -> AsyncIterator[RequestCount]:
    """One generation, as it is counted. An error of the block ends the RPC; a client that leaves cancels the block."""
    with GATEWAY.request("grpc") as counted:
        try:
            with load.one_more():
                yield counted
        except grpc.aio.AbortError:
            raise
        except Exception as exc:
            refusal = refusal_of(exc)
            counted.outcome = refusal.outcome
            await abort(context, refusal)


async def abort(context: Context, refusal: Refusal) -> NoReturn:
    """Ends the RPC."""
    await context.abort(refusal.grpc_code, refusal.sentence, trailers_of(refusal))
    raise AssertionError("abort raises")


async def abort_with(context: Context, exc: Exception) -> NoReturn:
    """The same for an error of ours."""
    await abort(context, refusal_of(exc))


def trailers_of(refusal: Refusal) -> Metadata:
    """For a client that may come back, the seconds until then."""
    if (seconds := refusal.retry_after_s) is None:
        return ()
    return (("retry-after", str(seconds)), ("grpc-retry-pushback-ms", str(1000 * seconds)))


def remaining_s(context: Context) -> float | None:
    """Seconds that the client's deadline leaves; None where it has none. A deadline in metadata counts, too.

    Raises RequestError for one that is no number.
    """
    found = [context.time_remaining()]
    for name, value in context.invocation_metadata() or ():
        if name == TIMEOUT_HEADER and isinstance(value, str):
            found.append(seconds_of(value))
    return min((seconds for seconds in found if seconds is not None), default=None)
