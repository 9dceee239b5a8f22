# type: ignore  (the packages are of another environment: here there is none of them, or another version)
"""kserve's InferenceGRPCClient, which has no streams."""

import asyncio
import json
import logging

import grpc
from asking import Asked, Server, refusals, report
from kserve import InferInput, InferRequest
from kserve.inference_client import InferenceGRPCClient

SERVER, ASKED = Server.from_environment(), Asked.read()
SEEDED = {"temperature": ASKED.temperature, "seed": ASKED.seed}


def headers(key: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {key}")]


def question(model: str, prompt: str, sampling: dict[str, object]) -> InferRequest:
    """Tensors with typed contents, as kserve sends what it gets as a list."""
    inputs = [
        InferInput("text_input", [1], "BYTES", data=[prompt]),
        InferInput("sampling_parameters", [1], "BYTES", data=[json.dumps(sampling)]),
        InferInput("exclude_input_in_output", [1], "BOOL", data=[True]),
    ]
    return InferRequest(model_name=model, infer_inputs=inputs, request_id="from-kserve")


async def answers() -> dict[str, object]:
    known = headers(SERVER.any_key)
    async with InferenceGRPCClient(SERVER.grpc) as api:

        async def texts(**fields: object) -> list[str]:
            sampling = {"max_tokens": ASKED.max_tokens, "temperature": 0} | fields
            answer = await api.infer(question(SERVER.model, ASKED.prompt, sampling), headers=known)
            assert answer.id == "from-kserve"
            output = next(output for output in answer.outputs if output.name == "text_output")
            return [text.decode() for text in output.as_numpy()]

        return {
            "live": await api.is_server_live(headers=known),
            "ready": await api.is_server_ready(headers=known),
            "model_ready": await api.is_model_ready(SERVER.model, headers=known),
            "completion": (await texts())[0],
            "completion_choices": await texts(n=ASKED.n, **SEEDED),
            "completion_stopped": (await texts(stop=ASKED.stop))[0],
            "completion_seeded": (await texts(**SEEDED))[0],
        }


def ask(model: str, prompt: str, key: str) -> object:
    async def once() -> object:
        async with InferenceGRPCClient(SERVER.grpc) as api:
            return await api.infer(question(model, prompt, {"max_tokens": 1}), headers=headers(key))

    return asyncio.run(once())


def code(error: BaseException) -> list[str]:
    return [error.code().name if isinstance(error, grpc.RpcError) else repr(error)]


if __name__ == "__main__":
    logging.disable()  # it logs each refusal with a traceback, and refusals are asked for here
    report(asyncio.run(answers()) | {"refused": refusals(ask, SERVER, ASKED, told_by=code)})
