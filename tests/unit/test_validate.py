"""The validator's caps: each at its bound, one beyond it, and with what is no number at all."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.validate import ContextLengthExceeded, GenerationRequest, Limits, check, check_model, check_request_id
from experts.errors import RequestError

LIMITS = Limits(max_model_len=100, vocab_size=50)


def refusal(**fields: object) -> RequestError:
    with pytest.raises(RequestError) as refused:
        check(GenerationRequest(**({"prompt": "x"} | fields)), LIMITS)  # type: ignore[arg-type]
    return refused.value


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [
        ("temperature", 0, 2),
        ("min_p", 0, 1),
        ("presence_penalty", -2, 2),
        ("frequency_penalty", -2, 2),
        ("n", 1, 16),
        ("logprobs", 0, 20),
        ("prompt_logprobs", 0, 20),
        ("seed", -(2**63), 2**63 - 1),
        ("top_k", -1, 2**31 - 1),
        ("max_tokens", 1, 100),
        ("min_tokens", 0, 100),
    ],
)
def test_each_cap_holds_at_its_bounds_and_not_beyond(field: str, low: int, high: int) -> None:
    for value in (low, high):
        check(GenerationRequest(prompt="x", **{field: value}), LIMITS)  # type: ignore[arg-type]
    for value in (low - 1, high + 1, 2**70, -(2**70), 10**5000, True, "1", [1], {}):
        error = refusal(**{field: value})
        assert error.field == field
        assert str(error).startswith(field) and len(str(error)) < 200


@pytest.mark.parametrize("field", ["top_p", "repetition_penalty", "timeout_s"])
def test_what_must_be_positive_may_not_be_zero(field: str) -> None:
    check(GenerationRequest(prompt="x", **{field: 1}), LIMITS)  # type: ignore[arg-type]
    for value in (0, 0.0, -1, 1e9, math.nan, math.inf):
        assert refusal(**{field: value}).field == field


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_must_be_finite(value: float) -> None:
    assert refusal(temperature=value).field == "temperature"


@pytest.mark.parametrize("stop", [("",), ("x" * 257,), ("x",) * 17, (1,), ("\ud800",), 7])
def test_stop_strings_are_bounded(stop: object) -> None:
    check(GenerationRequest(prompt="x", stop=("x" * 256,) * 16), LIMITS)
    assert refusal(stop=stop).field == "stop"


def test_ids_must_be_in_the_vocabulary() -> None:
    check(GenerationRequest(prompt_token_ids=(0, 49), stop_token_ids=(49,), logit_bias={"49": -100}), LIMITS)
    for ids in ((50,), (-1,), (), (True,), (1.0,)):
        with pytest.raises(RequestError, match="prompt"):
            check(GenerationRequest(prompt_token_ids=ids), LIMITS)  # type: ignore[arg-type]
    assert refusal(stop_token_ids=(50,)).field == "stop_token_ids"
    assert refusal(stop_token_ids=(1,) * 129).field == "stop_token_ids"
    for bias in ({"50": 1}, {"-1": 1}, {"x": 1}, {"1": 101}, {"1": "1"}, {"²": 1}, [1]):
        assert refusal(logit_bias=bias).field == "logit_bias"


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers() -> None:
    check(GenerationRequest(prompt_token_ids=(1,) * 90, max_tokens=10), LIMITS)
    with pytest.raises(ContextLengthExceeded, match="91 tokens of prompt and 10 of answer"):
        check(GenerationRequest(prompt_token_ids=(1,) * 91, max_tokens=10), LIMITS)
    with pytest.raises(ContextLengthExceeded):
        check(GenerationRequest(prompt_token_ids=(1,) * 100), LIMITS)


def test_a_prompt_is_given_once_and_is_text() -> None:
    for fields in ({"prompt": None}, {"prompt_token_ids": (1,)}, {"prompt": ""}, {"prompt": 7}, {"prompt": "\udc00"}):
        assert refusal(**fields).field == "prompt"
    assert isinstance(refusal(prompt="x" * 1601), ContextLengthExceeded)


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    assert refusal(min_tokens=5, max_tokens=4).field == "min_tokens"


def test_refusals_use_the_callers_names() -> None:
    with pytest.raises(RequestError, match=r"^max_completion_tokens must be") as refused:
        check(GenerationRequest(prompt="x", max_tokens=0), LIMITS, names={"max_tokens": "max_completion_tokens"})
    assert refused.value.field == "max_completion_tokens"


@pytest.mark.parametrize("request_id", ["", "a b", "é", "x" * 129, 7, "a\n"])
def test_request_ids_are_harmless_characters(request_id: object) -> None:
    check_request_id("Az09._:-" * 16, LIMITS)
    with pytest.raises(RequestError):
        check_request_id(request_id, LIMITS)


@pytest.mark.parametrize("model", ["other", "x" * 10_000, 7, ["nano"]])
def test_only_the_served_model_is_known(model: object) -> None:
    check_model("nano", "nano")
    with pytest.raises(RequestError) as refused:
        check_model(model, "nano")
    assert refused.value.field == "model" and len(str(refused.value)) < 200


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.dictionaries(st.sampled_from(list(GenerationRequest.__dataclass_fields__)), _JSON))
def test_no_value_of_any_type_raises_anything_but_a_request_error(fields: dict[str, object]) -> None:
    try:
        check(GenerationRequest(**fields), LIMITS)  # type: ignore[arg-type]
    except RequestError as error:
        assert error.field
