"""Wrong tensors and parameters for inference.GRPCInferenceService: written by hand."""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import cast

from google.protobuf.message import Message
from malformed_case import GRPC_MAYBE, GRPC_REFUSED, RpcCase
from tritonclient.grpc import service_pb2

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"

pb = cast("ModuleType", service_pb2)  # its messages are made at run time


def text(value: bytes, length: int | None = None) -> bytes:
    """One element of a BYTES tensor. length: what it says of itself; None: the truth."""
    return struct.pack("<I", len(value) if length is None else length) + value


def _request(
    *tensors: tuple[str, str, Sequence[int], bytes],
    parameters: Mapping[str, object] | None = None,
    **fields: object,
) -> bytes:
    """tensors: name, datatype, shape, raw contents. Without any, one good prompt."""
    asked = {"max_tokens": 2} if parameters is None else parameters
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    tensors = tensors or (("text_input", "BYTES", [1], text(b"hi")),)
    return pb.ModelInferRequest(
        **{
            "inputs": [{"name": name, "datatype": kind, "shape": shape} for name, kind, shape, _ in tensors],
            "raw_input_contents": [raw for *_, raw in tensors],
            "parameters": {name: {kinds[type(value)]: value} for name, value in asked.items()},
        }
        | fields
    ).SerializeToString()


INFER_TYPE = cast("type[Message]", pb.ModelInferRequest)
INFER_REQUEST = _request()
_PROMPT = ("text_input", "BYTES", [1], text(b"hi"))


def tensor_cases(own: tuple[tuple[str, str], ...]) -> Iterator[RpcCase]:
    """own: the caller's key, as metadata."""
    for what, request in (_tensors() | _others() | _samplings()).items():
        for method, allowed in ((INFER, GRPC_REFUSED), (STREAM_INFER, GRPC_MAYBE)):  # a stream tells it in a message
            name = f"{method}: {what}"
            yield RpcCase(name=name, method=method, messages=(request,), metadata=own, allowed=allowed)


def _tensors() -> dict[str, bytes]:
    """Inputs that say one thing and hold another."""

    def prompt(shape: Sequence[int] = (1,), raw: bytes = text(b"hi"), kind: str = "BYTES") -> bytes:
        return _request(("text_input", kind, shape, raw))

    return {
        "an unknown tensor": _request(_PROMPT, ("other_input", "BYTES", [1], text(b"hi"))),
        "an unknown tensor of noise as name": _request(_PROMPT, ("\x00\n\u202e" * 40, "BYTES", [1], text(b"hi"))),
        "no tensor with a name": _request(("", "", [], b"")),
        "the prompt twice": _request(_PROMPT, _PROMPT),
        "no prompt": _request(("stream", "BOOL", [1], b"\0")),
        "a prompt of numbers": prompt(kind="FP32", raw=bytes(4)),
        "a prompt of an unknown type": prompt(kind="x" * 1000),
        "a prompt of no shape": prompt(shape=[]),
        "a prompt of shape 0": prompt(shape=[0], raw=b""),
        "a prompt of shape -1": prompt(shape=[-1]),
        "a prompt of shape 2^63 - 1": prompt(shape=[2**63 - 1]),
        "a prompt of shape 2^32 x 2^32": prompt(shape=[2**32, 2**32]),
        "a prompt of 10 000 dimensions": prompt(shape=[1] * 10_000),
        "two prompts": prompt(shape=[2], raw=text(b"hi") * 2),
        "a prompt of no bytes": prompt(raw=b""),
        "a prompt of 3 bytes": prompt(raw=b"\2\0\0"),
        "a prompt that is longer than it says": prompt(raw=text(b"hi", 1)),
        "a prompt that is shorter than it says": prompt(raw=text(b"hi", 3)),
        "a prompt of 4 GiB, it says": prompt(raw=text(b"hi", 2**32 - 1)),
        "an empty prompt": prompt(raw=text(b"")),
        "a prompt that is no UTF-8": prompt(raw=text(b"\xff\xfe")),
        "a prompt of half a surrogate pair": prompt(raw=text(b"\xed\xa0\x80")),
        "a flag of 2 bytes": _request(_PROMPT, ("stream", "BOOL", [1], b"\1\1")),
        "a flag of 255": _request(_PROMPT, ("return_logprobs", "BOOL", [1], b"\xff")),
        "an image": _request(_PROMPT, ("image", "BYTES", [1], text(b"hi"))),
    }


