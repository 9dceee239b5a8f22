"""One stream of a drill over gRPC or HTTP: its tokens as they come, and how it ended, be it with an error."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import cast

import grpc.aio

from benchmarks.drill_history import HUNG, End
from benchmarks.drill_requests import Ask
from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc

GRACE_S = 10.0  # that a server has beyond a request's deadline to say so
OnTokens = Callable[[Sequence[int]], None]
_LINE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Doors:
    """Where the cluster listens, and what it serves."""

    grpc: str  # host:port
    http: str  # host:port
    model: str
    timeout_s: float  # a request's deadline, which the server is told


async def run_stream(doors: Doors, stub: pb_grpc.InferenceStub, ask: Ask, on_tokens: OnTokens) -> End:
    """Runs one request to its end; at the latest GRACE_S after its deadline it counts as hung."""
    try:
        async with asyncio.timeout(doors.timeout_s + GRACE_S):
            if ask.surface == "gRPC":
                return await _over_grpc(doors, stub, ask, on_tokens)
            return await _over_http(doors, ask, on_tokens)
    except TimeoutError:
        return End(error=HUNG, detail=f"no end {GRACE_S:.0f} s after its deadline of {doors.timeout_s:.0f} s")
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
        return End(error=type(error).__name__, detail=str(error))


async def _over_grpc(doors: Doors, stub: pb_grpc.InferenceStub, ask: Ask, on_tokens: OnTokens) -> End:
    request = pb.GenerateRequest(
        model=doors.model,
        prompt_token_ids=pb.TokenIds(ids=ask.prompt),
        timeout_s=doors.timeout_s,
        **ask.sampling,  # type: ignore[arg-type]
    )
    finish = ""
    try:
        async for chunk in cast("AsyncIterator[pb.GenerateChunk]", stub.GenerateStream(request)):
            if chunk.token_ids:
                on_tokens(chunk.token_ids)
            finish = chunk.finish_reason
    except grpc.aio.AioRpcError as error:
        code = error.code()
        return End(error=code.name, detail=error.details() or "", is_retriable=code is grpc.StatusCode.UNAVAILABLE)
    return End(finish=finish) if finish else End(error="NO END", detail="the stream ended without a finish reason")


# HTTP, by hand: the usual clients take more processor time than the answer is worth here.


async def _over_http(doors: Doors, ask: Ask, on_tokens: OnTokens) -> End:
    host, _, port = doors.http.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=_LINE_BYTES)
    try:
        writer.write(_question(doors, ask))
        await writer.drain()
        return await read_answer(reader, on_tokens)
    finally:
        writer.close()


def _question(doors: Doors, ask: Ask) -> bytes:
    body = {
        "model": doors.model,
        "prompt": list(ask.prompt),
        **ask.sampling,
        "stream": True,
        "return_token_ids": True,
    }
    encoded = json.dumps(body).encode()
    lines = (
        "POST /v1/completions HTTP/1.1",
        f"Host: {doors.http}",
        "Content-Type: application/json",
        f"Content-Length: {len(encoded)}",
        f"X-Request-Timeout-Ms: {doors.timeout_s * 1000:.0f}",
        "Connection: close",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + encoded


async def read_answer(reader: asyncio.StreamReader, on_tokens: OnTokens) -> End:
    """An HTTP answer of server-sent events. Raises OSError, EOFError, ValueError where it is none."""
    status = (await reader.readline()).decode("latin-1").strip()
    headers: dict[str, str] = {}
    while line := (await reader.readline()).decode("latin-1").strip():
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    code = status.split(" ")[1:2]
    if code != ["200"]:
        body = await reader.read(_LINE_BYTES)
        retriable = code == ["503"] and "retry-after" in headers
        return End(
            error=f"HTTP {' '.join(code)}".strip(), detail=body[:500].decode(errors="replace"), is_retriable=retriable
        )
    finish = None
    async for event in _events(_pieces(reader, is_chunked=headers.get("transfer-encoding") == "chunked")):
        if event == b"[DONE]":
            break
        content = json.loads(event)
        if "error" in content:
            return _late_error(content["error"])
        for choice in content["choices"]:
            if ids := choice.get("token_ids"):
                on_tokens(ids)
            finish = choice.get("finish_reason") or finish
    return End(finish=finish) if finish else End(error="NO END", detail="the stream ended without a finish reason")


def _late_error(error: dict[str, object]) -> End:
    """An error in the middle of a stream: the status is out, so its code stands in the event."""
    code = str(error.get("code"))
    return End(error=f"HTTP event {code}", detail=str(error.get("message")), is_retriable=code == "unavailable")


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """What stands behind `data: `, however the pieces are cut."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()


async def _pieces(reader: asyncio.StreamReader, *, is_chunked: bool) -> AsyncIterator[bytes]:
    """The body as it comes. Raises EOFError where it ends too early."""
    if not is_chunked:
        while piece := await reader.read(_LINE_BYTES):
            yield piece
        return
    while size := int((await _line(reader)).partition(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)  # the line's end behind a chunk


async def _line(reader: asyncio.StreamReader) -> bytes:
    line = await reader.readline()
    if not line.endswith(b"\n"):
        raise EOFError("the connection was closed in the middle of the answer")
    return line
