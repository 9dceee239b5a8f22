"""OpenAI bodies: strict JSON, listed fields only, and refusals that name the field."""

import json

import pytest

from cluster.gateway_body import FIELDS, read_body
from cluster.gateway_guard import ROUTES
from cluster.gateway_openapi import field_schemas, openapi_of
from cluster.validate import Limits, UnknownModel
from experts.errors import RequestError

LIMITS = Limits(max_model_len=64, vocab_size=100)
CHAT: dict[str, object] = {"messages": [{"role": "user", "content": "hi"}]}


def completion(raw: bytes) -> dict[str, object]:
    return read_body("/v1/completions", raw, limits=LIMITS, served_name="nano")


def field_refused(path: str, body: dict[str, object]) -> str | None:
    with pytest.raises(RequestError) as refused:
        read_body(path, json.dumps(body).encode(), limits=LIMITS, served_name="nano")
    return refused.value.field


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[1]",
        b"{",
        b"\xff\xfe",
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "metadata": ' + b'{"a":' * 40 + b"1" + b"}" * 40 + b"}",
        b'{"prompt": "a", "metadata": {' + b",".join(b'"%d":1' % i for i in range(1001)) + b"}}",
    ],
)
def test_what_is_not_plain_json_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestError):
        completion(raw)


def test_null_means_default_and_fields_of_no_effect_are_dropped() -> None:
    body = {"prompt": "a", "stop": None, "n": None, "user": "me", "best_of": 1, "tools": [], "max_tokens": 2}
    assert completion(json.dumps(body).encode()) == {"prompt": "a", "max_tokens": 2}


@pytest.mark.parametrize(
    "field",
    ["chat_template", "cache_salt", "kv_transfer_params", "prompt_embeds", "structured_outputs", "vllm_xargs", "lora"],
)
def test_fields_that_are_not_on_the_list_are_refused_by_name(field: str) -> None:
    assert field_refused("/v1/completions", {"prompt": "a", field: "x"}) == field
    assert field_refused("/v1/chat/completions", CHAT | {field: "x"}) == field


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_every_form_of_prompt_passes(prompt: object) -> None:
    assert completion(json.dumps({"prompt": prompt}).encode()) == {"prompt": prompt}


@pytest.mark.parametrize(
    "prompt", ["", [], [""], [[]], ["a", [1]], [100], [-1], [1.5], [True], {"a": 1}, 7, ["a"] * 129]
)
def test_every_wrong_form_of_prompt_is_refused(prompt: object) -> None:
    assert field_refused("/v1/completions", {"prompt": prompt}) in ("prompt", "n")


def test_prompts_times_n_is_bounded() -> None:
    assert field_refused("/v1/completions", {"prompt": ["a"] * 9, "n": 16}) == "n"


def test_scoring_a_prompt_without_an_answer_is_legal_with_echo_only() -> None:
    assert completion(b'{"prompt": [1, 2], "max_tokens": 0, "echo": true, "logprobs": 1}')["max_tokens"] == 0
    assert field_refused("/v1/completions", {"prompt": [1], "max_tokens": 0}) == "max_tokens"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "messages"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
    ],
)
def test_a_chat_is_refused_by_the_field_that_is_wrong(change: dict[str, object], field: str) -> None:
    assert field_refused("/v1/chat/completions", CHAT | change) == field


def test_the_newer_name_of_max_tokens_wins() -> None:
    body = CHAT | {"max_tokens": 10_000, "max_completion_tokens": 5}
    assert read_body("/v1/chat/completions", json.dumps(body).encode(), limits=LIMITS, served_name="nano")


def test_tokenizing_and_detokenizing_are_bounded_too() -> None:
    assert field_refused("/tokenize", {"prompt": "x" * 2000}) == "prompt"
    assert field_refused("/detokenize", {"tokens": [100]}) == "tokens"
    assert field_refused("/detokenize", {}) == "tokens"


def test_another_model_is_unknown() -> None:
    with pytest.raises(UnknownModel):
        completion(b'{"model": "other", "prompt": "a"}')


def test_every_field_that_is_taken_is_in_the_openapi_document() -> None:
    limits = Limits(max_model_len=64, vocab_size=259)
    document = openapi_of("nano", limits, version="1")
    schemas = field_schemas(limits)
    taken = set().union(*FIELDS.values())
    assert taken == schemas.keys() & taken and not taken - schemas.keys()
    for path, fields in FIELDS.items():
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]  # type: ignore[index]
        assert body["properties"].keys() == fields
    assert document["paths"].keys() == ROUTES.keys()  # type: ignore[union-attr]
