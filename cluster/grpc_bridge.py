"""Services of coroutines on grpc's threaded server: every RPC is a task on the gateway's event loop.

grpc.aio's server would need no bridge, and ends itself on an RPC whose path is no UTF-8 (docs/adr/0008-own-servers.md).
No RPC takes a thread here: grpc's own one finds the method, judges the RPC, and hands it to the loop.
"""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import cast

import grpc
import grpc.aio
from google.protobuf.message import Message

from cluster.gateway_errors import refusal_of
from cluster.grpc_answer import trailers_of
from cluster.grpc_call import Call
from cluster.grpc_wire import serving
from cluster.traces import continue_from
from experts.errors import RequestError, ServingError

log = logging.getLogger(__name__)

Check = Callable[[grpc.HandlerCallDetails], None]
Serve = Callable[[Call], Awaitable[Message | None]]
_END_S = 2.0  # for grpc and our tasks, once nothing is open any more
_THREAD = "_serve"  # in the name of grpc's own thread


class Bridge(grpc.GenericRpcHandler):
    """What services are added to, in the place of a server, and where a server finds them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, checks: Sequence[Check]) -> None:
        """checks: each judges an RPC before anything of it is read, on grpc's thread. They raise errors of ours."""
        self._loop = loop
        self._checks = checks
        self._added: list[grpc.GenericRpcHandler] = []
        self._known: dict[str, grpc.RpcMethodHandler] = {}
        self._open: set[asyncio.Task[None]] = set()

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        self._added += handlers

    def add_registered_method_handlers(self, service_name: str, method_handlers: object) -> None:
        """The same methods once more, for servers that would rather find them by their names."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """On grpc's thread. None: there is no such method."""
        try:
            for check in self._checks:
                check(handler_call_details)
        except (RequestError, ServingError) as exc:
            return _handler(partial(self._refuse, exc))
        method = handler_call_details.method
        if method not in self._known:
            found = [handler for added in self._added if (handler := added.service(handler_call_details)) is not None]
            if not found:
                return None
            self._known[method] = _handler(partial(self._post, serving(found[0]), _serializer(found[0])))
        return self._known[method]

    async def ended(self, timeout_s: float) -> None:
        """Returns when no RPC's task is left."""
        if self._open:
            await asyncio.wait(self._open, timeout=timeout_s)

    def _refuse(self, exc: RequestError | ServingError, context: grpc.ServicerContext) -> None:
        """On grpc's thread, so that a flood of RPCs that are refused costs the loop nothing."""
        refusal = refusal_of(exc)
        Call(context, self._loop, _no_message).end(refusal.grpc_code, refusal.sentence, trailers_of(refusal))

    def _post(self, serve: Serve, serialize: Callable[[Message], bytes], context: grpc.ServicerContext) -> None:
        self._loop.call_soon_threadsafe(self._begin, serve, Call(context, self._loop, serialize))

    def _begin(self, serve: Serve, call: Call) -> None:
        task = self._loop.create_task(_run(serve, call))
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        call.on_lost(task.cancel)


class BridgeServer:
    """grpc's threaded server with a bridge's services; used on the bridge's loop."""

    def __init__(self, bridge: Bridge, options: Sequence[tuple[str, int]] = ()) -> None:
        self._bridge = bridge
        executor = cast("ThreadPoolExecutor", _AtOnce())
        self._server = grpc.server(executor, handlers=[bridge], options=options)

    def start(self, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Listens; returns the port. Raises RuntimeError where it cannot."""
        if credentials is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, credentials)
        before = threading.enumerate()
        self._server.start()
        self._threads = [each for each in threading.enumerate() if each not in before and _THREAD in each.name]
        if len(self._threads) != 1:
            raise RuntimeError(f"grpc {grpc.__version__} started {len(self._threads)} threads {_THREAD!r}, not 1")
        return port

    @property
    def is_serving(self) -> bool:
        return self._threads[0].is_alive() and self._server.wait_for_termination(timeout=0)

    async def stop(self, grace_s: float) -> None:
        """Takes nothing new; what is open may go on for so long, and is cancelled then."""
        stopped = self._server.stop(grace_s)
        if not await asyncio.to_thread(stopped.wait, grace_s + _END_S):
            log.warning("the gRPC server did not end in time", extra={"grace_s": grace_s})
        await self._bridge.ended(_END_S)


class _AtOnce(Executor):
    """What grpc wants to run in a thread is run at once: nothing of ours waits there."""

    def submit(  # pyright: ignore[reportIncompatibleMethodOverride]  (it forgets what fits together)
        self, function: Callable[..., object], /, *args: object, **named: object
    ) -> "Future[object]":
        done: Future[object] = Future()
        try:
            done.set_result(function(*args, **named))
        except Exception as exc:
            done.set_exception(exc)
        return done


def _handler(begin: Callable[[grpc.ServicerContext], None]) -> grpc.RpcMethodHandler:
    """As a stream of bytes both ways, of which grpc reads nothing by itself."""

    def behave(_: object, context: grpc.ServicerContext, __: object) -> None:
        begin(context)

    # grpc takes no answers from what it called, and leaves the RPC open.
    behave.experimental_non_blocking = True  # pyright: ignore[reportFunctionMemberAccess]
    return grpc.stream_stream_rpc_method_handler(behave)


def _serializer(handler: grpc.RpcMethodHandler) -> Callable[[Message], bytes]:
    return cast("Callable[[Message], bytes]", handler.response_serializer)


def _no_message(_: Message) -> bytes:
    raise AssertionError("a refusal has no message")


async def _run(serve: Serve, call: Call) -> None:
    """However it ends, the RPC ends with it."""
    try:
        continue_from(call.invocation_metadata())
        call.finish(await serve(call))
    except grpc.aio.AbortError:  # it has ended with a status
        pass
    except Exception as exc:
        refusal = refusal_of(exc)
        call.end(refusal.grpc_code, refusal.sentence, trailers_of(refusal))
    finally:
        call.cancel()
