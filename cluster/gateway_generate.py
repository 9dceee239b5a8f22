"""From a checked logical request to its outputs: what every gRPC service of the gateway does alike.

A service turns its messages into a `GenerationRequest`, and this does the rest: the validator, the tokenizer, the
model's own sampling defaults, the deadline, the engine.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from vllm.outputs import RequestOutput
from vllm.renderers import BaseRenderer
from vllm.sampling_params import RequestOutputKind, SamplingParams

from cluster.gateway_run import Engine, run
from cluster.gateway_vllm import new_request_id
from cluster.validate import GenerationRequest, Limits, check, check_length, check_model
from experts.errors import DeadlineExceeded, RequestError

DEFAULT_MAX_TOKENS = 16  # as in OpenAI completions
_DEFAULTS: Mapping[str, float] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request that the engine may have."""

    request_id: str  # the client's, or made up
    prompt_token_ids: list[int]
    params: SamplingParams
    deadline: float  # on the event loop's clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Generations:
    """The way of a request to the engine; one object per gateway replica."""

    engine: Engine
    renderer: BaseRenderer
    limits: Limits
    served_name: str
    default_sampling: Mapping[str, float]  # of the model's generation_config.json
    request_timeout_s: float  # of a request that names none

    async def prepare(
        self,
        request: GenerationRequest,
        kind: RequestOutputKind,
        *,
        remaining_s: float | None = None,
        names: Mapping[str, str] | None = None,
        default_max_tokens: int | None = DEFAULT_MAX_TOKENS,
    ) -> Prepared:
        """Checks and tokenises.

        remaining_s: what the client's own deadline leaves; the smaller of it and the request's `timeout_s` counts.
        names: what the caller's surface calls a field, where it differs.
        default_max_tokens: of a request that names none; None: the rest of the context.
        Raises RequestError; DeadlineExceeded where nothing is left.
        """
        check_model(request.model, self.served_name)
        check(request, self.limits, names=names)
        timeout_s = request.timeout_s or self.request_timeout_s
        if remaining_s is not None:
            timeout_s = min(timeout_s, remaining_s)
        if timeout_s <= 0:
            raise DeadlineExceeded("the request's deadline had passed when it arrived")
        deadline = asyncio.get_running_loop().time() + timeout_s
        ids = await self._tokenise(request)
        max_tokens = request.max_tokens
        if max_tokens is None:
            left = max(1, self.limits.max_model_len - len(ids))
            max_tokens = left if default_max_tokens is None else min(default_max_tokens, left)
        check_length(len(ids), max_tokens, self.limits)
        return Prepared(
            request_id=request.request_id or new_request_id(),
            prompt_token_ids=ids,
            params=self._sampling_params(request, max_tokens, kind),
            deadline=deadline,
        )

    async def outputs(self, prepared: Prepared) -> AsyncGenerator[RequestOutput, None]:
        """The engine's outputs until the last one. Raises ServingError, DeadlineExceeded and RequestError.

        Closing the generator aborts the request in the engine.
        """
        answers = run(
            self.engine,
            prepared.prompt_token_ids,
            prepared.params,
            prepared.request_id,
            deadline=prepared.deadline,
        )
        async with aclosing(answers) as outputs:
            async for output in outputs:
                yield output

    async def _tokenise(self, request: GenerationRequest) -> list[int]:
        if request.prompt_token_ids is not None:
            return list(request.prompt_token_ids)
        # At most a few characters per token of context are let through, so this is milliseconds; off the loop still.
        tokenizer = self.renderer.get_tokenizer()
        return await asyncio.to_thread(tokenizer.encode, request.prompt or "", add_special_tokens=True)

    def _sampling_params(self, request: GenerationRequest, max_tokens: int, kind: RequestOutputKind) -> SamplingParams:
        asked = {name: getattr(request, name) for name in _DEFAULTS}
        sampling = {
            name: self.default_sampling.get(name, _DEFAULTS[name]) if value is None else value
            for name, value in asked.items()
        }
        biases = request.logit_bias
        try:
            return SamplingParams(
                **sampling,  # type: ignore[arg-type]
                n=request.n or 1,
                seed=request.seed,
                stop=list(request.stop),
                stop_token_ids=list(request.stop_token_ids),
                logit_bias=None if biases is None else {int(token): bias for token, bias in biases.items()},
                presence_penalty=request.presence_penalty or 0.0,
                frequency_penalty=request.frequency_penalty or 0.0,
                ignore_eos=bool(request.ignore_eos),
                max_tokens=max_tokens,
                min_tokens=request.min_tokens or 0,
                logprobs=request.logprobs,
                prompt_logprobs=request.prompt_logprobs,
                skip_special_tokens=request.skip_special_tokens is not False,
                include_stop_str_in_output=bool(request.include_stop_str_in_output),
                output_kind=kind,
            )
        except ValueError as error:  # combinations that only vLLM knows to be wrong
            raise RequestError(str(error)) from None
