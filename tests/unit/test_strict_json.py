"""JSON from strangers: what it means, what is refused, and that refusing it is cheap."""

import json
import time

import pytest

from cluster.strict_json import MAX_CONTAINERS, MAX_DEPTH, MAX_KEYS, read_json
from experts.errors import RequestError

MEGABYTES = 4 << 20
SECONDS = 2.0  # on a busy machine; what this test is about took minutes


@pytest.mark.parametrize("text", ['{"a": [1, 2.5, null, true, "é"], "b": {"c": []}}', "[]", '"x"', "-0.0"])
def test_json_is_read_as_json(text: str) -> None:
    assert read_json(text, "the body") == json.loads(text)


@pytest.mark.parametrize(
    ("text", "why", "field"),
    [
        ("{", "not valid JSON", None),
        ("[NaN]", "contains NaN", None),
        ('{"a": -Infinity}', "contains -Infinity", None),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "names 'c' twice", None),
        ('{"a": ' + "[" * 33 + "]" * 33 + "}", "a is nested more than 32", "a"),
        ("[" * 15_000, "more than 32", None),
        ('{"a": ["\\ud800"]}', "a is not valid Unicode", "a"),
        ('{"a": {"\\ud800": 1}}', "a is not valid Unicode", "a"),
        ('{"\\ud800": 1}', "not valid Unicode", None),
        ("1" * 5000, "too many digits", None),
    ],
)
def test_what_is_not_strict_is_refused(text: str, why: str, field: str | None) -> None:
    with pytest.raises(RequestError, match=why) as refused:
        read_json(text, "the body")
    assert refused.value.field == field


def test_the_deepest_that_is_allowed_is_read() -> None:
    text = '{"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}"
    assert read_json(text, "the body") == json.loads(text)


def test_a_parameter_is_named_whatever_is_wrong_with_it() -> None:
    with pytest.raises(RequestError, match="stop is not valid Unicode") as refused:
        read_json('{"deep": ["\\udfff"]}', "stop", "stop")
    assert refused.value.field == "stop"


@pytest.mark.parametrize(
    ("piece", "why"),
    [
        ('"k%d": 1', f"more than {MAX_KEYS} keys"),  # with one name twice at the end
        ("[]", "too many lists"),
        ("{}", f"more than {MAX_CONTAINERS} lists and objects"),
        ('{"a": 1}', f"more than {MAX_KEYS} keys"),
    ],
    ids=["keys", "lists", "empty objects", "objects"],
)
def test_megabytes_of_trouble_are_refused_in_no_time(piece: str, why: str) -> None:
    count = MEGABYTES // (len(piece) + 6)
    pieces = [piece % i if "%" in piece else piece for i in range(count)]
    inside = ",".join([*pieces, pieces[0]])
    text = "{" + inside + "}" if "%" in piece else "[" + inside + "]"
    began_s = time.monotonic()
    with pytest.raises(RequestError, match=why):
        read_json(text, "the body")
    assert time.monotonic() - began_s < SECONDS


def test_a_long_prompt_full_of_brackets_is_read() -> None:
    text = json.dumps({"prompt": "x[i][j] = {};" * 1000})
    assert read_json(text, "the body") == json.loads(text)
