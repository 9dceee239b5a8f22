"""One generation, from a checked request to its outputs: deadline, typed errors, and nothing left running behind."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Protocol

from cluster.metrics import GATEWAY
from cluster.request_log import RECORD
from cluster.traces import TRACEPARENT
from experts.errors import DeadlineExceeded, ServingError

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

# Reasons with which an engine ends a request that it could not finish; such an output is not an answer.
_NOT_AN_ANSWER = frozenset({"error", "abort"})


class Engine(Protocol):
    """Whatever continues prompts: the attention deployment behind its handle, or a fake in a test."""

    def generate(
        self, prompt: Mapping[str, object], params: "SamplingParams", request_id: str
    ) -> AsyncGenerator["RequestOutput", None]:
        """Yields outputs as `params.output_kind` says, the last one with `finished` set.

        prompt: `prompt_token_ids`, list of token ids; and `traceparent` of a request that is traced.
        request_id: unique among all requests in flight.
        Closing or cancelling the generator aborts the request. Raises ServingError and RequestError.
        """
        ...


async def run(
    engine: Engine, prompt_token_ids: list[int], params: "SamplingParams", request_id: str, *, deadline: float
) -> AsyncGenerator["RequestOutput", None]:
    """The engine's outputs, until the last one.

    request_id: the client's; the engine gets a unique one made from it, since clients may reuse theirs.
    deadline: on the event loop's clock, seconds.
    Raises DeadlineExceeded when it passes, ServingError when the engine stops without an answer, and what
    the engine raises. However it ends, the engine's generator is closed.
    """
    # An answer in one piece does not say when its tokens were made.
    clock = None if params.output_kind.name == "FINAL_ONLY" else GATEWAY.stream()
    record = RECORD.get()
    prompt: dict[str, object] = {"prompt_token_ids": prompt_token_ids}
    if record is not None:
        record.on_start(request_id, prompt_token_ids)
        if record.span is not None:
            prompt[TRACEPARENT] = record.span.traceparent
    outputs = engine.generate(prompt, params, f"{request_id}-{uuid.uuid4().hex[:8]}")
    try:
        finished = False
        while not finished:
            output = await _next_before(deadline, outputs)
            _refuse_unfinished(output)
            finished = output.finished
            num_tokens = sum(len(choice.token_ids) for choice in output.outputs)
            if record is not None:
                record.on_tokens(num_tokens)
            if clock is not None and num_tokens:
                clock.on_tokens()
            yield output
    finally:
        await outputs.aclose()


async def _next_before(deadline: float, outputs: AsyncGenerator["RequestOutput", None]) -> "RequestOutput":
    # One timeout per step, not one around the loop: a generator may be resumed by another task each time.
    timeout = asyncio.timeout_at(deadline)
    try:
        async with timeout:
            return await anext(outputs)
    except TimeoutError:
        if timeout.expired():
            raise DeadlineExceeded("the request's deadline passed before its answer was complete") from None
        raise
    except StopAsyncIteration:
        raise ServingError("the engine ended the answer before it was complete; try again") from None


def _refuse_unfinished(output: "RequestOutput") -> None:
    for choice in output.outputs:
        if choice.finish_reason in _NOT_AN_ANSWER:
            raise ServingError("the engine gave up this request before it was complete; try again")
