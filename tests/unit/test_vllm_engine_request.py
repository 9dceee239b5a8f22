"""GenerateRequests of vllm.grpc.engine as the validator reads them: what is honoured, and what is refused by name."""

import math

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from cluster.validate import GenerationRequest, Limits, check
from cluster.vllm_engine_request import logical_request
from experts.errors import RequestError

LIMITS = Limits(max_model_len=64, vocab_size=259)
TOKENS = pb.TokenizedInput(input_ids=[1, 2, 3])


def request_of(**sampling: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(tokenized=TOKENS, sampling_params=pb.SamplingParams(**sampling))  # type: ignore[arg-type]


def test_what_is_zero_or_absent_is_unset() -> None:
    found = logical_request(pb.GenerateRequest(tokenized=TOKENS))
    assert (found.prompt, found.prompt_token_ids, found.request_id) == (None, (1, 2, 3), None)
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (1.0, 1.0, 0, 0.0)
    assert (found.repetition_penalty, found.n, found.stop, found.logit_bias) == (1.0, None, (), None)
    assert (found.max_tokens, found.seed, found.logprobs, found.prompt_logprobs) == (None, None, None, None)
    check(found, LIMITS)


def test_a_zero_of_an_optional_field_is_a_zero() -> None:
    found = logical_request(request_of(temperature=0.0, seed=0, logprobs=0, prompt_logprobs=0, max_tokens=0))
    assert (found.temperature, found.seed, found.logprobs, found.prompt_logprobs) == (0.0, 0, 0, 0)
    with pytest.raises(RequestError, match="max_tokens must be a whole number from 1 to 64, and is 0"):
        check(found, LIMITS)


def test_everything_that_can_be_asked_for_arrives() -> None:
    found = logical_request(
        pb.GenerateRequest(
            request_id="r-1",
            text="hello",
            stream=True,
            data_parallel_rank=0,
            sampling_params=pb.SamplingParams(
                temperature=0.5,
                top_p=0.25,
                top_k=7,
                min_p=0.125,
                frequency_penalty=-0.5,
                presence_penalty=1.5,
                repetition_penalty=1.25,
                max_tokens=9,
                min_tokens=2,
                stop=["x", "yz"],
                stop_token_ids=[5, 6],
                skip_special_tokens=True,
                spaces_between_special_tokens=True,
                ignore_eos=True,
                n=2,
                logprobs=3,
                prompt_logprobs=4,
                seed=-7,
                include_stop_str_in_output=True,
                logit_bias={11: 2.0},
                grammar_from_first_token=True,
            ),
        )
    )
    assert found == GenerationRequest(
        prompt="hello",
        request_id="r-1",
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        frequency_penalty=-0.5,
        presence_penalty=1.5,
        repetition_penalty=1.25,
        max_tokens=9,
        min_tokens=2,
        stop=("x", "yz"),
        stop_token_ids=(5, 6),
        skip_special_tokens=True,
        ignore_eos=True,
        n=2,
        logprobs=3,
        prompt_logprobs=4,
        seed=-7,
        include_stop_str_in_output=True,
        logit_bias={"11": 2.0},
    )
    check(found, LIMITS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kv_transfer_params", pb.KvTransferParams()),
        ("kv_transfer_params_json", ""),
        ("mm_inputs", pb.MultimodalInputs()),
        ("extra_mm_inputs", [pb.MultimodalInputs()]),
        ("media_refs", pb.MediaRefs()),
        ("data_parallel_rank", 1),
        ("data_parallel_rank", -1),
    ],
)
def test_what_has_no_effect_here_is_refused_by_name(name: str, value: object) -> None:
    request = pb.GenerateRequest(tokenized=TOKENS, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=name) as refused:
        logical_request(request)
    assert refused.value.field == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("json_schema", "{}"),
        ("regex", "a*"),
        ("grammar", "root ::= 'a'"),
        ("structural_tag", "{}"),
        ("json_object", False),
        ("choice", pb.ChoiceConstraint(choices=["a"])),
        ("truncate_prompt_tokens", 0),
    ],
)
def test_sampling_that_is_not_supported_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name) as refused:
        logical_request(request_of(**{name: value}))
    assert refused.value.field == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", math.nan),
        ("top_p", math.inf),
        ("top_p", 1.5),
        ("min_p", -0.5),
        ("repetition_penalty", math.nan),
        ("frequency_penalty", -math.inf),
        ("presence_penalty", 2.5),
        ("top_k", 2**31),
        ("n", 17),
        ("max_tokens", 65),
        ("min_tokens", 65),
        ("logprobs", -1),
        ("prompt_logprobs", 21),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {259: 1.0}),
        ("logit_bias", {1: math.nan}),
        ("stop", [""]),
        ("stop_token_ids", [259]),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError) as refused:
        check(logical_request(request_of(**{name: value})), LIMITS)
    assert refused.value.field == name


