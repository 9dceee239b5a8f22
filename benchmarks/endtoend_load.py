"""The clients of bench_endtoend, as one process: streams over HTTP or gRPC, and when each of their tokens came.

    python -m benchmarks.endtoend_load

Each request is {"surface": "HTTP" or "gRPC", "address": "host:port", "model": name, "prompts": [[token ids], ...],
"num_tokens": n}; its answer has the fields of a Trace. All streams are begun at once, greedy, and never end early.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import cast

import grpc.aio

from benchmarks.serving_child import Request, serve
from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc

REQUEST_TIMEOUT_S = 600.0
_LINE_BYTES = 1 << 20


@dataclass(slots=True, kw_only=True)
class Arrivals:
    """The tokens of one stream, and when each was there."""

    num_tokens: int  # that it must have in the end
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    def add(self, ids: Sequence[int], now_s: float) -> None:
        """Tokens that came in one message came at one time."""
        self.tokens += ids
        self.times_s += [now_s] * len(ids)

    def check(self) -> None:
        if len(self.tokens) != self.num_tokens:
            raise RuntimeError(f"a stream ended with {len(self.tokens)} tokens, and not with {self.num_tokens}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Whom to ask for what."""

    address: str  # host:port
    model: str
    num_tokens: int


Stream = Callable[[Target, Sequence[int], Arrivals], Coroutine[object, object, None]]


async def run(request: Request) -> dict[str, object]:
    """All streams of a request; the fields of a Trace. Raises RuntimeError where one is not answered."""
    prompts, num_tokens = request["prompts"], request["num_tokens"]
    assert isinstance(prompts, list) and isinstance(num_tokens, int)
    target = Target(address=str(request["address"]), model=str(request["model"]), num_tokens=num_tokens)
    arrivals = [Arrivals(num_tokens=num_tokens) for _ in prompts]
    begun_s = time.perf_counter()
    if request["surface"] == "HTTP":
        await _all(over_http, target, prompts, arrivals)
    else:
        async with grpc.aio.insecure_channel(target.address) as channel:
            await _all(Grpc(pb_grpc.InferenceStub(channel)), target, prompts, arrivals)
    for one in arrivals:
        one.check()
    return {
        "begun_s": begun_s,
        "times_s": [one.times_s for one in arrivals],
        "tokens": [one.tokens for one in arrivals],
    }


async def _all(stream: Stream, target: Target, prompts: Sequence[Sequence[int]], arrivals: Sequence[Arrivals]) -> None:
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S), asyncio.TaskGroup() as tasks:
            for prompt, one in zip(prompts, arrivals, strict=True):
                tasks.create_task(stream(target, prompt, one))
    except ExceptionGroup as failed:  # one is enough to say what is wrong
        raise failed.exceptions[0] from None


# gRPC.


class Grpc:
    """expertmesh.v1 over one channel, as a client of this service has it."""

    def __init__(self, stub: pb_grpc.InferenceStub) -> None:
        self._stub = stub

    async def __call__(self, target: Target, prompt: Sequence[int], arrivals: Arrivals) -> None:
        request = pb.GenerateRequest(
            model=target.model,
            prompt_token_ids=pb.TokenIds(ids=prompt),
            max_tokens=target.num_tokens,
            temperature=0.0,
            ignore_eos=True,
        )
        call = cast("AsyncIterator[pb.GenerateChunk]", self._stub.GenerateStream(request, timeout=REQUEST_TIMEOUT_S))
        try:
            async for chunk in call:
                arrivals.add(chunk.token_ids, time.perf_counter())
        except grpc.aio.AioRpcError as error:
            raise RuntimeError(f"gRPC: {error.code().name}: {error.details()}") from None


# HTTP, by hand: the usual clients take more processor time than the answer is worth here.


async def over_http(target: Target, prompt: Sequence[int], arrivals: Arrivals) -> None:
    """One completion as server-sent events, on a connection of its own."""
    host, _, port = target.address.rpartition(":")
    body = {
        "model": target.model,
        "prompt": list(prompt),
        "max_tokens": target.num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    reader, writer = await asyncio.open_connection(host, int(port), limit=_LINE_BYTES)
    try:
        writer.write(_question(target.address, json.dumps(body).encode()))
        await writer.drain()
        async for piece in read_events(reader):
            now_s = time.perf_counter()
            if piece != b"[DONE]":
                arrivals.add(token_ids(piece), now_s)
    finally:
        writer.close()


def _question(address: str, body: bytes) -> bytes:
    lines = (
        "POST /v1/completions HTTP/1.1",
        f"Host: {address}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def read_events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """What stands behind `data: ` in an HTTP answer of server-sent events. Raises RuntimeError for any other answer."""
    status = (await reader.readline()).decode("latin-1").strip()
    headers = [line async for line in _until_blank(reader)]
    chunked = any(line.lower().replace(" ", "") == "transfer-encoding:chunked" for line in headers)
    if status.split(" ")[1:2] != ["200"]:
        piece = await reader.read(_LINE_BYTES)
        raise RuntimeError(f"HTTP: {status}: {piece[:500].decode(errors='replace')}")
    rest = b""
    async for piece in _pieces(reader, chunked):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()


def token_ids(event: bytes) -> list[int]:
    """The new tokens of one event of a completion. Raises RuntimeError for an event that tells of an error."""
    content = json.loads(event)
    if "choices" not in content:
        raise RuntimeError(f"HTTP: {event[:500].decode(errors='replace')}")
    return [token for choice in content["choices"] for token in choice.get("token_ids") or ()]


async def _until_blank(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    while line := (await reader.readline()).decode("latin-1").strip():
        yield line


async def _pieces(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """The body as it comes."""
    if not chunked:
        while piece := await reader.read(_LINE_BYTES):
            yield piece
        return
    while size := int((await reader.readline()).partition(b";")[0] or b"0", 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)  # the line's end behind a chunk


def start() -> tuple[object, Callable[[Request], object]]:
    """One event loop for all requests, as a client would keep it."""
    loop = asyncio.new_event_loop()
    return {"python": sys.version.split()[0]}, lambda request: loop.run_until_complete(run(request))


if __name__ == "__main__":
    serve(start)
