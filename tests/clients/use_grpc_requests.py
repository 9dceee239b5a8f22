# type: ignore  (the packages are of another environment: here there is none of them, or another version)
"""grpc-requests: knows nothing of our protos but what reflection tells it."""

from collections.abc import Callable
from typing import NamedTuple

import grpc
from asking import Asked, Server, refusals, report
from grpc_requests import Client

SERVER, ASKED = Server.from_environment(), Asked.read()
INFERENCE, HEALTH = "expertmesh.v1.Inference", "grpc.health.v1.Health"
SEEDED = {"temperature": ASKED.temperature, "seed": ASKED.seed}


class CallDetails(NamedTuple):
    """Of one RPC, as an interceptor may change them."""

    method: str
    timeout: float | None
    metadata: list[tuple[str, str]]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class WithKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamStreamClientInterceptor):
    """The client has no place for a key, and reflection needs one, too."""

    def __init__(self, key: str) -> None:
        self._header = ("authorization", f"Bearer {key}")

    def _call(self, proceed: Callable, details: grpc.ClientCallDetails, message: object) -> object:
        keyed = CallDetails(
            method=details.method,
            timeout=details.timeout,
            metadata=[*(details.metadata or ()), self._header],
            credentials=details.credentials,
            wait_for_ready=details.wait_for_ready,
            compression=details.compression,
        )
        return proceed(keyed, message)

    intercept_unary_unary = intercept_unary_stream = intercept_stream_stream = _call


def client(key: str) -> Client:
    return Client(SERVER.grpc, interceptors=[WithKey(key)])


def question(**fields: object) -> dict[str, object]:
    return {"prompt": ASKED.prompt, "max_tokens": ASKED.max_tokens, "temperature": 0} | fields


def answers(api: Client) -> dict[str, object]:
    def text(**fields: object) -> str:
        return api.request(INFERENCE, "Generate", question(**fields))["text"]

    chunks = list(api.request(INFERENCE, "GenerateStream", question()))
    return {
        "services": sorted(api.service_names),
        "health": api.request(HEALTH, "Check", {"service": INFERENCE})["status"],
        "models": [api.request(INFERENCE, "ModelInfo", {})["name"]],
        "completion": text(),
        "completion_stopped": text(stop=ASKED.stop),
        "completion_seeded": text(**SEEDED),
        "streamed_completion": "".join(chunk.get("text", "") for chunk in chunks),
    }


def ask(model: str, prompt: str, key: str) -> object:
    return client(key).request(INFERENCE, "Generate", {"model": model, "prompt": prompt, "max_tokens": 1})


def code(error: BaseException) -> list[str]:
    return [error.code().name if isinstance(error, grpc.RpcError) else repr(error)]


if __name__ == "__main__":
    report(answers(client(SERVER.any_key)) | {"refused": refusals(ask, SERVER, ASKED, told_by=code)})
