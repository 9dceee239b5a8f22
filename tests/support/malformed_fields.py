"""Wrong values for every field that the HTTP surface takes, from a table of what each field holds.

Values are JSON as text, because half of them (NaN, 1e999, half a surrogate pair) is nothing that Python would write.
"""

import json
from collections.abc import Iterator, Mapping

from malformed_case import HTTP_MAYBE, HTTP_REFUSED, Http1, WireCase

from cluster.gateway_body import FIELDS

Values = tuple[tuple[str, str], ...]  # what it is, JSON text


def _json(**values: object) -> Values:
    return tuple((name.replace("_", " "), json.dumps(value)) for name, value in values.items())


# No JSON, or beyond what a double holds: wrong wherever they stand.
_NO_NUMBERS: Values = (
    ("NaN", "NaN"),
    ("Infinity", "Infinity"),
    ("minus Infinity", "-Infinity"),
    ("1e999", "1e999"),
    ("5000 digits", "9" * 5000),
)
_HUGE: Values = (("2^31", str(2**31)), ("2^63", str(2**63)), ("10^400", str(10**400)), ("-10^400", str(-(10**400))))
_HALF_PAIR: Values = (("half a surrogate pair", r'"\ud800"'),)
_NESTED = _json(a_list=[1], an_object={"a": 1}, null_in_a_list=[None])
_NOT_A_NUMBER = _NESTED + _NO_NUMBERS + _json(a_string="1", empty="", true=True)
_DEEP: Values = (("40 levels deep", "[" * 40 + "]" * 40),)

WHOLE = _NOT_A_NUMBER + _HUGE + _json(negative=-2, a_fraction=1.5, a_whole_fraction=1.0)
NUMBER = _NOT_A_NUMBER + _HUGE + _json(negative=-3)
FLAG = _NESTED + _NO_NUMBERS + _HUGE + _json(a_string="true", empty="", a_number=1, negative=-1, a_fraction=0.5)
TEXT = _NESTED + _NO_NUMBERS + _HUGE + _HALF_PAIR + _json(empty="", true=True, long="x" * 70_000, blanks=" \n")
STOPS = (
    _NO_NUMBERS
    + _HUGE
    + _HALF_PAIR
    + _json(a_number=5, true=True, empty="", an_object={"a": 1}, null_in_a_list=[None], numbers=[1], lists=[["a"]])
    + _json(an_empty_string=[""], too_many=["x"] * 17, too_long=["x" * 257], a_string_and_null=["x", None])
)
IDS = (
    _NO_NUMBERS
    + _json(a_string="1", a_number=1, true=True, an_object={"1": 1}, null_in_a_list=[None], strings=["1"])
    + _json(negative=[-1], too_large=[2**31], very_large=[2**63], enormous=[10**400], fractions=[1.5], flags=[True])
    + (("NaN in a list", "[NaN]"), ("40 levels deep", "[" * 40 + "]" * 40))
)
BIASES = (
    _NO_NUMBERS
    + _json(a_string="1", a_number=1, true=True, a_list=[1], no_token={"a": 1}, a_negative_token={"-1": 1})
    + _json(a_string_as_bias={"1": "1"}, null_as_bias={"1": None}, a_large_bias={"1": 101}, a_huge_bias={"1": 10**400})
    + _json(a_large_token={"99999999999": 1}, a_superscript={"²": 1}, a_fraction={"1.5": 1}, no_name={"": 1})
    + _json(too_many={str(i): 1 for i in range(301)}, a_flag_as_bias={"1": True})
    + (("NaN as bias", '{"1": NaN}'), ("a token twice", '{"1": 1, "1": 2}'))
)
OPTIONS = _NO_NUMBERS + _json(
    a_string="x", a_list=[1], a_number=5, a_flag=True, usage_as_a_list={"include_usage": [1]}, unknown={"other": True}
)
_DEEP_SCHEMA = json.loads('{"items": ' * 20 + "{}" + "}" * 20)
FORMAT = (
    _NO_NUMBERS
    + _json(a_string="json_object", a_number=5, a_list=["text"], true=True, an_empty_object={}, no_kind={"type": "xml"})
    + _json(a_list_as_kind={"type": ["text"]}, more_than_text={"type": "text", "schema": {}})
    + _json(no_schema={"type": "json_schema"}, an_empty_schema={"type": "json_schema", "json_schema": {}})
    + tuple(
        (f"a schema that is {what}", json.dumps({"type": "json_schema", "json_schema": {"schema": schema}}))
        for what, schema in (
            *(("a string", "{}"), ("null", None), ("a list", [{}]), ("20 levels deep", _DEEP_SCHEMA)),
            ("70 KB long", {"description": "x" * 70_000}),
        )
    )
    + _json(a_number_as_name={"type": "json_schema", "json_schema": {"schema": {}, "name": 5}})
    + _json(more_beside_a_schema={"type": "json_schema", "json_schema": {"schema": {}, "other": 1}})
)
PROMPT_TEXT = (
    _NESTED + _NO_NUMBERS + _HALF_PAIR + _json(a_number=5, true=True, empty="", null=None, long="x" * 3_900_000)
)
PROMPT = (
    tuple(value for value in PROMPT_TEXT if value[0] != "a list")  # a list of ids is a prompt
    + _DEEP
    + _json(an_empty_list=[], an_empty_text=[""], an_empty_list_of_ids=[[]], flags=[True], fractions=[1.5])
    + _json(negative=[-1], too_large=[2**31], very_large=[2**63], enormous=[10**400], mixed=["a", [1]], texts=[["a"]])
    + _json(null_in_ids=[[1, None]], objects=[{"a": 1}], too_many=["a"] * 129, too_deep=[[[1]]])
)