@pytest.mark.parametrize(
    "request_",
    [
        pb.GenerateRequest(),
        pb.GenerateRequest(text=""),
        pb.GenerateRequest(tokenized=pb.TokenizedInput(original_text="not what counts")),
        pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[259])),
        pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[2**32 - 1])),
        pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[1] * 64)),
        pb.GenerateRequest(tokenized=TOKENS, request_id="a b"),
    ],
    ids=["none", "empty text", "no ids", "id too high", "id far too high", "too long", "bad id"],
)
def test_a_prompt_that_no_engine_may_see_is_refused(request_: pb.GenerateRequest) -> None:
    with pytest.raises(RequestError):
        check(logical_request(request_), LIMITS)


FLOATS = st.floats(width=32)
UINTS = st.integers(0, 2**32 - 1)
INTS = st.integers(-(2**31), 2**31 - 1)
SAMPLING = st.builds(
    pb.SamplingParams,
    temperature=st.none() | FLOATS,
    top_p=FLOATS,
    top_k=UINTS,
    min_p=FLOATS,
    frequency_penalty=FLOATS,
    presence_penalty=FLOATS,
    repetition_penalty=FLOATS,
    max_tokens=st.none() | UINTS,
    min_tokens=UINTS,
    stop=st.lists(st.text(st.characters(codec="utf-8")), max_size=3),
    stop_token_ids=st.lists(UINTS, max_size=3),
    n=UINTS,
    logprobs=st.none() | INTS,
    prompt_logprobs=st.none() | INTS,
    seed=st.none() | INTS,
    logit_bias=st.dictionaries(INTS, FLOATS, max_size=3),
    truncate_prompt_tokens=st.none() | INTS,
    regex=st.none() | st.just("a"),
)
REQUESTS = st.builds(
    pb.GenerateRequest,
    request_id=st.text(st.characters(codec="utf-8")),
    tokenized=st.none() | st.builds(pb.TokenizedInput, input_ids=st.lists(UINTS, max_size=4)),
    sampling_params=st.none() | SAMPLING,
    stream=st.booleans(),
    data_parallel_rank=st.none() | INTS,
)


def gets_a_verdict(request: pb.GenerateRequest) -> None:
    """It becomes a request that the validator lets through, or a RequestError; anything else is raised."""
    try:
        found = logical_request(request)
        assert isinstance(found, GenerationRequest)
        check(found, LIMITS)
    except RequestError as refused:
        assert str(refused)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(REQUESTS)
def test_any_message_gets_a_verdict(request: pb.GenerateRequest) -> None:
    gets_a_verdict(request)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.binary(max_size=64) | st.tuples(REQUESTS, st.integers(0, 200), st.binary(max_size=8)))
@example(b"")
def test_any_bytes_get_a_verdict_or_are_no_message(found: bytes | tuple[pb.GenerateRequest, int, bytes]) -> None:
    if isinstance(found, tuple):  # a message with some of its bytes exchanged
        message, begin, other = found
        whole = message.SerializeToString()
        found = whole[:begin] + other + whole[begin + len(other) :]
    try:
        request = pb.GenerateRequest.FromString(found)
    except DecodeError:
        return
    gets_a_verdict(request)
