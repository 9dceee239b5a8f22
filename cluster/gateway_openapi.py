"""The OpenAPI document of what a gateway takes over HTTP: each field that is taken, with the bounds that are checked.

Written from the validator's own tables, so that it says neither more nor less: a field without a schema here fails a
test.
"""

from collections.abc import Mapping

from cluster.gateway_body import FIELDS, MAX_MESSAGES, MAX_PARTS, ROLES
from cluster.gateway_format import FORMATS
from cluster.validate import Limits, numbers, whole_numbers

Json = dict[str, object]
_FLAG: Json = {"type": "boolean"}
_TEXT: Json = {"type": "string", "minLength": 1}
_SUMMARIES = {
    "/v1/completions": ("post", "Continues a prompt."),
    "/v1/chat/completions": ("post", "Answers a conversation."),
    "/tokenize": ("post", "Token ids of a text or a conversation."),
    "/detokenize": ("post", "The text of token ids."),
    "/v1/models": ("get", "What is served."),
    "/version": ("get", "The version of vLLM that answers."),
    "/metrics": ("get", "vLLM's own metrics of this process, for Prometheus."),
    "/expertmesh/status": ("get", "Deployments, replicas, and who holds which experts."),
    "/openapi.json": ("get", "This document."),
    "/health": ("get", "Whether this gateway lives; wants no key."),
    "/ready": ("get", "Whether every part has a running replica; wants no key."),
}
_ERRORS = {
    "400": "The request is wrong; `param` names the field.",
    "401": "No API key, or none that is valid here.",
    "404": "Another model than the served one.",
    "413": "The body is too large.",
    "429": "Too much is open here; come back after Retry-After.",
    "503": "Not now; come back after Retry-After.",
    "504": "The request's deadline passed.",
}


def openapi_of(served_name: str, limits: Limits, *, version: str) -> Json:
    """The document. Its size does not depend on a request, so it is made once."""
    fields = field_schemas(limits)
    return {
        "openapi": "3.1.0",
        "info": {"title": f"expertmesh, serving {served_name}", "version": version},
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _error()},
        },
        "security": [{"key": []}],
        "paths": {path: {method: _operation(path, text, fields)} for path, (method, text) in _SUMMARIES.items()},
    }


def field_schemas(limits: Limits) -> Mapping[str, Json]:
    """What each field of any body must be; null is the default everywhere."""
    whole = {name: {"type": "integer", "minimum": low, "maximum": high} for name, low, high in whole_numbers(limits)}
    number: dict[str, Json] = {
        name: {"type": "number", "minimum": low, "maximum": high} for name, low, high in numbers(limits)
    }
    number |= {name: {**number[name], "exclusiveMinimum": 0.0} for name in ("top_p", "repetition_penalty")}
    token = {"type": "integer", "minimum": 0, "maximum": limits.vocab_size - 1}
    tokens: Json = {"type": "array", "items": token, "minItems": 1}
    text: Json = {**_TEXT, "maxLength": limits.max_prompt_chars}
    stop: Json = {"type": "string", "minLength": 1, "maxLength": limits.max_stop_chars}
    flags = (
        "stream echo skip_special_tokens spaces_between_special_tokens include_stop_str_in_output add_special_tokens "
        "return_tokens_as_token_ids return_token_ids add_generation_prompt continue_final_message return_token_strs "
        "ignore_eos"
    )
    return {
        **whole,
        **number,
        **dict.fromkeys(flags.split(), _FLAG),
        "model": _TEXT,
        "max_completion_tokens": whole["max_tokens"],
        "top_logprobs": whole["logprobs"],
        "request_id": {**_TEXT, "maxLength": limits.max_request_id_chars, "pattern": "^[A-Za-z0-9._:-]+$"},
        "stop": {"anyOf": [stop, {"type": "array", "items": stop, "maxItems": limits.max_stop_strings}]},
        "stop_token_ids": {"type": "array", "items": token, "maxItems": limits.max_stop_token_ids},
        "logit_bias": {
            "type": "object",
            "maxProperties": limits.max_logit_biases,
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        "stream_options": {"type": "object"},
        "response_format": {"type": "object", "properties": {"type": {"enum": list(FORMATS)}}, "required": ["type"]},
        "prompt": {"anyOf": [text, tokens, {"type": "array", "items": {"anyOf": [text, tokens]}, "minItems": 1}]},
        "tokens": {"type": "array", "items": token},
        "messages": _messages(),
    }


def _operation(path: str, text: str, fields: Mapping[str, Json]) -> Json:
    answers: Json = {"200": {"description": "The answer."}}
    if path in FIELDS:
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        answers |= {status: {"description": why, "content": content} for status, why in _ERRORS.items()}
    operation: Json = {"summary": text, "responses": answers}
    if path in ("/health", "/ready"):
        operation["security"] = []
    if path in FIELDS:
        schema = {
            "type": "object",
            "properties": {name: _schema(path, name, fields) for name in sorted(FIELDS[path])},
            "additionalProperties": False,
        }
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _schema(path: str, name: str, fields: Mapping[str, Json]) -> Json:
    # In a chat `logprobs` is a switch, and the number is `top_logprobs`.
    return _FLAG if (path, name) == ("/v1/chat/completions", "logprobs") else fields[name]


def _messages() -> Json:
    part = {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
        "additionalProperties": False,
    }
    message = {
        "type": "object",
        "properties": {
            "role": {"enum": list(ROLES)},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": part, "maxItems": MAX_PARTS}]},
            "name": {"type": "string"},
        },
        "required": ["role", "content"],
    }
    return {"type": "array", "items": message, "minItems": 1, "maxItems": MAX_MESSAGES}


def _error() -> Json:
    word = {"type": ["string", "null"]}
    error = {
        "type": "object",
        "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": word, "code": word},
    }
    return {"type": "object", "properties": {"error": error}}
