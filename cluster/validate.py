"""The one validator of all surfaces: is this generation request something that an engine may see?

HTTP bodies and gRPC messages are turned into the same `GenerationRequest` and judged by the same `check`, so a cap
that one surface has cannot be forgotten on another.
Pure: imports neither vLLM, Ray nor gRPC, and looks at nothing but its arguments.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experts.errors import RequestError

_INT64_MAX = 2**63 - 1
_INT32_MAX = 2**31 - 1
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]+")


class UnknownModel(RequestError):
    """The request names a model that is not served here (NOT_FOUND, 404)."""


class ContextLengthExceeded(RequestError):
    """Prompt and answer together do not fit the model's context (INVALID_ARGUMENT, 400)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request may ask for; the first two are the model's, the others are caps with defaults."""

    max_model_len: int  # tokens of prompt and answer together
    vocab_size: int  # token ids are below it
    max_choices: int = 16  # n
    max_sequences: int = 128  # prompts x n of one request
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    max_stop_token_ids: int = 128
    max_logit_biases: int = 300
    max_logprobs: int = 20
    max_temperature: float = 2.0
    max_penalty: float = 2.0
    max_request_id_chars: int = 128
    max_timeout_s: float = 3600.0
    prompt_chars_per_token: int = 16  # a prompt longer than this x max_model_len is refused before it is tokenised

    @property
    def max_prompt_chars(self) -> int:
        return self.prompt_chars_per_token * self.max_model_len


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt and how to continue it, whatever surface it came from; None is "the default".

    The values come from clients and may be of any type at run time: `check` is what makes the annotations true.
    """

    prompt: str | None = None
    prompt_token_ids: Sequence[int] | None = None  # exactly one of the two is set
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # -1 and 0 switch it off
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logit_bias: Mapping[str, float] | None = None  # token id, as JSON writes it -> bias
    logprobs: int | None = None  # alternatives for each new token
    prompt_logprobs: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    echo: bool = False  # with it, max_tokens 0 is legal: only the prompt is scored
    model: str | None = None
    request_id: str | None = None
    timeout_s: float | None = None


def check(request: GenerationRequest, limits: Limits, *, names: Mapping[str, str] | None = None) -> None:
    """Returns if the request may be served.

    names: what the caller's surface calls a field, where it differs (`max_tokens` -> `max_completion_tokens`).
    Raises RequestError with `.field` in the caller's words; the text names field, value and bound.
    """
    check_sampling(request, limits, names=names)
    check_prompt(request, limits)


def check_prompt(request: GenerationRequest, limits: Limits) -> None:
    """The prompt alone: there is exactly one, it is not empty, ids exist, and ids and answer fit the context."""
    ids = request.prompt_token_ids
    if (request.prompt is None) == (ids is None):
        raise RequestError("prompt: give either a text or token ids, and not both", field="prompt")
    if ids is None:
        check_text("prompt", request.prompt, limits)
        return
    if isinstance(ids, list | tuple) and len(ids) >= limits.max_model_len:  # before each of them is looked at
        check_length(len(ids), None, limits)
    check_token_ids("prompt", ids, limits)
    check_length(len(ids), request.max_tokens, limits)


def check_sampling(request: GenerationRequest, limits: Limits, *, names: Mapping[str, str] | None = None) -> None:
    """Everything but the prompt. Raises RequestError as `check` does."""
    ask = _Asker(names or {})
    for name, low, high in whole_numbers(limits, may_score=request.echo):
        ask.whole(name, getattr(request, name), low, high)
    for name, low, high in numbers(limits):
        ask.number(name, getattr(request, name), low, high)
    for name in ("top_p", "repetition_penalty", "timeout_s"):
        ask.above_zero(name, getattr(request, name))
    for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
        ask.flag(name, getattr(request, name))
    _check_lengths_agree(ask, request)
    _check_stops(ask, request, limits)
    _check_logit_bias(ask, request, limits)
    check_request_id(request.request_id, limits)


