"""How a request to vllm.grpc.engine.VllmEngine ends before its answer does: aborted, cancelled, too late."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from vllm_engine_fakes import Model, Served, asked, model_in, rest_of, serving

from cluster.metrics import GATEWAY


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model_in(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def served(model: Model) -> AsyncIterator[Served]:
    async with serving(model) as found:
        yield found


async def test_an_aborted_stream_ends_and_says_so(served: Served) -> None:
    served.engine.delay_s, served.engine.tokens = 0.01, [97] * 60
    call = served.stub.Generate(asked(stream=True, request_id="r", n=2))
    first = await call.read()
    assert list(first.chunk.token_ids) == [97]
    await served.stub.Abort(pb.AbortRequest(request_ids=["r", "r", "unknown", ""]))
    rest = await rest_of(call)
    assert [(answer.complete.finish_reason, answer.complete.index) for answer in rest[-2:]] == [
        ("abort", 0),
        ("abort", 1),
    ]
    assert not any(answer.HasField("complete") for answer in rest[:-2])
    assert await call.code() is grpc.StatusCode.OK
    assert served.engine.aborted == 1
    await served.stub.Abort(pb.AbortRequest(request_ids=["r"]))


async def test_a_deadline_that_is_no_number_is_refused(served: Served) -> None:
    call = served.stub.Generate(asked(), metadata=(("x-request-timeout-ms", "soon"),))
    with pytest.raises(grpc.aio.AioRpcError, match="x-request-timeout-ms must be a whole number") as refused:
        await call.read()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not served.engine.seen


async def test_an_abort_is_counted_as_a_cancellation(served: Served) -> None:
    served.engine.delay_s = 30.0
    before = cancelled_over_grpc()
    call = served.stub.Generate(asked(request_id="r"))
    waiting = asyncio.create_task(call.read())
    await served.until_open()
    await served.stub.Abort(pb.AbortRequest(request_ids=["r"]))
    await waiting
    assert await served.is_idle()
    assert cancelled_over_grpc() == before + 1


def cancelled_over_grpc() -> float:
    [requests] = [metric for metric in GATEWAY.collect() if metric.name == "expertmesh_requests"]
    return next(s.value for s in requests.samples if s.labels == {"surface": "grpc", "outcome": "cancelled"})


async def test_an_answer_in_one_piece_is_aborted_too(served: Served) -> None:
    served.engine.delay_s = 30.0
    call = served.stub.Generate(asked(request_id="r"))
    waiting = asyncio.create_task(call.read())
    await served.until_open()
    await served.stub.Abort(pb.AbortRequest(request_ids=["r"]))
    answer = await asyncio.wait_for(waiting, 1)
    assert answer.complete == pb.GenerateComplete(finish_reason="abort", prompt_tokens=3)
    assert await call.code() is grpc.StatusCode.OK
    assert served.engine.aborted == 1


async def test_a_request_without_an_id_cannot_be_aborted_by_chance(served: Served) -> None:
    served.engine.delay_s = 0.05
    call = served.stub.Generate(asked(stream=True))
    await call.read()
    await served.stub.Abort(pb.AbortRequest(request_ids=[""]))
    assert (await rest_of(call))[-1].complete.finish_reason == "length"


async def test_two_requests_may_have_one_id_and_are_aborted_together(served: Served) -> None:
    served.engine.delay_s = 30.0
    both = [asyncio.create_task(served.answers(asked(request_id="r"))) for _ in range(2)]
    await served.until_open(2)
    await served.stub.Abort(pb.AbortRequest(request_ids=["r"]))
    answers = await asyncio.wait_for(asyncio.gather(*both), 1)
    assert [found[0].complete.finish_reason for found in answers] == ["abort", "abort"]


async def test_a_second_request_of_an_id_is_served_beside_the_first(served: Served) -> None:
    served.engine.delay_s = 30.0
    first = served.stub.Generate(asked(request_id="r"))
    waiting = asyncio.create_task(first.read())
    await served.until_open()
    served.engine.delay_s = 0.0
    assert (await served.answers(asked(request_id="r")))[0].complete.finish_reason == "length"
    await served.stub.Abort(pb.AbortRequest(request_ids=["r"]))
    assert (await asyncio.wait_for(waiting, 1)).complete.finish_reason == "abort"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_what_it_had(served: Served, stream: bool) -> None:
    served.engine.delay_s, served.engine.tokens = 0.02, [97] * 1000
    call = served.stub.Generate(asked(stream=stream, request_id="r"))
    await served.until_open()
    call.cancel()
    assert await served.is_idle()
    assert served.engine.aborted == 1


async def test_a_client_that_leaves_without_having_read_frees_what_it_had(served: Served) -> None:
    served.engine.tokens, served.engine.tokens_per_step = [97] * 10_000, 20_000  # 200 MB, of which nobody reads much
    call = served.stub.Generate(asked(stream=True))
    await call.read()
    said = 0
    while said != served.engine.said:  # until nothing more is taken
        said = served.engine.said
        await asyncio.sleep(0.5)
    assert (served.engine.open, said < 10_000) == (1, True)
    call.cancel()
    assert await served.is_idle()
    assert served.engine.aborted == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("in_metadata", [False, True])
async def test_a_deadline_ends_the_request_in_the_engine(served: Served, stream: bool, in_metadata: bool) -> None:
    served.engine.delay_s = 30.0
    if in_metadata:
        call = served.stub.Generate(asked(stream=stream), metadata=(("x-request-timeout-ms", "500"),))
    else:
        call = served.stub.Generate(asked(stream=stream), timeout=0.5)
    await served.until_open()
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await asyncio.wait_for(call.read(), 2)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await served.is_idle()
    assert served.engine.aborted == 1
