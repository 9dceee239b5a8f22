"""JSON schemas: what is a response_format, and what is compiled in time."""

import asyncio
import json
from pathlib import Path

import pytest
from gateway_fakes import write_model

from cluster.gateway_format import MAX_SCHEMA_BYTES, check_format, schema_of
from cluster.gateway_schema import SchemaCheck
from experts.errors import RequestError

CITY = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
# Half a second for each property on a fast machine.
SLOW = {
    "type": "object",
    "properties": {
        f"p{i}": {"type": "string", "pattern": f"(((a{{1,200}}){{1,20{i}}}){{1,50}}){{1,50}}"} for i in range(9)
    },
}


def of_schema(schema: object) -> dict[str, object]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def nested(levels: int) -> dict[str, object]:
    return {"items": nested(levels - 1)} if levels > 1 else {}


@pytest.mark.parametrize(
    ("body", "schema"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"type": "object"}),
        (of_schema(CITY), CITY),
        (of_schema(nested(16)), nested(16)),
    ],
)
def test_a_format_says_what_an_answer_must_be(body: dict[str, object], schema: object) -> None:
    check_format(body)
    found = schema_of(body)
    assert (None if found is None else json.loads(found)) == schema


@pytest.mark.parametrize(
    "form",
    [
        "json",
        {},
        {"type": "grammar"},
        {"type": "text", "json_schema": {}},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"schema": []}},
        {"type": "json_schema", "json_schema": {"schema": {}, "other": 1}},
        {"type": "json_schema", "json_schema": {"schema": {}, "strict": "yes"}},
        of_schema(nested(17))["response_format"],
        of_schema({"description": "x" * MAX_SCHEMA_BYTES})["response_format"],
    ],
)
def test_what_is_no_format_is_refused_by_name(form: object) -> None:
    with pytest.raises(RequestError, match="response_format") as caught:
        check_format({"response_format": form})
    assert caught.value.field == "response_format"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


def test_a_schema_is_tried_in_a_process_that_may_be_killed(folder: Path) -> None:
    async def try_them() -> None:
        check = SchemaCheck(str(folder), 259, timeout_s=0.5)
        await check.check(json.dumps(CITY))
        first = check._process
        for wrong in ('{"type": "no type"}', '{"$ref": "#/nowhere"}'):
            with pytest.raises(RequestError, match="cannot|not one that can be enforced"):
                await check.check(wrong)
        assert check._process is first
        with pytest.raises(RequestError, match="simpler"):
            await check.check(json.dumps(SLOW))
        assert first is not None and first.returncode is not None
        await check.check(json.dumps({"type": "integer"}))
        await check.close()

    asyncio.run(try_them())


def test_a_client_that_leaves_takes_nobody_elses_verdict_away(folder: Path) -> None:
    async def leave() -> None:
        check = SchemaCheck(str(folder), 259)
        await check.check(json.dumps(CITY))
        gone = asyncio.create_task(check.check(json.dumps(SLOW)))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        await check.check(json.dumps({"type": "boolean"}))
        await check.close()

    asyncio.run(leave())
