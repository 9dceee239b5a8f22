"""The clients of benchmarks/bench_endtoend.py and what is made of their times; against servers that are played."""

import asyncio
import json
from collections.abc import AsyncIterator
from http import HTTPStatus

import grpc.aio
import pytest

from benchmarks.bench_start import Start, ask_one_token
from benchmarks.bench_start import as_markdown as start_markdown
from benchmarks.bench_start import as_plain as start_plain
from benchmarks.endtoend_load import Arrivals, read_events, run, token_ids
from benchmarks.endtoend_options import parse
from benchmarks.endtoend_report import ENGINE, Report, as_markdown, as_plain, corrected_ratios
from benchmarks.serving_machine import Machine
from benchmarks.serving_stats import Measurement, Trace, measure, summarise
from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc
from experts.errors import ServingError

MACHINE = Machine(
    cpu="A CPU", cores=2, flags=(), memory_gib=24.0, system="Linux", versions={}, commit="abc", busy_share=0.0
)


def measured(tokens_per_s: float, idle_cores: float = 0.0, identical: float | None = 1.0) -> Measurement:
    return Measurement(
        tokens_per_s=tokens_per_s,
        ttft_p50_ms=1,
        ttft_p99_ms=2,
        gap_p50_ms=3,
        gap_p99_ms=4,
        identical=identical,
        idle_cores=idle_cores,
    )


# Latency.


def test_tokens_of_one_message_have_one_time():
    arrivals = Arrivals(num_tokens=3)
    arrivals.add([5], 1.0)
    arrivals.add([6, 7], 3.0)
    arrivals.check()
    found = measure([Trace(begun_s=0.5, times_s=[arrivals.times_s], tokens=[arrivals.tokens])], [[5, 6, 7]])
    assert found.tokens_per_s == pytest.approx(3 / 2.5)
    assert found.ttft_p50_ms == pytest.approx(500)
    assert found.gap_p50_ms == pytest.approx(1000)  # of 2000 and 0
    assert found.identical == 1.0


def test_a_stream_with_too_few_tokens_is_an_error():
    with pytest.raises(RuntimeError, match="1 tokens, and not with 2"):
        Arrivals(num_tokens=2, tokens=[5], times_s=[1.0]).check()


# HTTP.


def event(*ids: int) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": "a", "token_ids": list(ids)}]}).encode() + b"\n\n"


async def events_of(answer: bytes) -> list[bytes]:
    reader = asyncio.StreamReader()
    reader.feed_data(answer)
    reader.feed_eof()
    return [one async for one in read_events(reader)]


def chunked(*pieces: bytes) -> bytes:
    body = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body


async def test_events_may_be_cut_anywhere_by_chunks():
    whole = event(1) + b": a comment\n" + event(2, 3) + b"data: [DONE]\n\n"
    for cut in range(1, len(whole)):
        found = await events_of(chunked(whole[:cut], whole[cut:]))
        assert [token_ids(one) for one in found[:2]] == [[1], [2, 3]]
        assert found[2:] == [b"[DONE]"]


async def test_an_answer_without_chunks_ends_with_its_connection():
    found = await events_of(b"HTTP/1.1 200 OK\r\n\r\n" + event(1) + event(2))
    assert [token_ids(one) for one in found] == [[1], [2]]


async def test_any_other_status_is_an_error_with_its_text():
    with pytest.raises(RuntimeError, match="429 Too Many Requests: full"):
        await events_of(b"HTTP/1.1 429 Too Many Requests\r\n\r\nfull")


def test_an_event_that_tells_of_an_error_is_one():
    with pytest.raises(RuntimeError, match="gone"):
        token_ids(b'{"error": {"message": "gone"}}')


def test_events_without_new_tokens_have_none():
    assert token_ids(b'{"choices": []}') == []
    assert token_ids(b'{"choices": [{"text": "", "token_ids": null}]}') == []


async def play_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers with the prompt's tokens plus one, one event each."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = next(int(line.split(":")[1]) for line in head.splitlines() if line.startswith("Content-Length"))
    body = json.loads(await reader.readexactly(length))
    assert head.startswith("POST /v1/completions ") and body["ignore_eos"] and body["stream"]
    pieces = [event(token + 1) for token in body["prompt"][: body["max_tokens"]]]
    writer.write(chunked(*pieces, b"data: [DONE]\n\n"))
    await writer.drain()
    writer.close()


def request(surface: str, port: int) -> dict[str, object]:
    prompts = [[1, 2, 3], [7, 8, 9]]
    return {
        "surface": surface,
        "address": f"127.0.0.1:{port}",
        "model": "m",
        "prompts": prompts,
        "num_tokens": 3,
    }


