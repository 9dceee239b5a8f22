# type: ignore  (the packages are of another environment: here there is none of them, or another version)
"""tritonclient: unary calls, several requests on one stream, errors on a stream, and a stream that is cancelled."""

import json
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from asking import NO_MODEL, Asked, Server, refusals, report
from tritonclient.grpc import InferenceServerClient, InferInput, InferResult
from tritonclient.utils import InferenceServerException

SERVER, ASKED = Server.from_environment(), Asked.read()
SEEDED = {"temperature": ASKED.temperature, "seed": ASKED.seed}
PATIENCE_S = 60.0
LONG = 400  # tokens of the answer that is cancelled after MESSAGES of its messages
MESSAGES = 3


def headers(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def tensors(prompt: str, sampling: dict[str, object], **flags: bool) -> list[InferInput]:
    greedy = {"max_tokens": ASKED.max_tokens, "temperature": 0}
    texts = {"text_input": prompt, "sampling_parameters": json.dumps(greedy | sampling)}
    found = []
    for name, text in texts.items():
        tensor = InferInput(name, [1], "BYTES")
        found.append(tensor.set_data_from_numpy(np.array([text.encode()], dtype=np.object_)))
    for name, flag in flags.items():
        tensor = InferInput(name, [1], "BOOL")
        found.append(tensor.set_data_from_numpy(np.array([flag])))
    return found


def told(result: InferResult) -> list[str]:
    return [text.decode() for text in result.as_numpy("text_output")]


def about(api: InferenceServerClient, known: dict[str, str]) -> dict[str, object]:
    metadata = api.get_model_metadata(SERVER.model, headers=known)
    config = api.get_model_config(SERVER.model, headers=known).config
    index = api.get_model_repository_index(headers=known)
    return {
        "live": api.is_server_live(headers=known),
        "ready": api.is_server_ready(headers=known),
        "model_ready": api.is_model_ready(SERVER.model, headers=known),
        "models": [model.name for model in index.models],
        "inputs": sorted(tensor.name for tensor in metadata.inputs),
        "decoupled": config.model_transaction_policy.decoupled,
    }


def unary(api: InferenceServerClient, known: dict[str, str]) -> dict[str, object]:
    def ask(sampling: dict[str, object], **flags: bool) -> InferResult:
        flags = {"exclude_input_in_output": True} | flags
        return api.infer(SERVER.model, tensors(ASKED.prompt, sampling, **flags), headers=known)

    whole = ask({}, exclude_input_in_output=False, return_finish_reason=True, return_num_output_tokens=True)
    as_words = {"max_tokens": str(ASKED.max_tokens), "temperature": "0"}  # how Triton's own examples write numbers
    (logprobs,) = ask({"logprobs": 1}, return_logprobs=True).as_numpy("logprobs")
    chosen = [next(token for token in step.values() if token["rank"] == 1) for step in json.loads(logprobs)]
    return {
        "completion": told(ask({}))[0],
        "completion_as_words": told(ask(as_words))[0],
        "completion_choices": told(ask({"n": ASKED.n} | SEEDED)),
        "completion_stopped": told(ask({"stop": ASKED.stop}))[0],
        "completion_seeded": told(ask(SEEDED))[0],
        "completion_logprobs": [token["logprob"] for token in chosen],
        "with_prompt": told(whole)[0],
        "finish_reason": whole.as_numpy("finish_reason")[0].decode(),
        "num_output_tokens": int(whole.as_numpy("num_output_tokens")[0]),
    }


Message = tuple[InferResult | None, InferenceServerException | None]


@contextmanager
def stream(api: InferenceServerClient, known: dict[str, str]) -> Iterator["queue.Queue[Message]"]:
    """What comes back on one stream; when the block ends, the stream is finished in peace."""
    messages: queue.Queue[Message] = queue.Queue()
    api.start_stream(lambda result, error: messages.put((result, error)), headers=known)
    try:
        yield messages
    finally:
        api.stop_stream()


def put(api: InferenceServerClient, request_id: str, model: str = SERVER.model, **sampling: object) -> None:
    inputs = tensors(ASKED.prompt, sampling, stream=True)
    api.async_stream_infer(model, inputs, request_id=request_id, enable_empty_final_response=True)


def received(messages: "queue.Queue[Message]", request_ids: set[str]) -> dict[str, str]:
    """request id -> its text, once every one of them has had its last message."""
    texts, open_ids = dict.fromkeys(request_ids, ""), set(request_ids)
    while open_ids:
        result, error = messages.get(timeout=PATIENCE_S)
        if error is not None:
            raise error
        message = result.get_response()
        texts[message.id] += "".join(told(result)) if message.outputs else ""
        if message.parameters["triton_final_response"].bool_param:
            open_ids.remove(message.id)
    return texts


def streamed(api: InferenceServerClient, known: dict[str, str]) -> dict[str, object]:
    with stream(api, known) as messages:
        put(api, "greedy")
        put(api, "seeded", **SEEDED)
        side_by_side = received(messages, {"greedy", "seeded"})
        put(api, "refused", NO_MODEL)
        _, error = messages.get(timeout=PATIENCE_S)
        put(api, "after")
        after = received(messages, {"after"})
    return {
        "streamed_completion": side_by_side["greedy"],
        "streamed_seeded": side_by_side["seeded"],
        "error_on_stream": "" if error is None else error.message(),
        "after_error": after["after"],
    }


def cancelled(api: InferenceServerClient, known: dict[str, str]) -> dict[str, object]:
    """A stream that is cancelled in the middle, and that the next one works."""
    messages: queue.Queue[Message] = queue.Queue()
    api.start_stream(lambda result, error: messages.put((result, error)), headers=known)
    put(api, "long", max_tokens=LONG, ignore_eos=True)
    for _ in range(MESSAGES):
        _, error = messages.get(timeout=PATIENCE_S)
        assert error is None, error
    began = time.monotonic()
    api.stop_stream(cancel_requests=True)
    took_s = time.monotonic() - began
    rest = [messages.get_nowait() for _ in range(messages.qsize())]
    with stream(api, known) as messages:
        put(api, "next")
        following = received(messages, {"next"})
    statuses = [error.status() for _, error in rest if error is not None]
    return {"cancelled": statuses, "cancel_took_s": took_s, "after_cancel": following["next"]}


def ask(model: str, prompt: str, key: str) -> object:
    with InferenceServerClient(SERVER.grpc) as api:
        return api.infer(model, tensors(prompt, {"max_tokens": 1}), headers=headers(key))


def code(error: BaseException) -> list[str]:
    return [
        str(error.status()).removeprefix("StatusCode.") if isinstance(error, InferenceServerException) else repr(error)
    ]


if __name__ == "__main__":
    known = headers(SERVER.any_key)
    with InferenceServerClient(SERVER.grpc) as api:
        found = about(api, known) | unary(api, known) | streamed(api, known) | cancelled(api, known)
    report(found | {"refused": refusals(ask, SERVER, ASKED, told_by=code)})
