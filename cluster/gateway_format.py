"""`response_format` of an OpenAI body: plain text, any JSON object, or JSON of a schema.

Whether a schema makes a grammar in time is found out by cluster/gateway_schema.py.
"""

import json
from collections.abc import Mapping
from typing import cast

from experts.errors import RequestError

MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH = 64 << 10, 16
FORMATS = ("text", "json_object", "json_schema")


def schema_of(body: Mapping[str, object]) -> str | None:
    """The JSON schema that an answer to a checked body must have, as JSON; None where it may be any text."""
    form = cast("Mapping[str, object]", body.get("response_format") or {})
    if form.get("type") == "json_object":
        return '{"type":"object"}'
    if form.get("type") != "json_schema":
        return None
    return json.dumps(cast("Mapping[str, object]", form["json_schema"])["schema"], separators=(",", ":"))


def check_format(body: Mapping[str, object]) -> None:
    """Raises RequestError unless the body asks for no form, or for one that can be enforced."""
    form = body.get("response_format")
    if form is None:
        return
    kind = form.get("type") if isinstance(form, dict) else None
    if not isinstance(form, dict) or kind not in FORMATS:
        raise RequestError(f"response_format.type must be one of {', '.join(FORMATS)}", field="response_format")
    allowed = {"type", "json_schema"} if kind == "json_schema" else {"type"}
    if form.keys() - allowed:
        raise RequestError(f"response_format has more than {' and '.join(sorted(allowed))}", field="response_format")
    if kind != "json_schema":
        return
    named = form.get("json_schema")
    if not isinstance(named, dict) or named.keys() - {"name", "description", "schema", "strict"}:
        raise RequestError(
            "response_format.json_schema must have a schema, and at most name, description and strict beside it",
            field="response_format",
        )
    schema = named.get("schema")
    if not isinstance(schema, dict):
        raise RequestError("response_format.json_schema.schema must be an object", field="response_format")
    if not isinstance(named.get("name", ""), str) or not isinstance(named.get("strict") or False, bool):
        raise RequestError("response_format.json_schema: name is a string, and strict a flag", field="response_format")
    size = len(json.dumps(schema))
    if size > MAX_SCHEMA_BYTES or _depth(schema) > MAX_SCHEMA_DEPTH:
        raise RequestError(
            f"response_format: the schema has {size} bytes and {_depth(schema)} levels; {MAX_SCHEMA_BYTES} and "
            f"{MAX_SCHEMA_DEPTH} are allowed",
            field="response_format",
        )


def _depth(value: object) -> int:
    """Levels of lists and objects; `_check_tree` has bounded them."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0) if isinstance(value, dict | list) else 0
