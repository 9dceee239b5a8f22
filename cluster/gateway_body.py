"""OpenAI request bodies: strict JSON, only fields that we know, and the logical requests that they stand for.

Fields are on a list of what is allowed, so that whatever vLLM's server learns to read next stays closed until we
have looked at it. Knows nothing of HTTP, vLLM or Ray.
"""

import json
from collections.abc import Callable, Mapping
from typing import cast

from cluster.gateway_format import check_format
from cluster.strict_json import read_json
from cluster.timeout_header import TIMEOUT_HEADER
from cluster.validate import (
    ContextLengthExceeded,
    GenerationRequest,
    Limits,
    check,
    check_model,
    check_sampling,
    check_text,
    check_token_ids,
)
from experts.errors import RequestError

Body = dict[str, object]

MAX_MESSAGES = 1024
MAX_PARTS = 256
ROLES = ("system", "developer", "user", "assistant")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SAMPLING = _words(
    "model max_tokens min_tokens temperature top_p top_k min_p n seed stop stop_token_ids logit_bias logprobs "
    "prompt_logprobs repetition_penalty presence_penalty frequency_penalty ignore_eos stream stream_options "
    "request_id skip_special_tokens spaces_between_special_tokens include_stop_str_in_output add_special_tokens "
    "return_tokens_as_token_ids return_token_ids response_format"
)
FIELDS: Mapping[str, frozenset[str]] = {
    "/v1/completions": _SAMPLING | {"prompt", "echo"},
    "/v1/chat/completions": _SAMPLING
    | {"messages", "top_logprobs", "max_completion_tokens", "add_generation_prompt", "continue_final_message"},
    "/tokenize": _words(
        "model prompt messages add_special_tokens return_token_strs add_generation_prompt continue_final_message"
    ),
    "/detokenize": frozenset({"model", "tokens"}),
}
# Sent by common clients, and without effect: any value, or only the one that changes nothing. Not passed on.
_ANY_VALUE = frozenset({"user", "metadata", "service_tier", "parallel_tool_calls"})
_ONLY_VALUE: Mapping[str, object] = {
    "store": False,
    "tool_choice": "none",
    "tools": [],
    "best_of": 1,
    "use_beam_search": False,
}
_FLAGS = _words(
    "stream echo skip_special_tokens spaces_between_special_tokens include_stop_str_in_output add_special_tokens "
    "return_tokens_as_token_ids return_token_ids add_generation_prompt continue_final_message return_token_strs"
)


def read_body(path: str, raw: bytes, *, limits: Limits, served_name: str, timeout_s: float | None = None) -> Body:
    """The body of a POST to `path` as vLLM may see it: checked, without nulls and without fields of no effect.

    timeout_s: what the client asked for outside the body, checked along with it.
    Raises RequestError with the field's name.
    """
    body = _parse(raw)
    kept = _known_fields(path, body)
    check_model(kept.get("model"), served_name)
    check_format(kept)
    _CHECKS[path](kept, limits, timeout_s)
    return kept


def _parse(raw: bytes) -> Body:
    try:
        text = raw.decode()  # here: json.loads would take UTF-16 and UTF-32, too
    except UnicodeDecodeError:
        raise RequestError("the body is not valid UTF-8") from None
    body = read_json(text, "the body")
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    return body


def _known_fields(path: str, body: Body) -> Body:
    kept: Body = {}
    for name, value in body.items():
        if value is None:  # null means the default, for every field
            continue
        if name in FIELDS[path]:
            kept[name] = value
        elif name in _ONLY_VALUE:
            if value != _ONLY_VALUE[name]:
                raise RequestError(f"{name} is only accepted as {json.dumps(_ONLY_VALUE[name])}", field=name)
        elif name not in _ANY_VALUE:
            shown = name[:64].encode(errors="replace").decode()
            raise RequestError(f"{shown} is not a field that {path} takes", field=shown)
        if name == "stream_options":
            _check_stream_options(value)
        if name in _FLAGS and not isinstance(value, bool):
            raise RequestError(f"{name} must be true or false", field=name)
    return kept


def _check_stream_options(options: object) -> None:
    known = {"include_usage", "continuous_usage_stats"}
    if (
        not isinstance(options, dict)
        or options.keys() - known
        or not all(isinstance(value, bool | None) for value in options.values())
    ):
        raise RequestError(f"stream_options may have the flags {', '.join(sorted(known))}", field="stream_options")


def _check_completion(body: Body, limits: Limits, timeout_s: float | None) -> None:
    prompts = _prompts(body)
    n = body.get("n", 1)
    if isinstance(n, int) and len(prompts) * n > limits.max_sequences:
        raise RequestError(
            f"n x prompts is {n} x {len(prompts)}; at most {limits.max_sequences} answers are made at once", field="n"
        )
    for prompt in prompts:
        text = prompt if isinstance(prompt, str) else None
        ids = None if text is not None else cast("list[int]", prompt)
        check(_logical(body, timeout_s, prompt=text, ids=ids), limits, names=_TIMEOUT)


