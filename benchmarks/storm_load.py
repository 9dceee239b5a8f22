"""The clients of a storm, as one process: so many at a time, or so many a second, and those that leave early.

    python -m benchmarks.storm_load

Each request is {"do": "closed", "streams": n, "seconds": s, "spread_s": t}, {"do": "open", "per_s": r, "seconds": s},
"flood" for "open" without grpc's client, {"do": "cancel", "count": n, "at_a_time": m} or {"do": "expire", "count": n,
"at_a_time": m}, with "address", "model" and "num_tokens"; its answer has the fields of Outcome.
"""

import asyncio
import dataclasses
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import cast

import grpc
import grpc.aio

from benchmarks.serving_child import Request, serve
from benchmarks.storm_flood import Connection
from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc

TIMEOUT_S = 60.0
NUM_CHANNELS = 8  # a server bounds the streams of one connection
PROMPT_TOKENS = 16


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of the requests of one storm."""

    codes: Counter[str] = field(default_factory=Counter)  # status names; of a flood OK, REFUSED, BROKEN, UNANSWERED
    tokens_at_s: list[float] = field(default_factory=list)  # of answers that were whole, when each of their tokens came
    refused_after_s: list[float] = field(default_factory=list)  # also by UNAVAILABLE
    began_s: float = field(default_factory=time.monotonic)


class Storm:
    """Streams over a few connections; each with a prompt of its own."""

    def __init__(self, address: str, num_tokens: int) -> None:
        self._channels = [
            grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
            for _ in range(NUM_CHANNELS)
        ]
        self._stubs = [pb_grpc.InferenceStub(channel) for channel in self._channels]
        self._num_tokens = num_tokens
        self._random = random.Random(0)
        self._count = 0
        self.outcome = Outcome()

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def closed(self, streams: int, seconds: float, spread_s: float) -> None:
        """So many streams, the first of them begun over spread_s, each begun again when it ends."""
        until_s = time.monotonic() + seconds

        async def again(after_s: float) -> None:
            await asyncio.sleep(after_s)
            while time.monotonic() < until_s:
                await self._one()

        await asyncio.gather(*(again(spread_s * stream / streams) for stream in range(streams)))

    async def open(self, per_s: float, seconds: float) -> None:
        """Streams that arrive at random, whatever becomes of those before."""
        until_s = time.monotonic() + seconds
        async with asyncio.TaskGroup() as tasks:
            while (now_s := time.monotonic()) < until_s:
                tasks.create_task(self._one())
                await asyncio.sleep(max(0.0, now_s + self._random.expovariate(per_s) - time.monotonic()))

    async def flood(self, address: str, per_s: float, seconds: float) -> None:
        """The same as `open`, by connections of our own: what is no answer is told apart by its tokens only."""
        loop = asyncio.get_running_loop()
        host, _, port = address.rpartition(":")
        connections = [
            (await loop.create_connection(lambda: Connection(int(TIMEOUT_S)), host, int(port)))[1]
            for _ in range(NUM_CHANNELS)
        ]
        until_s = time.monotonic() + seconds
        num_sent = 0
        while (now_s := time.monotonic()) < until_s:
            connections[num_sent % NUM_CHANNELS].send(self._request())
            num_sent += 1
            await asyncio.sleep(max(0.0, now_s + self._random.expovariate(per_s) - time.monotonic()))
        for each in connections:
            await each.answered(until_s + TIMEOUT_S - time.monotonic())
        ended = [request for each in connections for request in each.ended]
        for request in ended:
            if len(request.token_times_s) == self._num_tokens:
                self.outcome.codes["OK"] += 1
                self.outcome.tokens_at_s += request.token_times_s
            elif request.token_times_s:
                self.outcome.codes["BROKEN"] += 1
            else:
                self.outcome.codes["REFUSED"] += 1
                self.outcome.refused_after_s.append(request.ended_s - request.begun_s)
        if num_sent > len(ended):
            self.outcome.codes["UNANSWERED"] += num_sent - len(ended)
        for each in connections:
            each.close()

    async def some(self, count: int, at_a_time: int, one: Callable[[], Awaitable[None]]) -> None:
        left = iter(range(count))

        async def again() -> None:
            for _ in left:
                await one()

        await asyncio.gather(*(again() for _ in range(at_a_time)))

    async def cancelled(self) -> None:
        """One that leaves before or while it is answered."""
        call = self._call(TIMEOUT_S)
        try:
            async with asyncio.timeout(self._random.uniform(0.0, 1.0)):
                while await call.read():
                    pass
        except TimeoutError:
            call.cancel()
        except grpc.aio.AioRpcError:
            pass
        self.outcome.codes[(await call.code()).name] += 1

    async def expired(self) -> None:
        """One whose deadline passes before it is answered."""
        call = self._call(self._random.uniform(0.05, 0.5))
        try:
            while await call.read():
                pass
        except grpc.aio.AioRpcError:
            pass
        self.outcome.codes[(await call.code()).name] += 1

    async def _one(self) -> None:
        begun_s = time.monotonic()
        times: list[float] = []
        try:
            async for chunk in self._call(TIMEOUT_S):
                times += [time.monotonic()] * len(chunk.token_ids)
        except grpc.aio.AioRpcError as error:
            self.outcome.codes[error.code().name] += 1
            if error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE):
                self.outcome.refused_after_s.append(time.monotonic() - begun_s)
            return
        self.outcome.codes["OK"] += 1
        self.outcome.tokens_at_s += times

    def _call(self, timeout_s: float) -> grpc.aio.UnaryStreamCall:
        self._count += 1
        stub = self._stubs[self._count % NUM_CHANNELS]
        return cast("grpc.aio.UnaryStreamCall", stub.GenerateStream(self._request(), timeout=timeout_s))

    def _request(self) -> pb.GenerateRequest:
        return pb.GenerateRequest(
            prompt_token_ids=pb.TokenIds(ids=[self._random.randrange(1000) for _ in range(PROMPT_TOKENS)]),
            max_tokens=self._num_tokens,
            temperature=0.0,
            ignore_eos=True,
        )


async def run(request: Request) -> dict[str, object]:
    """One storm, as the request says. Raises ValueError for one that is none."""
    storm = Storm(str(request["address"]), int(str(request["num_tokens"])))
    number = {name: float(str(value)) for name, value in request.items() if isinstance(value, int | float)}
    match request["do"]:
        case "closed":
            await storm.closed(int(number["streams"]), number["seconds"], number["spread_s"])
        case "open":
            await storm.open(number["per_s"], number["seconds"])
        case "flood":
            await storm.flood(str(request["address"]), number["per_s"], number["seconds"])
        case "cancel" | "expire" as kind:
            one = storm.cancelled if kind == "cancel" else storm.expired
            await storm.some(int(number["count"]), int(number["at_a_time"]), one)
        case other:
            raise ValueError(f"unknown request {other!r}")
    await storm.close()
    # Not asdict, which makes a Counter of a Counter's items.
    return {each.name: getattr(storm.outcome, each.name) for each in dataclasses.fields(storm.outcome)}


if __name__ == "__main__":
    serve(lambda: (None, lambda request: asyncio.run(run(request))))
