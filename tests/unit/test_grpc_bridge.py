"""Coroutines behind grpc's threaded server, with real clients: every kind of RPC, and every way in which one ends."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from google.protobuf.wrappers_pb2 import Int64Value
from grpc_bridge_fakes import SECRET, Numbers, handlers_of
from malformed_case import WireCase
from malformed_http2 import DATA, END_HEADERS, END_STREAM, HEADERS, PREFACE, SETTINGS, block, frame, message
from sweep_wire import http2_answer

from cluster import grpc_wire
from cluster.grpc_bridge import Bridge, BridgeServer
from cluster.keys import Unauthenticated

SMALL_WINDOW = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]


def check(details: grpc.HandlerCallDetails) -> None:
    if dict(details.invocation_metadata or ()).get("key") == "wrong":
        raise Unauthenticated("this key is wrong")


async def next_of(call: object) -> int:
    return (await call.read()).value  # type: ignore[attr-defined]


class Served:
    def __init__(self, numbers: Numbers, server: BridgeServer, address: str, channel: grpc.aio.Channel) -> None:
        self.numbers, self.server, self.address, self.channel = numbers, server, address, channel

    def stream(self, method: str, value: int = 0, **options: object) -> grpc.aio.UnaryStreamCall:
        call = self.channel.unary_stream(f"/Numbers/{method}", Int64Value.SerializeToString, Int64Value.FromString)
        return call(Int64Value(value=value), **options)  # type: ignore[arg-type]

    async def unary(self, method: str, value: int) -> int:
        call = self.channel.unary_unary(f"/Numbers/{method}", Int64Value.SerializeToString, Int64Value.FromString)
        return (await call(Int64Value(value=value))).value

    def both(self, method: str) -> grpc.aio.StreamStreamCall:
        return self.channel.stream_stream(f"/Numbers/{method}", Int64Value.SerializeToString, Int64Value.FromString)()


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """Nothing of any RPC is left at the end, with us or with grpc."""
    numbers = Numbers()
    bridge = Bridge(asyncio.get_running_loop(), (check,))
    bridge.add_generic_rpc_handlers((handlers_of(numbers),))
    server = BridgeServer(bridge)
    address = f"127.0.0.1:{server.start('127.0.0.1:0')}"
    rpcs_of_grpc = cast("Any", server._server)._state.rpc_states
    async with grpc.aio.insecure_channel(address) as channel:
        yield Served(numbers, server, address, channel)
        async with asyncio.timeout(5):
            while numbers.open or bridge._open or rpcs_of_grpc:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert numbers.load.count == 0
    await server.stop(0.0)
    assert not server.is_serving


async def values_of(call: grpc.aio.Call) -> list[int]:
    return [answer.value async for answer in call]  # type: ignore[attr-defined]


async def until(numbers: Numbers, num_open: int) -> None:
    async with asyncio.timeout(5):
        while numbers.open != num_open:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_unary_rpc_is_answered_with_its_trailers(served: Served) -> None:
    assert await served.unary("Double", 21) == 42
    call = served.channel.unary_unary("/Numbers/Double")(b"")
    await call
    assert ("asked", "0") in tuple(await call.trailing_metadata())


async def test_a_stream_arrives_whole_and_in_order(served: Served) -> None:
    assert await values_of(served.stream("Count", 500)) == [*range(500)]
    assert await values_of(served.stream("Count", 0)) == []


async def test_many_streams_run_side_by_side(served: Served) -> None:
    found = await asyncio.gather(*(values_of(served.stream("Count", 50)) for _ in range(50)))
    assert found == [[*range(50)]] * 50


async def test_a_clients_stream_is_read_to_its_end(served: Served) -> None:
    total = served.channel.stream_unary("/Numbers/Total", Int64Value.SerializeToString, Int64Value.FromString)
    assert (await total(iter([Int64Value(value=value) for value in range(100)]))).value == 4950


async def test_both_sides_of_a_stream_take_turns(served: Served) -> None:
    call = served.both("Echo")
    for value in range(1, 20):
        await call.write(Int64Value(value=value))
        assert await next_of(call) == value
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.OK


async def test_a_client_that_leaves_frees_its_rpc_at_once(served: Served) -> None:
    calls = [served.stream("Wait") for _ in range(8)]
    await asyncio.gather(*(call.read() for call in calls))
    assert served.numbers.open == 8
    begin = time.monotonic()
    for call in calls:
        call.cancel()
    await until(served.numbers, 0)
    assert time.monotonic() - begin < 1.0


async def test_a_client_that_leaves_while_it_sends_frees_its_rpc(served: Served) -> None:
    call = served.both("Echo")
    await call.write(Int64Value(value=1))
    await call.read()
    call.cancel()  # the fixture waits until nothing is left


async def test_a_deadline_is_known_and_ends_the_rpc(served: Served) -> None:
    call = served.stream("Wait", timeout=0.5)
    await call.read()
    remaining_s = served.numbers.remaining_s
    assert remaining_s is not None and 0 < remaining_s <= 0.5
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(served.numbers, 0)


async def test_without_a_deadline_nothing_is_known_of_one(served: Served) -> None:
    call = served.stream("Wait")
    await call.read()
    assert served.numbers.remaining_s is None
    call.cancel()


@pytest.mark.parametrize("num_before", [1, 3, 500])
async def test_an_abort_comes_behind_all_that_was_written(served: Served, num_before: int) -> None:
    call = served.stream("Count", -num_before)
    assert [await next_of(call) for _ in range(num_before)] == [*range(num_before)]
    with pytest.raises(grpc.aio.AioRpcError) as aborted:
        await call.read()
    assert aborted.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "no more of them" in (aborted.value.details() or "")
    assert ("retry-after", "1") in tuple(aborted.value.trailing_metadata() or ())


async def test_what_is_over_the_limit_is_refused_at_once_and_the_limit_may_be_raised(served: Served) -> None:
    open_calls = [served.stream("Wait") for _ in range(8)]
    await asyncio.gather(*(call.read() for call in open_calls))
    begin = time.monotonic()
    refused = await asyncio.gather(*(served.stream("Wait").code() for _ in range(100)))
    assert set(refused) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert time.monotonic() - begin < 2.0
    served.numbers.load.limit = 300
    more = [served.stream("Wait") for _ in range(292)]
    assert all([await call.read() for call in more])
    for call in (*open_calls, *more):
        call.cancel()


async def test_a_client_that_does_not_read_stops_its_stream_and_loses_it(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_wire, "WRITE_TIMEOUT_S", 0.3)
    served.numbers.padding = Int64Value(value=1).SerializeToString() * 10_000  # 20 kB, all of which count as one field
    async with grpc.aio.insecure_channel(served.address, options=SMALL_WINDOW) as channel:
        method = channel.unary_stream("/Numbers/Count", Int64Value.SerializeToString, Int64Value.FromString)
        call = method(Int64Value(value=100_000))
        await call.initial_metadata()
        await asyncio.sleep(1.0)
        assert served.numbers.written < 1000
        with pytest.raises(grpc.aio.AioRpcError) as lost:
            await values_of(call)
    assert lost.value.code() is grpc.StatusCode.CANCELLED


async def test_an_error_of_ours_tells_nothing_but_an_id(served: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await served.unary("Fail", 1)
    assert failed.value.code() is grpc.StatusCode.INTERNAL
    assert SECRET not in (failed.value.details() or "") and "its id" in (failed.value.details() or "")


@pytest.mark.parametrize("method", ["Double", "Total", "Count", "Echo"])
async def test_bytes_that_are_no_message_are_the_clients_fault(served: Served, method: str) -> None:
    call = served.channel.stream_stream(f"/Numbers/{method}")(iter([b"\xff\xff"]))
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_call_without_a_message_is_the_clients_fault(served: Served) -> None:
    call = served.channel.stream_stream("/Numbers/Double")(iter([]))
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_method_that_is_not_there_is_unimplemented(served: Served) -> None:
    for path in ("/Numbers/None", "/None/Double"):
        assert await served.channel.stream_stream(path)().code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("path", ["/\xff\xfe", "\xff", "/Numbers/Double\xff", "/Numbers\xc3/Double"])
async def test_a_path_that_is_no_text_is_unimplemented_and_ends_nothing(served: Served, path: str) -> None:
    headers = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x"), ("te", "trailers")]
    head = frame(HEADERS, block([*headers, ("content-type", "application/grpc")]), flags=END_HEADERS, stream=1)
    wire = PREFACE + frame(SETTINGS) + head + frame(DATA, message(b""), flags=END_STREAM, stream=1)
    case = WireCase(name="no text", wire=wire, allowed=frozenset())
    for _ in range(20):
        answer = await asyncio.to_thread(http2_answer, served.address, case, 5.0)
        assert answer.end == "UNIMPLEMENTED"
    assert await served.unary("Double", 2) == 4
    assert served.server.is_serving


async def test_who_is_not_let_in_never_reaches_the_loop(served: Served) -> None:
    found: list[grpc.StatusCode] = []

    def ask() -> None:
        with grpc.insecure_channel(served.address) as channel:
            call = channel.stream_stream("/Numbers/Total")(iter([]), metadata=(("key", "wrong"),))
            found.append(call.code())

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join(5)  # and the loop stands still
    assert found == [grpc.StatusCode.UNAUTHENTICATED]


async def test_a_server_that_stops_lets_what_is_open_go_on_for_a_while(served: Served) -> None:
    call, silent = served.both("Echo"), served.stream("Wait")
    await call.write(Int64Value(value=1))
    await asyncio.gather(call.read(), silent.read())
    stopping = asyncio.create_task(served.server.stop(1.0))
    await asyncio.sleep(0.3)
    await call.write(Int64Value(value=2))
    assert await next_of(call) == 2
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.OK
    await stopping
    assert await silent.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
    assert (served.numbers.open, served.server.is_serving) == (0, False)


async def test_hundreds_of_clients_that_come_and_leave_leave_nothing(served: Served) -> None:
    served.numbers.load.limit = 1000

    async def come_and_leave(number: int) -> None:
        call = served.stream("Wait" if number % 2 else "Count", 50)
        if number % 3:
            await call.read()
        call.cancel()

    await asyncio.gather(*map(come_and_leave, range(400)))
    assert await served.unary("Double", 3) == 6  # and the fixture looks for what is left
