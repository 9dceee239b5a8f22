"""Malformed RPCs: for every method on the table its message's fields and bytes, and what is wrong with any RPC."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from malformed_case import GRPC_MAYBE, GRPC_REFUSED, RpcCase
from malformed_kserve import INFER, INFER_REQUEST, INFER_TYPE, STREAM_INFER, tensor_cases
from malformed_proto import Extreme, broken_messages, extremes
from smg_grpc_proto.generated import vllm_engine_pb2

from cluster.proto.expertmesh.v1 import inference_pb2 as pb

GENERATE = "/expertmesh.v1.Inference/Generate"
GENERATE_STREAM = "/expertmesh.v1.Inference/GenerateStream"
MODEL_INFO = "/expertmesh.v1.Inference/ModelInfo"
OVER_THE_LIMIT = (4 << 20) + 1024


_ENGINE = "/vllm.grpc.engine.VllmEngine"
_HEALTH_CHECK = "/grpc.health.v1.Health/Check"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rpc:
    """A method, what it takes, and a request for it that is in order and cheap.

    depth: of messages inside messages that are filled; 0: only bytes that are no message at all.
    answers_in_band: a wrong message gets a message that says so, and the RPC ends with OK.
    """

    method: str
    takes: type[Message]
    request: bytes
    depth: int = 2
    answers_in_band: bool = False


_REQUEST = pb.GenerateRequest(prompt="hi", max_tokens=2).SerializeToString()
_ENGINE_REQUEST = vllm_engine_pb2.GenerateRequest(
    tokenized={"input_ids": [1, 2]}, sampling_params={"max_tokens": 2}
).SerializeToString()
# One line for each method.
RPCS = (
    Rpc(method=GENERATE, takes=pb.GenerateRequest, request=_REQUEST),
    Rpc(method=GENERATE_STREAM, takes=pb.GenerateRequest, request=_REQUEST, depth=0),
    Rpc(method=MODEL_INFO, takes=pb.ModelInfoRequest, request=b""),
    Rpc(method=_HEALTH_CHECK, takes=health_pb2.HealthCheckRequest, request=b""),
    Rpc(method=INFER, takes=INFER_TYPE, request=INFER_REQUEST, depth=3),
    Rpc(
        method=STREAM_INFER,
        takes=INFER_TYPE,
        request=INFER_REQUEST,
        depth=1,
        answers_in_band=True,
    ),
    Rpc(
        method=f"{_ENGINE}/Generate",
        takes=vllm_engine_pb2.GenerateRequest,
        request=_ENGINE_REQUEST,
    ),
    Rpc(method=f"{_ENGINE}/Abort", takes=vllm_engine_pb2.AbortRequest, request=b""),
)
_UNKNOWN = (
    "/expertmesh.v1.Inference/Nothing",
    "/expertmesh.v1.Inference/generate",
    "/expertmesh.v1.Inference/",
    "/expertmesh.v1.Inference/Generate/",
    "/expertmesh.v1.Inference/__init__",
    "/expertmesh.v1.Nothing/Generate",
    "/Inference/Generate",
    "/expertmesh.v2.Inference/Generate",
    "/ray.serve.RayServeAPIService/ListApplications",
    "/ray.rpc.JobInfoGcsService/GetAllJobInfo",
    "/inference.GRPCInferenceService/RepositoryModelLoad",
    "/inference.GRPCInferenceService/SystemSharedMemoryRegister",
    "/a/b",
    "/" + "a" * 4000 + "/b",
)


def grpc_cases(key: str | None) -> Iterator[RpcCase]:
    own = () if key is None else (("authorization", f"Bearer {key}"),)
    for rpc in RPCS:
        yield from _messages(rpc, own)
    for method in _UNKNOWN:
        for what, message in (("a good message", _REQUEST), ("noise", b"\xff" * 100)):
            name = f"{method[:60]}, which is not served, with {what}"
            yield RpcCase(name=name, method=method, messages=(message,), metadata=own, allowed=GRPC_REFUSED)
    yield from tensor_cases(own)
    yield from _sizes(own)
    yield from _metadata(own, key)


def _messages(rpc: Rpc, own: tuple[tuple[str, str], ...]) -> Iterator[RpcCase]:
    """rpc's fields at their extremes, and bytes that are no message."""

    def case(what: str, *messages: bytes, allowed: frozenset[str] = GRPC_MAYBE) -> RpcCase:
        return RpcCase(
            name=f"{rpc.method}: {what}", method=rpc.method, messages=messages, metadata=own, allowed=allowed
        )

    def extreme(of: Extreme, wire: bytes) -> RpcCase:
        if not of.is_wrong:
            return case(f"{of.name} (may be valid)", wire)
        return case(of.name, wire, allowed=GRPC_MAYBE if rpc.answers_in_band else GRPC_REFUSED)

    for of in extremes(cast("Descriptor", rpc.takes.DESCRIPTOR), rpc.depth) if rpc.depth else ():
        yield extreme(of, rpc.request + of.wire)
    for of in broken_messages(rpc.request):
        yield extreme(of, of.wire)
    yield case("no message")
    yield case("50 messages (may be valid)", *[rpc.request] * 50)