def _message(**fields: object) -> list[object]:
    return [{"role": "user", "content": "hi"} | fields]


MESSAGES = (
    _NO_NUMBERS
    + _DEEP
    + _json(a_string="x", an_object={"a": 1}, a_number=5, true=True, null=None, empty=[], null_in_a_list=[None])
    + _json(numbers=[5], texts=["a"], no_role=[{}], unknown_role=_message(role="root"), no_content=[{"role": "user"}])
    + _json(a_list_as_role=_message(role=["user"]), a_number_as_content=_message(content=5))
    + _json(a_list_as_name=_message(name=["x"]), a_number_as_name=_message(name=5), tools=_message(tool_calls=[{}]))
    + _json(an_object_as_content=_message(content={"text": "x"}), null_as_content=_message(content=None))
    + _json(an_image=_message(content=[{"type": "image_url", "image_url": {"url": "http://localhost/"}}]))
    + _json(a_part_of_no_type=_message(content=[{"text": "x"}]), a_part_of_null=_message(content=[None]))
    + _json(a_list_as_type=_message(content=[{"type": ["text"], "text": "x"}]))
    + _json(
        a_part_without_text=_message(content=[{"type": "text"}]),
        text_of_5=_message(content=[{"type": "text", "text": 5}]),
    )
    + _json(a_part_with_more=_message(content=[{"type": "text", "text": "x", "cache_control": {}}]))
    + _json(too_many_parts=_message(content=[{"type": "text", "text": "x"}] * 257), too_many=_message() * 1025)
    + (("half a surrogate pair", r'[{"role": "user", "content": "\udfff"}]'),)
)

_KINDS: Mapping[str, Values] = (
    dict.fromkeys(("max_tokens", "max_completion_tokens", "min_tokens", "top_k", "n", "seed"), WHOLE)
    | dict.fromkeys(("logprobs", "prompt_logprobs", "top_logprobs"), WHOLE)
    | dict.fromkeys(("temperature", "top_p", "min_p"), NUMBER)
    | dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), NUMBER)
    | dict.fromkeys(("stream", "echo", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens"), FLAG)
    | dict.fromkeys(("include_stop_str_in_output", "add_special_tokens", "return_tokens_as_token_ids"), FLAG)
    | dict.fromkeys(("return_token_ids", "add_generation_prompt", "continue_final_message", "return_token_strs"), FLAG)
    | dict.fromkeys(("model", "request_id"), TEXT)
    | {"stop": STOPS, "stop_token_ids": IDS, "tokens": IDS, "logit_bias": BIASES, "stream_options": OPTIONS}
    | {"response_format": FORMAT}
    | {"prompt": PROMPT, "messages": MESSAGES}
)
_KINDS_OF_PATH: Mapping[tuple[str, str], Values] = {
    ("/tokenize", "prompt"): PROMPT_TEXT,
    ("/v1/chat/completions", "logprobs"): FLAG,
    ("/v1/completions", "stop_token_ids"): IDS + _json(too_many=[1] * 129),
}
_VALID = frozenset({("seed", "negative"), ("seed", "2^31"), ("model", "empty")})
_CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
_BASES: Mapping[str, dict[str, object]] = {
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/chat/completions": _CHAT,
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1]},
}


def field_cases(key: str | None) -> Iterator[WireCase]:
    """Every field of every route with every value that its kind makes wrong."""
    for path, fields in FIELDS.items():
        for field in sorted(fields):
            for what, text in values_of(path, field):
                valid = (field, what) in _VALID
                yield WireCase(
                    name=f"POST {path}: {field} is {what}" + (" (valid)" if valid else ""),
                    wire=Http1(target=path, body=_body(path, field, text)).wire(key),
                    allowed=HTTP_MAYBE if valid else HTTP_REFUSED,
                )


def values_of(path: str, field: str) -> Values:
    """Of a field that is not on the table, only what no field may be."""
    return _KINDS_OF_PATH.get((path, field)) or _KINDS.get(field) or _NO_NUMBERS + _HALF_PAIR + _DEEP


def _body(path: str, field: str, text: str) -> bytes:
    rest = {name: value for name, value in _BASES[path].items() if name != field}
    if path == "/tokenize" and field == "messages":
        rest = {}
    if field == "stream_options":
        rest["stream"] = True
    others = "".join(f", {json.dumps(name)}: {json.dumps(value)}" for name, value in rest.items())
    return f'{{"{field}": {text}{others}}}'.encode()