async def test_all_streams_of_a_request_are_asked_over_http():
    server = await asyncio.start_server(play_http, "127.0.0.1", 0)
    async with server:
        answer = await run(request("HTTP", server.sockets[0].getsockname()[1]))
    trace = Trace(**answer)  # type: ignore[arg-type]
    assert trace.tokens == [[2, 3, 4], [8, 9, 10]]
    assert all(len(times_s) == 3 and times_s[0] > trace.begun_s for times_s in trace.times_s)


async def test_one_stream_that_fails_is_the_error_of_all():
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {HTTPStatus.SERVICE_UNAVAILABLE.value} Unavailable\r\n\r\nno engine".encode())
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        with pytest.raises(RuntimeError, match="503 Unavailable"):
            await run(request("HTTP", server.sockets[0].getsockname()[1]))


# gRPC.


class PlayedInference(pb_grpc.InferenceServicer):
    async def GenerateStream(  # type: ignore[override]
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateChunk]:
        assert request.ignore_eos and request.max_tokens == 3
        first, *rest = request.prompt_token_ids.ids
        if first == 7:
            yield pb.GenerateChunk(token_ids=[first + 1])
            yield pb.GenerateChunk(token_ids=[token + 1 for token in rest])
        else:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no engine")


@pytest.fixture
async def played_port() -> AsyncIterator[int]:
    server = grpc.aio.server()
    pb_grpc.add_InferenceServicer_to_server(PlayedInference(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield port
    await server.stop(None)


async def test_all_streams_of_a_request_are_asked_over_grpc(played_port: int):
    answer = await run({**request("gRPC", played_port), "prompts": [[7, 8, 9], [7, 1, 2]]})
    assert answer["tokens"] == [[8, 9, 10], [8, 2, 3]]
    [first, second] = Trace(**answer).times_s  # type: ignore[arg-type]
    assert first[1] == first[2] and second[1] == second[2]


async def test_an_rpc_that_fails_says_why(played_port: int):
    with pytest.raises(RuntimeError, match="gRPC: UNAVAILABLE: no engine"):
        await run(request("gRPC", played_port))


# The command line.


def test_a_stream_for_every_attention_replica():
    options = parse(["--attention", "2", "--rounds", "1"])
    assert options.setup.name == "D=4 x2"
    assert options.serving.streams == (8, 32, 64)
    assert parse([]).setup.name == "D=4"
    with pytest.raises(SystemExit):
        parse(["--attention", "2", "--streams", "1,8"])


# The report.

ROUNDS = {
    (ENGINE, 64): [measured(100, 0.2, None), measured(50, 0.0, None), measured(200, 0.4, None)],
    ("HTTP", 64): [measured(95), measured(45), measured(180)],
    ("gRPC", 64): [measured(98), measured(48, identical=0.5), measured(190)],
}


def a_report() -> Report:
    return Report(
        title="End to end: nano, float32, D=4",
        date="2026-01-02",
        command="python -m benchmarks.bench_endtoend",
        machine=MACHINE,
        settings={"threads": "1"},
        cells=summarise(ROUNDS, against=(ENGINE,)),
        corrected=corrected_ratios(ROUNDS, cores=2),
        notes=["A sentence."],
    )


def test_what_the_idle_cluster_takes_from_the_engines_is_taken_off_the_ratio():
    found = corrected_ratios(ROUNDS, cores=2)
    assert set(found) == {("HTTP", 64), ("gRPC", 64)}
    assert (found["HTTP", 64].lowest, found["HTTP", 64].highest) == pytest.approx((0.72, 0.9))
    assert found["HTTP", 64].median == pytest.approx(0.855)


def test_the_report_shows_both_ratios():
    text = as_markdown(a_report())
    [http] = [line for line in text.splitlines() if line.startswith("| 64      | HTTP")]
    assert "0.900 (0.900 to 0.950)" in http and "0.855 (0.720 to 0.900)" in http
    assert "A sentence." in text


def test_the_json_has_the_corrected_ratios_by_streams_and_way():
    plain = json.loads(json.dumps(as_plain(a_report())))
    assert plain["corrected"]["64"] == pytest.approx({"HTTP": 0.855, "gRPC": 0.882})


# The start.


def test_the_start_is_told_by_its_median():
    starts = [Start(30.0, 31.0), Start(20.0, 22.0), Start(40.0, 45.0)]
    assert "first token after 31.0 (22.0 to 45.0) s" in start_markdown(starts, MACHINE, "this")
    assert start_plain(starts, MACHINE, "this")["first_token_s"] == 31.0


@pytest.mark.parametrize("status", ["200 OK", "503 Unavailable"])
async def test_the_first_token_has_to_be_a_real_answer(status: str):
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        asked = asyncio.to_thread(ask_one_token, url, "m")
        if status.startswith("200"):
            await asked
        else:
            with pytest.raises(ServingError, match="503"):
                await asked
    with pytest.raises(ServingError, match="did not answer"):
        await asyncio.to_thread(ask_one_token, url, "m")
