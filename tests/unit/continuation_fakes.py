"""Attention replicas without Ray and without a model: vLLM's own output processor over a function of tokens."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tokenizers import get_tokenizer
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.outputs import LogprobsLists

from cluster.continuation import ReplicaLost
from cluster.vllm_resume import earlier_tokens, put_before
from deploy.config import EMBEDDED

TOKENIZER = get_tokenizer(str(EMBEDDED))
PROMPT = [40, 41, 42]

# From prompt and answer so far, and the noise of this draw, the next token.
Model = Callable[[Sequence[int], int], int]


def babble(tokens: Sequence[int], noise: int) -> int:
    """Bytes of characters that take two, three and four of them, and a few words, in any order."""
    pool = TOKENIZER.encode("a Grüße 🎉 日本語 the end.", add_special_tokens=False)
    return random.Random(f"{list(tokens)}{noise}").choice(pool)


def says(text: str) -> Model:
    """Always the same text, as long as it is given its own words."""
    script = TOKENIZER.encode(text, add_special_tokens=False)

    def model(tokens: Sequence[int], noise: int) -> int:
        answer = list(tokens[len(PROMPT) :])
        assert answer == script[: len(answer)]
        return script[len(answer)]

    return model


@dataclass(kw_only=True)
class Replicas:
    """An engine (`gateway_run.Engine`) that dies after so many outputs, each time again; then it lives.

    lives: outputs until each of its deaths. resumes: takes up earlier tokens, as cluster/vllm_resume.py makes vLLM do.
    between: what a call after the first raises, in turn, before it would answer; None is no error.
    """

    model: Model = babble
    lives: list[int] = field(default_factory=list)
    resumes: bool = True
    between: list[Exception | None] = field(default_factory=list)
    asked: list[tuple[str, SamplingParams]] = field(default_factory=list)
    open: int = 0

    async def generate(
        self, prompt: Mapping[str, object], params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        self.asked.append((request_id, params))
        self.open += 1
        try:
            if len(self.asked) > 1 and self.between and (error := self.between.pop(0)) is not None:
                raise error
            life = self.lives.pop(0) if self.lives else None
            step = 0
            for step, output in enumerate(
                self._outputs(cast("list[int]", prompt["prompt_token_ids"]), params, request_id)
            ):
                await asyncio.sleep(0)
                if step == life:
                    raise ReplicaLost("this replica is dead")
                if output is not None:
                    yield output
        finally:
            self.open -= 1

    def _outputs(self, prompt: list[int], params: SamplingParams, request_id: str) -> Iterator[RequestOutput | None]:
        """Step by step; None for a step that has no output."""
        processor = OutputProcessor(TOKENIZER, log_stats=False)
        parent = ParentRequest(_request("r", prompt, params, request_id))
        running: dict[str, _Answer] = {}
        for index in range(params.n):
            name, own = parent.get_child_info(index) if params.n > 1 else ("r", params)
            request = _request(name, prompt, own, request_id)
            processor.add_request(request, None, parent if params.n > 1 else None, index)
            earlier = earlier_tokens(own) if self.resumes else []
            running[name] = _Answer(self.model, prompt, own, earlier)
        while processor.has_unfinished_requests():
            made = processor.process_outputs([running[name].step(name) for name in list(processor.request_states)])
            yield from cast("list[RequestOutput]", made.request_outputs) or [None]


class _Answer:
    """The engine's half of one choice."""

    def __init__(self, model: Model, prompt: list[int], params: SamplingParams, earlier: list[int]) -> None:
        self._model, self._prompt, self._params, self._to_repeat = model, prompt, params, earlier
        self.tokens = list(earlier)

    def step(self, name: str) -> EngineCoreOutput:
        noise = 0 if self._params.temperature == 0 else self._draw()
        assert len(self.tokens) < (self._params.max_tokens or 0)
        token = self._model([*self._prompt, *self.tokens], noise)
        self.tokens.append(token)
        output = EngineCoreOutput(request_id=name, new_token_ids=[token])
        if self._params.logprobs is not None:
            logprob = -(len(self.tokens) % 7) / 8 - 0.1
            output.new_logprobs = LogprobsLists(
                np.array([[token, 5]]), np.array([[logprob, -9.0]]), np.array([1]), None
            )
        if token in (self._params.stop_token_ids or ()) and len(self.tokens) >= self._params.min_tokens:
            output.finish_reason, output.stop_reason = FinishReason.STOP, token
        elif len(self.tokens) == self._params.max_tokens:
            output.finish_reason = FinishReason.LENGTH
        if output.finish_reason is not None:
            output.routed_experts = np.array([3])
        if self._to_repeat:
            put_before(output, self._to_repeat)
            self._to_repeat = []
        return output

    def _draw(self) -> int:
        """A seed gives the same noise at the same place of the answer."""
        if self._params.seed is None:
            return random.getrandbits(32)
        return random.Random(f"{self._params.seed}/{len(self.tokens)}").getrandbits(32)


@dataclass(kw_only=True)
class Heard:
    """A whole answer, put together from what a caller was given."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: Sequence[object] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    dropped_rows: int = 0


async def listen(outputs: AsyncGenerator[RequestOutput, None], params: SamplingParams) -> list[Heard]:
    """The n answers; checks that nothing comes behind an end, and that ids and prompt stay what they were."""
    answers = [Heard() for _ in range(params.n)]
    finished = False
    async for output in outputs:
        assert not finished
        assert (output.request_id, output.prompt_token_ids) == ("mine", PROMPT)
        finished = output.finished
        for choice in output.outputs:
            heard = answers[choice.index]
            assert heard.finish_reason is None
            whole = params.output_kind is not RequestOutputKind.DELTA
            assert not whole or len(choice.token_ids) > len(heard.tokens)
            heard.text = choice.text if whole else heard.text + choice.text
            heard.tokens = list(choice.token_ids) if whole else [*heard.tokens, *choice.token_ids]
            rows = choice.logprobs or ()
            heard.logprobs = [*rows] if whole else [*heard.logprobs, *rows]
            heard.finish_reason, heard.stop_reason = choice.finish_reason, choice.stop_reason
            heard.cumulative_logprob = choice.cumulative_logprob
            if choice.routed_experts is not None:
                heard.dropped_rows += int(choice.routed_experts.sum())
    assert finished
    return answers


def _request(name: str, prompt: list[int], params: SamplingParams, request_id: str) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id=request_id,
    )