def _sizes(own: tuple[tuple[str, str], ...]) -> Iterator[RpcCase]:
    too_large = frozenset({"RESOURCE_EXHAUSTED"})
    large = pb.GenerateRequest(prompt="x" * OVER_THE_LIMIT).SerializeToString()
    bomb = pb.GenerateRequest(prompt="x" * (32 << 20)).SerializeToString()
    for method in (GENERATE, GENERATE_STREAM, MODEL_INFO):
        name = f"{method}: more than 4 MiB"
        yield RpcCase(name=name, method=method, messages=(large,), metadata=own, allowed=too_large)
        name = f"{method}: 32 MiB in a small gzip"
        yield RpcCase(name=name, method=method, messages=(bomb,), metadata=own, gzip=True, allowed=too_large)


def _metadata(own: tuple[tuple[str, str], ...], key: str | None) -> Iterator[RpcCase]:
    flood = tuple((f"x-flood-{i:03}", "a" * 100) for i in range(300))
    made: dict[str, tuple[tuple[tuple[str, str | bytes], ...], frozenset[str]]] = {
        "20 KiB in one value": ((("x-long", "a" * 20_000),), frozenset({"RESOURCE_EXHAUSTED"})),
        "1 MiB in one value": ((("x-long", "a" * (1 << 20)),), frozenset({"RESOURCE_EXHAUSTED"})),
        "300 of 100 bytes": (flood, frozenset({"RESOURCE_EXHAUSTED"})),
        "a name of 20 KiB": ((("x" * 20_000, "a"),), frozenset({"RESOURCE_EXHAUSTED"})),
        "noise in a -bin (valid)": ((("x-noise-bin", bytes(range(256))),), GRPC_MAYBE),
    }
    for value in ("-1", "abc", "1.5", "", "9" * 13, "0x10", "NaN"):
        made[f"x-request-timeout-ms is {value!r} (may be valid)"] = ((("x-request-timeout-ms", value),), GRPC_MAYBE)
    for value in ("x" * 129, "a b", "../../a", ""):
        made[f"x-request-id is {value[:40]!r} (may be valid)"] = ((("x-request-id", value),), GRPC_MAYBE)
    for what, (metadata, allowed) in made.items():
        name = f"{GENERATE}: metadata: {what}"
        yield RpcCase(name=name, method=GENERATE, messages=(_REQUEST,), metadata=(*own, *metadata), allowed=allowed)
    denied = frozenset({"UNAUTHENTICATED"} if key else {"OK"})
    for value in ("", "Bearer", "Basic Og==", "Bearer " + "a" * 4000, '"'):
        name = f"{GENERATE}: metadata: authorization is {value[:40]!r}"
        metadata = (("authorization", value),)
        yield RpcCase(name=name, method=GENERATE, messages=(_REQUEST,), metadata=metadata, allowed=denied)
