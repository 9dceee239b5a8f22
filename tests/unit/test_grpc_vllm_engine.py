"""What vllm.grpc.engine.VllmEngine answers, and what it refuses, to the package's own stub."""

from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from gateway_fakes import CONTEXT
from google.protobuf.message_factory import GetMessageClass
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from vllm_engine_fakes import PROMPT, Model, Served, asked, model_in, serving

from cluster.grpc_vllm_engine import DROPPED_ROWS, VLLM_ENGINE, VllmEngine
from experts.errors import DeadlineExceeded, GroupUnavailable


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model_in(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def served(model: Model) -> AsyncIterator[Served]:
    async with serving(model) as found:
        yield found


async def test_without_stream_there_is_one_message_with_everything(served: Served) -> None:
    (answer,) = await served.answers(asked())
    assert answer == pb.GenerateResponse(
        complete=pb.GenerateComplete(
            output_ids=[97, 98, 99], finish_reason="length", prompt_tokens=3, completion_tokens=3, cached_tokens=2
        )
    )
    assert served.engine.seen[0][0] == [10, 11, 12]


async def test_a_stream_has_a_chunk_for_each_step_and_then_its_end(served: Served) -> None:
    *chunks, end = await served.answers(asked(stream=True))
    assert [answer.chunk for answer in chunks] == [
        pb.GenerateStreamChunk(token_ids=[token], prompt_tokens=3, completion_tokens=1, cached_tokens=2)
        for token in (97, 98, 99)
    ]
    assert end.complete == pb.GenerateComplete(
        output_ids=[99], finish_reason="length", prompt_tokens=3, completion_tokens=1, cached_tokens=2
    )


async def test_a_text_is_tokenised_here(served: Served) -> None:
    (answer,) = await served.answers(pb.GenerateRequest(text="hello"))
    assert (answer.complete.prompt_tokens, len(served.engine.seen[0][0])) == (5, 5)


@pytest.mark.parametrize("stream", [False, True])
async def test_every_choice_ends_once(served: Served, stream: bool) -> None:
    answers = await served.answers(asked(stream=stream, n=3))
    ends = [answer.complete for answer in answers if answer.HasField("complete")]
    chunks = [answer.chunk for answer in answers if answer.HasField("chunk")]
    assert sorted(end.index for end in ends) == [0, 1, 2]
    for index in range(3):
        assert [list(chunk.token_ids) for chunk in chunks if chunk.index == index] == (
            [[97], [98], [99]] if stream else []
        )


async def test_what_ended_a_choice_is_told(served: Served) -> None:
    served.engine.stop_reason = 99
    (answer,) = await served.answers(asked(stop_token_ids=[99]))
    assert (answer.complete.finish_reason, answer.complete.matched_token_id) == ("stop", 99)
    served.engine.stop_reason = "c"
    (answer,) = await served.answers(asked(stop=["c"]))
    assert answer.complete.matched_stop_str == "c"


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_come_with_their_tokens(served: Served, stream: bool) -> None:
    answers = await served.answers(asked(stream=stream, logprobs=2))
    parts = [answer.chunk if stream else answer.complete for answer in (answers[:-1] if stream else answers)]
    assert [token for part in parts for token in part.output_logprobs.token_ids] == [97, 98, 99]
    assert [value for part in parts for value in part.output_logprobs.token_logprobs] == [-2.0] * 3
    best = pb.TopLogProbs(token_ids=[6, 5], values=[-0.5, -1.0])
    assert [top for part in parts for top in part.output_logprobs.top_logprobs] == [best] * 3
    assert not any(part.HasField("input_logprobs") for part in parts)


async def test_log_probabilities_without_alternatives_are_those_of_the_tokens(served: Served) -> None:
    (answer,) = await served.answers(asked(logprobs=0))
    assert (len(answer.complete.output_logprobs.token_logprobs), len(answer.complete.output_logprobs.top_logprobs)) == (
        3,
        0,
    )
    (answer,) = await served.answers(asked())
    assert not answer.complete.HasField("output_logprobs")


async def test_the_prompts_log_probabilities_come_once_for_each_choice(served: Served) -> None:
    expected = pb.InputLogProbs(
        token_ids=[10, 11, 12],
        token_logprobs=[pb.InputTokenLogProb(), pb.InputTokenLogProb(value=-2), pb.InputTokenLogProb(value=-2)],
        top_logprobs=[
            pb.TopLogProbs(),
            pb.TopLogProbs(token_ids=[6], values=[-0.5]),
            pb.TopLogProbs(token_ids=[6], values=[-0.5]),
        ],
    )
    streamed = await served.answers(asked(stream=True, n=2, prompt_logprobs=1))
    with_them = [answer for answer in streamed if "input_logprobs" in str(answer)]
    assert with_them == streamed[:2]
    assert [answer.chunk.index for answer in with_them] == [0, 1]
    assert with_them[0].chunk.input_logprobs == expected
    (whole,) = await served.answers(asked(prompt_logprobs=1))
    assert whole.complete.input_logprobs == expected


async def test_what_is_unset_is_neutral_and_not_the_models_default(served: Served) -> None:
    await served.answers(asked())
    params = served.engine.seen[0][1]
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (1.0, 1.0, 0, 1.0)
    assert (params.n, params.seed, params.logprobs, params.min_tokens) == (1, None, None, 0)
    assert params.max_tokens == CONTEXT - 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (pb.GenerateRequest(), "tokenized.input_ids"),
        (pb.GenerateRequest(tokenized=PROMPT, media_refs=pb.MediaRefs()), "media_refs"),
        (pb.GenerateRequest(tokenized=PROMPT, kv_transfer_params_json="{}"), "kv_transfer_params_json"),
        (asked(json_schema="{}"), "json_schema"),
        (asked(temperature=float("nan")), "temperature"),
        (asked(n=17), "n must be"),
        (asked(request_id="a b"), "request_id"),
        (asked(max_tokens=62), "64"),
        (pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[259])), "259"),
    ],
)
async def test_a_bad_request_is_refused_by_name_and_the_next_one_served(
    served: Served, request_: pb.GenerateRequest, why: str, stream: bool
) -> None:
    bad = pb.GenerateRequest.FromString(request_.SerializeToString())
    bad.stream = stream
    refused = await served.refusal(bad)
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert why in (refused.details() or "")
    assert served.engine.seen == []
    assert await served.answers(asked())


