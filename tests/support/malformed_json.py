"""Bodies that are no JSON, or none that a gateway should read: written by hand."""

import gzip
from collections.abc import Iterator

from malformed_case import CLOSED, COMPLETION, HTTP_MAYBE, HTTP_REFUSED, Http1, WireCase

OVER_THE_LIMIT = (4 << 20) + 1024
_FIELDS = (
    "best_of cache_salt chat_template chat_template_kwargs data_parallel_rank documents guided_json images "
    "kv_transfer_params logits_processors lora_path lora_request mm_processor_kwargs priority prompt_embeds "
    "structured_outputs suffix truncate_prompt_tokens vllm_xargs __proto__"
)

_BODIES: dict[str, bytes] = {
    "empty": b"",
    "blanks": b" \n\t ",
    "null": b"null",
    "an empty array": b"[]",
    "an array of requests": b"[" + COMPLETION + b"]",
    "a string": b'"hi"',
    "a number": b"5",
    "only a brace": b"{",
    "only a quote": b'"',
    "a trailing comma": b'{"prompt": "hi",}',
    "single quotes": b"{'prompt': 'hi'}",
    "a comment": b'{"prompt": "hi" /* hi */}',
    "a name without quotes": b'{prompt: "hi"}',
    "two documents": COMPLETION + COMPLETION,
    "a rest behind it": COMPLETION + b"x",
    "a NUL behind it": COMPLETION + b"\0",
    "NULs only": b"\0" * 64,
    "a line break in a string": b'{"prompt": "h\ni"}',
    "an unknown escape": rb'{"prompt": "\x41"}',
    "half an escape": rb'{"prompt": "\u00"}',
    "a leading zero": b'{"prompt": "hi", "max_tokens": 02}',
    "a hexadecimal number": b'{"prompt": "hi", "max_tokens": 0x2}',
    "a number without digits": b'{"prompt": "hi", "max_tokens": -}',
    "a number with a plus": b'{"prompt": "hi", "max_tokens": +2}',
    "a field twice": b'{"prompt": "hi", "prompt": "ho"}',
    "a field twice, once escaped": rb'{"prompt": "hi", "\u0070rompt": "ho"}',
    "a field twice, further down": b'{"prompt": "hi", "metadata": {"a": {"b": 1, "b": 2}}}',
    "invalid UTF-8 in a string": b'{"prompt": "\xff\xfe"}',
    "invalid UTF-8 in a name": b'{"\xc3\x28": 1, "prompt": "hi"}',
    "overlong UTF-8": b'{"prompt": "\xc0\xaf"}',
    "a surrogate as UTF-8": b'{"prompt": "\xed\xa0\x80"}',
    "half a surrogate pair in a name": rb'{"prompt": "hi", "\ud800": 1}',
    "half a surrogate pair further down": rb'{"prompt": "hi", "metadata": {"a": ["\udc00"]}}',
    "surrogates in the wrong order": rb'{"prompt": "\udc00\ud800"}',
    "UTF-16": COMPLETION.decode().encode("utf-16"),
    "UTF-16 without a mark": COMPLETION.decode().encode("utf-16-le"),
    "UTF-32": COMPLETION.decode().encode("utf-32"),
    "Latin-1": '{"prompt": "é"}'.encode("latin-1"),
    "33 objects deep": b'{"prompt": "hi", "metadata": ' + b'{"a": ' * 33 + b"1" + b"}" * 33 + b"}",
    "100 000 lists deep": b'{"prompt": "hi", "metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100 000 lists deep without an end": b"[" * 100_000,
    "200 000 objects deep without an end": b'{"a":' * 200_000,
    "1001 names": b'{"prompt": "hi", "metadata": {' + b",".join(b'"%d": 1' % i for i in range(1001)) + b"}}",
    "1001 fields": b'{"prompt": "hi", ' + b",".join(b'"%d": 1' % i for i in range(1001)) + b"}",
    "a million numbers": b'{"prompt": "hi", "metadata": [' + b"1," * 1_000_000 + b'1], "max_tokens": -1}',
    "a name of a megabyte": b'{"' + b"a" * (1 << 20) + b'": 1, "prompt": "hi"}',
    "an empty name": b'{"": 1, "prompt": "hi"}',
    "no prompt": b'{"max_tokens": 2}',
    "an empty object": b"{}",
    "a list as streaming": b'{"prompt": "hi", "stream": true, "max_tokens": [2]}',
    "more tokens than asked for at most": b'{"prompt": "hi", "max_tokens": 2, "min_tokens": 3}',
    "too many answers": b'{"prompt": ["a", "b", "c", "d", "e", "f", "g", "h", "i"], "n": 16}',
    "no tokens without an echo": b'{"prompt": "hi", "max_tokens": 0}',
    "a pickle": b"cbuiltins\nprint\n(S'hi'\ntR.",
    "a form": b"prompt=hi&max_tokens=2",
    "XML": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///b">]><a>&b;</a>',
    "gzip": gzip.compress(COMPLETION, mtime=0),
}