def _others() -> dict[str, bytes]:
    """What stands round the tensors."""
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1]}
    region = {"shared_memory_region": {"string_param": "x"}, "shared_memory_byte_size": {"int64_param": 2**62}}
    typed = tensor | {"contents": {"bytes_contents": [b"hi"]}}
    return {
        "an unknown model": _request(model_name="no such model"),
        "an unknown version": _request(model_version="2"),
        "an id of blanks": _request(id=" " * 10),
        "an id of 10 000 letters": _request(id="x" * 10_000),
        "an unknown output": _request(outputs=[{"name": "other_output"}]),
        "an output twice": _request(outputs=[{"name": "text_output"}] * 2),
        "an output in shared memory": _request(outputs=[{"name": "text_output", "parameters": region}]),
        "an input in shared memory": _request(inputs=[tensor | {"parameters": region}], raw_input_contents=[]),
        "contents twice": _request(inputs=[typed]),
        "no contents": _request(raw_input_contents=[]),
        "too many contents": _request(raw_input_contents=[text(b"hi")] * 2),
        "contents of two types": _request(
            inputs=[tensor | {"contents": {"bytes_contents": [b"hi"], "int_contents": [1]}}], raw_input_contents=[]
        ),
        "contents of another type": _request(
            inputs=[tensor | {"contents": {"fp64_contents": [float("nan")]}}], raw_input_contents=[]
        ),
        "10 000 inputs": _request(*[_PROMPT] * 10_000),
    }


def _samplings() -> dict[str, bytes]:
    """Sampling as parameters, and as JSON in a tensor."""
    parameters: tuple[tuple[str, object], ...] = (
        *(("max_tokens", value) for value in (-1, 2**63 - 1, True, 1.5, "", "abc", "1e400", "9" * 5000, "²")),
        *(("temperature", value) for value in (-1.0, float("nan"), float("inf"), 1e308, "nan", "Infinity", "1" * 400)),
        *(("timeout", value) for value in (-1, 2**63 - 1, "abc", float("nan"))),
        *(("nothing", 1), ("lora_name", "x"), ("", 1), ("x" * 10_000, 1), ("sequence_id", 5), ("priority", 2**62)),
    )
    documents = [
        *("", "null", "[]", "{", "5", '"x"', '{"max_tokens": NaN}', '{"max_tokens": 1e999}', '{"max_tokens": [1]}'),
        *('{"max_tokens": 1, "max_tokens": 2}', '{"stop": "\\ud800"}', "[" * 30_000, '{"a":' * 10_000, '{"n": 17}'),
        *('{"lora_name": "x"}', '{"nothing": 1}', '{"logit_bias": "["}', '{"logit_bias": {"-1": 1}}', '{"seed": 1.5}'),
        *(
            json.dumps({"max_tokens": 10**400}),
            json.dumps({"stop": ["x"] * 17}),
            json.dumps({str(i): 1 for i in range(1001)}),
        ),
        *(json.dumps({"stop": "x" * (1 << 17)}), json.dumps({"stop_token_ids": [2**63]}), '{"stop_token_ids": "[[]]"}'),
    ]
    found = {
        f"the parameter {name[:40]} is {str(value)[:20]!r}": _request(parameters={name: value})
        for name, value in parameters
    }
    for document in documents:
        tensor = ("sampling_parameters", "BYTES", [1], text(document.encode()))
        found[f"sampling of {document[:40]} ({len(document)} characters)"] = _request(_PROMPT, tensor, parameters={})
    both = _request(_PROMPT, ("sampling_parameters", "BYTES", [1], text(b'{"max_tokens": 2}')))
    return found | {"sampling in both places": both}