@pytest.mark.parametrize("tokens", [[], [97]], ids=["before the first token", "after it"])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GroupUnavailable("no live copy of group 1"), grpc.StatusCode.UNAVAILABLE),
        (DeadlineExceeded("too late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (ValueError("secret at /etc/passwd"), grpc.StatusCode.INTERNAL),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_engines_error_is_typed(
    served: Served, error: Exception, code: grpc.StatusCode, tokens: list[int], stream: bool
) -> None:
    served.engine.tokens, served.engine.then = tokens, error
    refused = await served.refusal(asked(stream=stream))
    assert refused.code() is code
    trailers = dict(refused.trailing_metadata() or ())
    assert trailers.get("retry-after") == ("1" if code is grpc.StatusCode.UNAVAILABLE else None)
    assert "secret" not in (refused.details() or "")


async def test_more_than_is_taken_is_refused_at_once(served: Served) -> None:
    served.load.limit = 0
    refused = await served.refusal(asked())
    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert served.engine.seen == []


async def test_an_answer_without_some_rows_says_so(served: Served) -> None:
    call = served.stub.Generate(asked(stream=True))
    assert [answer async for answer in call]
    assert DROPPED_ROWS not in dict(await call.trailing_metadata())
    served.engine.dropped_rows = 12
    call = served.stub.Generate(asked(stream=True))
    assert [answer async for answer in call]
    assert dict(await call.trailing_metadata())[DROPPED_ROWS] == "12"


METHODS = {method.name: method for method in pb.DESCRIPTOR.services_by_name["VllmEngine"].methods}
NOT_OFFERED = ["Embed", "FlushCache", "StartProfile", "StopProfile", "SubscribeKvEvents"]


@pytest.mark.parametrize("name", NOT_OFFERED)
async def test_what_is_not_offered_says_so(served: Served, name: str) -> None:
    call = getattr(served.stub, name)(GetMessageClass(METHODS[name].input_type)())
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await (call.read() if METHODS[name].server_streaming else call)
    assert (refused.value.code(), refused.value.details()) == (
        grpc.StatusCode.UNIMPLEMENTED,
        f"{name} is not offered here",
    )


def test_every_rpc_of_the_service_is_our_own() -> None:
    assert VLLM_ENGINE == "vllm.grpc.engine.VllmEngine"
    assert set(METHODS) <= set(vars(VllmEngine))