def check_length(num_prompt_tokens: int, max_tokens: int | None, limits: Limits, *, field: str = "prompt") -> None:
    """Raises ContextLengthExceeded, with both numbers, if prompt and answer do not fit the context together."""
    num_new = 1 if max_tokens is None else max(max_tokens, 1)  # scoring a prompt also runs one step
    if num_prompt_tokens + num_new > limits.max_model_len:
        raise ContextLengthExceeded(
            f"{field}: {num_prompt_tokens} tokens of prompt and {num_new} of answer (max_tokens) are more than "
            f"the model's context of {limits.max_model_len} tokens",
            field=field,
        )


def check_text(field: str, text: object, limits: Limits) -> None:
    """A prompt text before tokenising: a string, not empty, of whole Unicode characters, not absurdly long."""
    if not isinstance(text, str):
        raise RequestError(f"{field} must be a string, and is {_kind(text)}", field=field)
    if not text:
        raise RequestError(f"{field} is empty", field=field)
    if len(text) > limits.max_prompt_chars:
        raise ContextLengthExceeded(
            f"{field} has {len(text)} characters; a model with a context of {limits.max_model_len} tokens takes "
            f"at most {limits.max_prompt_chars}",
            field=field,
        )
    if has_lone_surrogate(text):
        raise RequestError(f"{field} is not valid Unicode (it contains half a surrogate pair)", field=field)


def check_token_ids(field: str, ids: object, limits: Limits, *, allow_empty: bool = False) -> None:
    """Raises RequestError unless `ids` is a list of whole numbers in 0 … vocab_size - 1."""
    if not isinstance(ids, list | tuple):
        raise RequestError(f"{field} must be a list of token ids, and is {_kind(ids)}", field=field)
    if not ids and not allow_empty:
        raise RequestError(f"{field} is empty", field=field)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < limits.vocab_size:
            shown = token if isinstance(token, int) and not isinstance(token, bool) else _kind(token)
            raise RequestError(
                f"{field} contains {_short(shown)}; token ids are 0 to {limits.vocab_size - 1}", field=field
            )


def check_request_id(request_id: object, limits: Limits) -> None:
    """Raises RequestError unless the id is absent or made of harmless characters; it is never parsed."""
    if request_id is None:
        return
    cap = limits.max_request_id_chars
    if not isinstance(request_id, str) or len(request_id) > cap or not REQUEST_ID.fullmatch(request_id):
        raise RequestError(
            f"request_id must be 1 to {cap} characters of A-Z a-z 0-9 . _ : -",
            field="request_id",
        )


def check_model(model: object, served_name: str) -> None:
    """Raises UnknownModel unless the request names the served model, or none."""
    if model is None or model == "" or model == served_name:
        return
    if not isinstance(model, str):
        raise RequestError(f"model must be a string, and is {_kind(model)}", field="model")
    raise UnknownModel(f"model: there is no {_short(model)!r} here; {served_name!r} is served", field="model")


