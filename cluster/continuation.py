"""What the caller of a generation has of it, and how another engine goes on from there: no token twice, none missing.

Another engine gets the same prompt and, where it can begin in the middle of an answer (cluster/vllm_resume.py), the
tokens that the caller has; elsewhere it computes them again. Either way its outputs begin with the answer's first
token, so that vLLM itself works out text, stop strings, penalties and counts over the whole answer; here what the
caller has is compared and taken off again. docs/adr/0005 says what is exact.
"""

import random
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from experts.errors import GroupUnavailable, ServingError

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import SamplingParams

# In SamplingParams.extra_args, which no client can set: token ids with which the answer begins.
EARLIER_TOKENS = "expertmesh_earlier_tokens"


class ReplicaLost(GroupUnavailable):
    """The attention replica that had a request is gone; another one can go on with it."""


class NotContinued(ServingError):
    """A stream has begun, its replica is lost, and another one gives other tokens than were already sent."""


class Told:
    """What the caller of one generation has been told; made anew for each request.

    params: as the caller asked. Begin each engine with `begin`, then hand all its outputs to `new_in`.
    drops_rows: the deployment may drop rows, and what a lost engine counted of them is lost with it.
    """

    def __init__(self, params: "SamplingParams", *, drops_rows: bool = False) -> None:
        self._kind = params.output_kind.name
        self._params = params
        self._drops_rows = drops_rows
        self._choices = [_Choice() for _ in range(params.n)]
        self._resumed = False
        if self._kind != "FINAL_ONLY" and not self._can_resume and params.sampling_type.name == "RANDOM":
            # Any draw is as good as another, so it may as well be one that can be computed again.
            self._params = copy(params)
            self._params.seed = random.getrandbits(32)

    @property
    def num_tokens(self) -> int:
        """Of all choices."""
        return sum(len(choice.token_ids) for choice in self._choices)

    def begin(self) -> "SamplingParams":
        """What to ask the next engine for; its outputs will begin with the answer's first token again."""
        for choice in self._choices:
            choice.begin()
        if not self.num_tokens:
            return self._params
        params = copy(self._params)
        if self._kind == "DELTA":
            params.prompt_logprobs = None  # came with the first token
        self._resumed = self._can_resume
        if self._resumed:
            params.extra_args = {**(params.extra_args or {}), EARLIER_TOKENS: list(self._choices[0].token_ids)}
        return params

    def new_in(self, output: "RequestOutput") -> "RequestOutput | None":
        """The output without what the caller has, or None where nothing else is in it. Changes `output`.

        Raises NotContinued where it contradicts what the caller has.
        """
        output.outputs = [choice for choice in output.outputs if self._take(choice)]
        output.finished = output.finished or all(choice.finished for choice in self._choices)
        return output if output.outputs or output.finished else None

    @property
    def _can_resume(self) -> bool:
        """Whether an engine may begin in the middle; another answer is computed again from its first token.

        A grammar and a thinking budget have a state in the engine that is not rebuilt, n > 1 is several answers, and
        an engine repeats earlier tokens without their log-probabilities.
        """
        params = self._params
        has_state = params.structured_outputs is not None or params.thinking_token_budget is not None
        needs_all_logprobs = self._kind == "CUMULATIVE" and params.logprobs is not None
        return params.n == 1 and not has_state and not needs_all_logprobs

    def _take(self, choice: "CompletionOutput") -> bool:
        known = self._choices[choice.index]
        if known.finished:
            return False
        is_new = known.take_whole(choice) if self._kind == "CUMULATIVE" else known.take(choice)
        known.finished = choice.finish_reason is not None
        if known.finished and self._resumed and self._drops_rows:
            # Nobody knows how many rows it were, but the answer must not look as if there had been none.
            so_far = [] if choice.routed_experts is None else choice.routed_experts
            choice.routed_experts = np.append(so_far, 1).astype(np.int64)
        return is_new or known.finished


@dataclass(slots=True)
class _Choice:
    """One of the n answers."""

    token_ids: list[int] = field(default_factory=list[int])
    num_chars: int = 0
    logprob: float = 0.0  # of the tokens together, where the caller asked for log-probabilities
    finished: bool = False
    engine_tokens: int = 0  # how far the engine at work has come; behind the caller where it began again
    engine_chars: int = 0

    def begin(self) -> None:
        self.engine_tokens = self.engine_chars = 0

    def take(self, choice: "CompletionOutput") -> bool:
        """Takes what the caller has off a delta; True if there is more in it."""
        known_tokens = min(len(self.token_ids) - self.engine_tokens, len(choice.token_ids))
        known_chars = min(self.num_chars - self.engine_chars, len(choice.text))
        began = self.engine_tokens
        self.engine_tokens += len(choice.token_ids)
        self.engine_chars += len(choice.text)
        if known_tokens:
            _check_same(self.token_ids[began : began + known_tokens], choice.token_ids[:known_tokens])
            choice.token_ids = choice.token_ids[known_tokens:]
            if choice.logprobs is not None:
                choice.logprobs = choice.logprobs[known_tokens:]
        choice.text = choice.text[known_chars:]
        self.token_ids.extend(choice.token_ids)
        self.num_chars += len(choice.text)
        if choice.logprobs is not None:
            for token, entries in zip(choice.token_ids, choice.logprobs, strict=False):
                self.logprob += entries[token].logprob if entries is not None else 0.0
            choice.cumulative_logprob = self.logprob
        return bool(choice.token_ids or choice.text)

    def take_whole(self, choice: "CompletionOutput") -> bool:
        """The same for an output that holds the whole answer so far: it is new where it is longer."""
        _check_same(self.token_ids[: len(choice.token_ids)], choice.token_ids[: len(self.token_ids)])
        is_longer = len(choice.token_ids) > len(self.token_ids)
        if is_longer:
            self.token_ids = list(choice.token_ids)
        return is_longer


def _check_same(told: "list[int]", found: object) -> None:
    if told != list(found):  # type: ignore[call-overload]
        raise NotContinued(
            "another attention replica computed other tokens than were already sent for this request; try again"
        )
