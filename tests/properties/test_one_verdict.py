"""The same generation request is accepted or refused alike over HTTP, our own gRPC, KServe's, and vLLM's."""

import json
import struct
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from smg_grpc_proto.generated import vllm_engine_pb2
from tritonclient.grpc import service_pb2

from cluster import grpc_inference, vllm_engine_request
from cluster.gateway_body import read_body
from cluster.kserve_request import read_request
from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.validate import Limits, check
from experts.errors import RequestError

LIMITS = Limits(max_model_len=64, vocab_size=259)
Fields = Mapping[str, object]
Surface = Callable[[Fields], None]  # raises RequestError
_REAL = st.sampled_from([-3.0, -2.0, -0.5, 0.0, 0.25, 1.0, 1.5, 2.0, 2.5, 1e6])
_WHOLE = st.sampled_from([0, 1, 2, 20, 21, 63, 64, 65, 2**31 - 1])
_TEXTS = st.lists(st.sampled_from(["", "x", "y" * 256, "z" * 257]), max_size=2) | st.just(["x"] * 17)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": _REAL,
        "top_p": _REAL,
        "min_p": _REAL,
        "repetition_penalty": _REAL,
        "presence_penalty": _REAL,
        "frequency_penalty": _REAL,
        "top_k": st.sampled_from([-2, -1, 0, 5, 2**31 - 1]),
        "max_tokens": _WHOLE,
        "min_tokens": _WHOLE,
        "logprobs": _WHOLE,
        "seed": st.sampled_from([-(2**63), -1, 0, 2**63 - 1]),
        "stop": _TEXTS,
        "ignore_eos": st.booleans(),
    },
)


def over_http(fields: Fields) -> None:
    read_body("/v1/completions", json.dumps({"prompt": "hello", **fields}).encode(), limits=LIMITS, served_name="nano")


def over_our_own(fields: Fields) -> None:
    check(grpc_inference.logical_request(pb.GenerateRequest(prompt="hello", **fields)), LIMITS)  # type: ignore[arg-type]


def over_kserve(fields: Fields) -> None:
    request = service_pb2.ModelInferRequest()  # type: ignore[attr-defined]
    for name, text in (("text_input", "hello"), ("sampling_parameters", json.dumps(fields))):
        request.inputs.add(name=name, datatype="BYTES", shape=[1])
        request.raw_input_contents.append(struct.pack("<I", len(text)) + text.encode())
    check(read_request(request, LIMITS).generation, LIMITS)


def over_vllms(fields: Fields) -> None:
    sampling = vllm_engine_pb2.SamplingParams(**fields)  # type: ignore[arg-type]
    check(
        vllm_engine_request.logical_request(
            vllm_engine_pb2.GenerateRequest(request_id="x", text="hello", sampling_params=sampling)
        ),
        LIMITS,
    )


def verdict(surface: Surface, fields: Fields) -> str | None:
    """The field that is refused; None where nothing is."""
    try:
        surface(fields)
    except RequestError as error:
        return error.field or ""
    return None


@pytest.mark.parametrize("surface", [over_our_own, over_kserve, over_vllms])
@given(fields=FIELDS)
def test_a_request_gets_one_verdict_on_every_surface(surface: Surface, fields: dict[str, object]) -> None:
    if surface is over_vllms:  # where a number that is 0 cannot be told from one that is not given
        optional = ("temperature", "max_tokens", "seed", "logprobs")
        fields = {name: value for name, value in fields.items() if name in optional or value}
        # Nothing below 0 can be sent there as top_k, and no seed of 64 bits.
        fields = {name: value for name, value in fields.items() if name not in ("top_k", "seed") or value in (0, 5)}
    assert verdict(surface, fields) == verdict(over_http, fields)