def has_lone_surrogate(text: str) -> bool:
    """True if the text cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def whole_numbers(limits: Limits, *, may_score: bool = False) -> tuple[tuple[str, int, int], ...]:
    """Fields that are whole numbers, with their bounds. may_score: no new token may be asked for."""
    return (
        ("max_tokens", 0 if may_score else 1, limits.max_model_len),
        ("min_tokens", 0, limits.max_model_len),
        ("top_k", -1, _INT32_MAX),
        ("n", 1, limits.max_choices),
        ("seed", -_INT64_MAX - 1, _INT64_MAX),
        ("logprobs", 0, limits.max_logprobs),
        ("prompt_logprobs", 0, limits.max_logprobs),
    )


def numbers(limits: Limits) -> tuple[tuple[str, float, float], ...]:
    """Fields that are any finite numbers, with their bounds."""
    return (
        ("temperature", 0.0, limits.max_temperature),
        ("top_p", 0.0, 1.0),
        ("min_p", 0.0, 1.0),
        ("repetition_penalty", 0.0, limits.max_penalty),
        ("presence_penalty", -limits.max_penalty, limits.max_penalty),
        ("frequency_penalty", -limits.max_penalty, limits.max_penalty),
        ("timeout_s", 0.0, limits.max_timeout_s),
    )


@dataclass(frozen=True, slots=True)
class _Asker:
    """Refuses in the caller's words; one method per kind of value, and None always passes."""

    names: Mapping[str, str]

    def refuse(self, name: str, why: str) -> None:
        field = self.names.get(name, name)
        raise RequestError(f"{field} {why}", field=field)

    def whole(self, name: str, value: object, low: int, high: int) -> None:
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(name, f"must be a whole number from {low} to {high}, and is {_kind(value)}")
        elif not low <= value <= high:
            self.refuse(name, f"must be a whole number from {low} to {high}, and is {_short(value)}")

    def number(self, name: str, value: object, low: float, high: float) -> None:
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(name, f"must be a number from {low:g} to {high:g}, and is {_kind(value)}")
        elif isinstance(value, float) and not math.isfinite(value):
            self.refuse(name, f"must be a finite number from {low:g} to {high:g}, and is {value}")
        elif not low <= value <= high:
            self.refuse(name, f"must be a number from {low:g} to {high:g}, and is {_short(value)}")

    def flag(self, name: str, value: object) -> None:
        if not isinstance(value, bool | None):
            self.refuse(name, f"must be true or false, and is {_kind(value)}")

    def above_zero(self, name: str, value: object) -> None:
        if value == 0:
            self.refuse(name, "must be more than 0")


def _check_lengths_agree(ask: _Asker, request: GenerationRequest) -> None:
    if request.min_tokens is not None and request.max_tokens is not None and request.min_tokens > request.max_tokens:
        ask.refuse("min_tokens", f"is {request.min_tokens}, which is more than max_tokens ({request.max_tokens})")


def _check_stops(ask: _Asker, request: GenerationRequest, limits: Limits) -> None:
    if not isinstance(request.stop, list | tuple):
        ask.refuse("stop", f"must be a string or a list of strings, and is {_kind(request.stop)}")
    if len(request.stop) > limits.max_stop_strings:
        ask.refuse("stop", f"has {len(request.stop)} strings; at most {limits.max_stop_strings} are allowed")
    for text in request.stop:
        if not isinstance(text, str) or not 1 <= len(text) <= limits.max_stop_chars or has_lone_surrogate(text):
            ask.refuse("stop", f"must hold strings of 1 to {limits.max_stop_chars} characters of valid Unicode")
    check_token_ids("stop_token_ids", request.stop_token_ids, limits, allow_empty=True)
    if len(request.stop_token_ids) > limits.max_stop_token_ids:
        ask.refuse("stop_token_ids", f"has {len(request.stop_token_ids)} ids; {limits.max_stop_token_ids} are allowed")


def _check_logit_bias(ask: _Asker, request: GenerationRequest, limits: Limits) -> None:
    biases = request.logit_bias
    if biases is None:
        return
    if not isinstance(biases, Mapping) or len(biases) > limits.max_logit_biases:
        ask.refuse("logit_bias", f"must be an object of at most {limits.max_logit_biases} token ids")
    for token, bias in biases.items():
        if not token.isascii() or not token.isdigit() or len(token) > 10 or int(token) >= limits.vocab_size:
            ask.refuse("logit_bias", f"names {_short(token)}; token ids are 0 to {limits.vocab_size - 1}")
        ask.number("logit_bias", bias, -100.0, 100.0)


def _short(value: object) -> object:
    """The value, or its beginning, so that a refusal never echoes a megabyte (or formats a huge integer)."""
    if isinstance(value, int) and abs(value) > 2**128:
        return "a number of more than 38 digits"
    return f"{value[:64]}…" if isinstance(value, str) and len(value) > 64 else value


def _kind(value: object) -> str:
    """The JSON word for a value's type."""
    words = {
        bool: "a boolean",
        str: "a string",
        list: "a list",
        dict: "an object",
        float: "a fraction",
        int: "a number",
    }
    return words.get(type(value), "null" if value is None else "something else")