def _prompts(body: Body) -> list[object]:
    """The prompts of a completion: a text, token ids, or a list of either."""
    prompt = body.get("prompt")
    if prompt is None:
        raise RequestError("prompt is missing", field="prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(item, str | list) for item in prompt):
        if len({type(item) for item in prompt}) > 1:
            raise RequestError("prompt mixes texts and lists of token ids", field="prompt")
        return prompt
    if not isinstance(prompt, str | list):
        raise RequestError("prompt must be a string, a list of token ids, or a list of either", field="prompt")
    return [prompt]


def _check_chat(body: Body, limits: Limits, timeout_s: float | None) -> None:
    _check_messages(body, limits)
    logprobs = body.get("logprobs", False)
    if not isinstance(logprobs, bool):
        raise RequestError("logprobs must be true or false; top_logprobs is the number", field="logprobs")
    names = dict(_TIMEOUT) | {"logprobs": "top_logprobs"}
    sampling = dict(body) | {"logprobs": body.get("top_logprobs")}
    if "max_completion_tokens" in body:
        names["max_tokens"] = "max_completion_tokens"
        sampling["max_tokens"] = body["max_completion_tokens"]
    check_sampling(_logical(sampling, timeout_s), limits, names=names)


def _check_messages(body: Body, limits: Limits) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        raise RequestError(f"messages must be a list of 1 to {MAX_MESSAGES} messages", field="messages")
    num_chars = sum(_message_chars(message, f"messages[{i}]") for i, message in enumerate(messages))
    if num_chars > limits.max_prompt_chars:
        raise ContextLengthExceeded(
            f"messages have {num_chars} characters; a model with a context of {limits.max_model_len} tokens takes "
            f"at most {limits.max_prompt_chars}",
            field="messages",
        )


def _message_chars(message: object, where: str) -> int:
    """Characters of one message. Raises RequestError unless it is a role and text, whole or in parts."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}", field=f"{where}.role")
    for name in message.keys() - {"role", "content", "name"}:
        if message[name] is not None:
            raise RequestError(f"{where}.{name[:64]} is not supported; messages are text", field=f"{where}.{name[:64]}")
    content = message.get("content")
    if isinstance(content, str):
        return len(content)
    if not isinstance(content, list) or len(content) > MAX_PARTS:
        raise RequestError(
            f"{where}.content must be a string or a list of at most {MAX_PARTS} parts", field=f"{where}.content"
        )
    return sum(_part_chars(part, f"{where}.content[{i}]") for i, part in enumerate(content))


def _part_chars(part: object, where: str) -> int:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind != "text":
        shown = kind[:64] if isinstance(kind, str) else "none"
        raise RequestError(f"{where}.type is {shown}; only text parts are supported", field=f"{where}.type")
    text = part.get("text")
    if not isinstance(text, str) or part.keys() != {"type", "text"}:
        raise RequestError(f"{where} must have a string text, and nothing else", field=f"{where}.text")
    return len(text)


def _check_tokenize(body: Body, limits: Limits, timeout_s: float | None) -> None:
    if "messages" in body:
        _check_messages(body, limits)
    else:
        check_text("prompt", body.get("prompt"), limits)


def _check_detokenize(body: Body, limits: Limits, timeout_s: float | None) -> None:
    tokens = body.get("tokens")
    if isinstance(tokens, list) and len(tokens) > limits.max_prompt_chars:  # before each of them is looked at
        raise RequestError(f"tokens has more than {limits.max_prompt_chars} ids", field="tokens")
    check_token_ids("tokens", tokens, limits, allow_empty=True)


def _logical(
    body: Body, timeout_s: float | None, *, prompt: str | None = None, ids: list[int] | None = None
) -> GenerationRequest:
    stop = body.get("stop", ())
    fields: dict[str, object] = {name: body.get(name) for name in _LOGICAL_FIELDS}
    fields["stop"] = (stop,) if isinstance(stop, str) else stop
    fields["stop_token_ids"] = body.get("stop_token_ids", ())
    fields["echo"] = body.get("echo", False)
    return _build_request(prompt=prompt, prompt_token_ids=ids, timeout_s=timeout_s, **fields)


_LOGICAL_FIELDS = _words(
    "max_tokens min_tokens temperature top_p top_k min_p n seed logit_bias logprobs prompt_logprobs "
    "repetition_penalty presence_penalty frequency_penalty ignore_eos skip_special_tokens include_stop_str_in_output "
    "model request_id"
)
# JSON has any type in any field, and `check` is what finds that out.
_build_request = cast("Callable[..., GenerationRequest]", GenerationRequest)
_TIMEOUT: Mapping[str, str] = {"timeout_s": TIMEOUT_HEADER}
_CHECKS: Mapping[str, Callable[[Body, Limits, float | None], None]] = {
    "/v1/completions": _check_completion,
    "/v1/chat/completions": _check_chat,
    "/tokenize": _check_tokenize,
    "/detokenize": _check_detokenize,
}
