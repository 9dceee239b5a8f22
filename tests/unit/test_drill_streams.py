"""How benchmarks/drill.py reads answers and keeps its history: against answers that are played."""

import asyncio
import json
from dataclasses import asdict
from pathlib import Path

import grpc.aio
import pytest

from benchmarks.drill_history import HUNG, End, Recorder, read_history, streams_of
from benchmarks.drill_load import Job, Load
from benchmarks.drill_requests import GREEDY, Ask, Mix
from benchmarks.drill_streams import Doors, read_answer, run_stream
from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc

ASK = Ask(name="1", surface="gRPC", prompt=[5, 6], sampling={**GREEDY, "max_tokens": 3})
MIX = Mix(seed=0, prompts=[[5, 6]], num_tokens=(3, 3))


def doors(port: int, timeout_s: float = 20.0) -> Doors:
    return Doors(grpc=f"127.0.0.1:{port}", http=f"127.0.0.1:{port}", model="m", timeout_s=timeout_s)


class Played(pb_grpc.InferenceServicer):
    """Answers with what the test says."""

    def __init__(self, code: grpc.StatusCode | None = None, *, hangs: bool = False) -> None:
        self._code = code
        self._hangs = hangs

    async def GenerateStream(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext):
        assert list(request.prompt_token_ids.ids) == [5, 6]
        assert request.HasField("temperature")
        yield pb.GenerateChunk(token_ids=[7])
        if self._hangs:
            await asyncio.sleep(60)
        if self._code is not None:
            await context.abort(self._code, "no live copy of expert group 1 (retry after 1 s)")
        yield pb.GenerateChunk(token_ids=[8, 9], finish_reason="length")


async def over_grpc(played: Played, timeout_s: float = 20.0) -> tuple[list[int], End]:
    server = grpc.aio.server()
    pb_grpc.add_InferenceServicer_to_server(played, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    tokens: list[int] = []
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            end = await run_stream(doors(port, timeout_s), pb_grpc.InferenceStub(channel), ASK, tokens.extend)
    finally:
        await server.stop(None)
    return tokens, end


async def test_a_grpc_stream_gives_its_tokens_and_its_finish_reason():
    assert await over_grpc(Played()) == ([7, 8, 9], End(finish="length"))


async def test_unavailable_is_retriable_and_keeps_the_tokens_before_it():
    tokens, end = await over_grpc(Played(grpc.StatusCode.UNAVAILABLE))
    assert tokens == [7]
    assert (end.error, end.is_retriable) == ("UNAVAILABLE", True)
    assert "expert group 1" in end.detail


async def test_internal_is_not_retriable():
    _, end = await over_grpc(Played(grpc.StatusCode.INTERNAL))
    assert (end.error, end.is_retriable) == ("INTERNAL", False)


async def test_a_stream_without_an_end_is_hung(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.drill_streams.GRACE_S", 0.1)
    tokens, end = await over_grpc(Played(hangs=True), timeout_s=0.5)
    assert tokens == [7]
    assert end.error == HUNG


async def test_nobody_there_is_an_error_over_http():
    ask = Ask(name="1", surface="HTTP", prompt=[5], sampling={})
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        end = await run_stream(doors(1), pb_grpc.InferenceStub(channel), ask, lambda ids: None)
    assert end.error == "ConnectionRefusedError"


# HTTP.


def event(*ids: int, finish: str | None = None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"token_ids": list(ids), "finish_reason": finish}]}).encode() + b"\n\n"


async def answer_of(raw: bytes) -> tuple[list[int], End]:
    reader = asyncio.StreamReader()
    reader.feed_data(raw)
    reader.feed_eof()
    tokens: list[int] = []
    return tokens, await read_answer(reader, tokens.extend)


def chunked(*pieces: bytes, whole: bool = True) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in pieces) + (b"0\r\n\r\n" if whole else b"")


async def test_events_may_be_cut_anywhere():
    whole = event(1) + event(2, 3, finish="stop") + b"data: [DONE]\n\n"
    for cut in range(1, len(whole)):
        assert await answer_of(chunked(whole[:cut], whole[cut:])) == ([1, 2, 3], End(finish="stop"))


async def test_a_503_with_retry_after_is_retriable_and_without_is_not():
    body = b'{"error": {"message": "no live copy"}}'
    _, with_header = await answer_of(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n\r\n" + body)
    _, without = await answer_of(b"HTTP/1.1 503 Service Unavailable\r\n\r\n" + body)
    assert (with_header.error, with_header.is_retriable) == ("HTTP 503", True)
    assert not without.is_retriable
    assert "no live copy" in with_header.detail


@pytest.mark.parametrize(("code", "retriable"), [("unavailable", True), ("internal_error", False)])
async def test_an_error_in_the_middle_is_known_by_its_code(code: str, retriable: bool):
    error = b"data: " + json.dumps({"error": {"message": "gone", "code": code}}).encode() + b"\n\n"
    tokens, end = await answer_of(chunked(event(1), error))
    assert tokens == [1]
    assert (end.error, end.detail, end.is_retriable) == (f"HTTP event {code}", "gone", retriable)


async def test_an_answer_that_breaks_off_is_no_end():
    with pytest.raises(EOFError):
        await answer_of(chunked(event(1), whole=False))
    _, end = await answer_of(chunked(event(1)))
    assert end.error == "NO END"


# The history.


def test_what_is_recorded_is_read_again(tmp_path: Path):
    file = tmp_path / "history.jsonl"
    with Recorder(file) as recorder:
        recorder.begun(ASK, at_s=1.0)
        recorder.tokens(ASK, [7], at_s=2.0)
        recorder.tokens(ASK, [8, 9], at_s=3.0)
        assert len(read_history(file)) == 1  # every line is there at once
        recorder.ended(ASK, End(finish="length"), at_s=4.0)
    (stream,) = read_history(file)
    assert stream.ask == ASK
    assert (stream.tokens, stream.times_s) == ([7, 8, 9], [2.0, 3.0, 3.0])
    assert (stream.begun_s, stream.ended_s, stream.end) == (1.0, 4.0, End(finish="length"))
    assert stream.was_open(1.0)
    assert not stream.was_open(4.0)


def test_a_history_that_was_cut_off_is_read_as_far_as_it_goes():
    begun = json.dumps({"event": "begun", "at_s": 1, "name": "1", "surface": "gRPC", "prompt": [], "sampling": {}})
    (stream,) = streams_of([begun + "\n", '{"event": "tok'])
    assert stream.ended_s is None


async def test_the_load_keeps_so_many_streams_open_until_it_is_told_to_end(tmp_path: Path):
    server = grpc.aio.server()
    pb_grpc.add_InferenceServicer_to_server(Played(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    job = Job(history=str(tmp_path / "h"), concurrency=3, doors=doors(port), mix=MIX)
    assert Job.from_json(json.dumps(asdict(job))) == job
    with Recorder(tmp_path / "h") as recorder:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub, load = pb_grpc.InferenceStub(channel), Load(job, recorder)
            running = asyncio.create_task(load.run(stub))
            while load.counts["ended"] < 10:  # noqa: ASYNC110  (counts change only while we wait)
                await asyncio.sleep(0.01)
            assert await load.probe(stub, 0) is None
            load.end()
            await running
    await server.stop(None)
    streams = read_history(tmp_path / "h")
    assert load.counts["begun"] == load.counts["ended"] == len(streams)
    assert [stream.ask.name for stream in streams if stream.ask.is_probe] == ["after fault 0"]
    assert all(stream.tokens == [7, 8, 9] for stream in streams if stream.ask.surface == "gRPC")