def json_cases(key: str | None) -> Iterator[WireCase]:
    """Bodies for /v1/completions, and some for the other routes."""
    for what, body in _BODIES.items():
        yield _case(what, Http1(body=body), key)
    for i in range(1, len(COMPLETION), 3):
        yield _case(f"JSON that ends behind {i} bytes", Http1(body=COMPLETION[:i]), key)
    for field in _FIELDS.split():
        body = b'{"prompt": "hi", "max_tokens": 2, "%s": {"a": "x"}}' % field.encode()
        yield _case(f"{field}, which is not taken", Http1(body=body), key)
    for path in ("/v1/chat/completions", "/tokenize", "/detokenize"):
        for what in ("empty", "an array of requests", "an empty object", "UTF-16", "100 000 lists deep"):
            yield _case(what, Http1(target=path, body=_BODIES[what]), key)
    yield from _said_to_be_something_else(key)
    yield from _over_the_limit(key)


def _said_to_be_something_else(key: str | None) -> Iterator[WireCase]:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "a" * 500):
        request = Http1(headers=("Host: localhost", f"Content-Type: {kind}"))
        yield _case(f"valid JSON as {kind[:40]!r} (valid)", request, key, HTTP_MAYBE)
    yield _case("valid JSON of no type (valid)", Http1(headers=("Host: localhost",)), key, HTTP_MAYBE)
    yield _case(
        "valid JSON behind a byte order mark (valid)", Http1(body=b"\xef\xbb\xbf" + COMPLETION), key, HTTP_MAYBE
    )
    yield _case("gzip, said to be so", Http1(more=("Content-Encoding: gzip",), body=_BODIES["gzip"]), key)
    nulls = b'{"prompt": "hi", "max_tokens": 2, "stop": null, "n": null, "seed": null, "logprobs": null}'
    yield _case("null for optional fields (valid)", Http1(body=nulls), key, frozenset({"200"}))


def _over_the_limit(key: str | None) -> Iterator[WireCase]:
    """A server may close before it has read everything, and then its answer can be lost on the way."""
    body = b'{"prompt": "%s"}' % (b"x" * OVER_THE_LIMIT)
    chunks = b"".join(b"10000\r\n" + body[i : i + 65536].ljust(65536) + b"\r\n" for i in range(0, len(body), 65536))
    may_close = HTTP_REFUSED | {CLOSED}
    yield _case("more than 4 MiB", Http1(body=body), key, may_close)
    chunked = Http1(framing=("Transfer-Encoding: chunked",), body=chunks + b"0\r\n\r\n")
    yield _case("more than 4 MiB in chunks", chunked, key, may_close)
    announced = Http1(framing=(f"Content-Length: {OVER_THE_LIMIT}",), body=b"")
    yield _case("more than 4 MiB, announced only", announced, key, may_close)


def _case(what: str, request: Http1, key: str | None, allowed: frozenset[str] = HTTP_REFUSED) -> WireCase:
    return WireCase(name=f"POST {request.target}: the body is {what}", wire=request.wire(key), allowed=allowed)
