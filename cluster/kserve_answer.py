"""An answer in KServe v2's tensors: one message of a stream after the other, or all in one.

Pure, as cluster/kserve_tensors.py, which declares the tensors.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from cluster.kserve_request import Asked

_LEAST_LOGPROB = -9999.0  # JSON has no minus infinity; vLLM's OpenAI server writes the same


class OutputTensor(NamedTuple):
    """One tensor of an answer."""

    name: str
    datatype: str
    num_elements: int
    raw: bytes


class TokenLogprob(Protocol):
    """vLLM's Logprob."""

    @property
    def logprob(self) -> float: ...
    @property
    def rank(self) -> int | None: ...
    @property
    def decoded_token(self) -> str | None: ...


class Completion(Protocol):
    """vLLM's CompletionOutput: what is new in one choice."""

    @property
    def index(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def cumulative_logprob(self) -> float | None: ...
    @property
    def logprobs(self) -> Sequence[Mapping[int, TokenLogprob] | None] | None: ...
    @property
    def finish_reason(self) -> str | None: ...


@dataclass(slots=True)
class _Choice:
    """One choice: how it stands, and what of it no message has told yet."""

    text: str = ""
    num_tokens: int = 0
    logprobs: list[Mapping[int, TokenLogprob] | None] = field(default_factory=list)
    cumulative_logprob: float = math.nan
    finish_reason: str | None = None

    def take(self, new: Completion) -> None:
        self.text += new.text
        self.num_tokens += len(new.token_ids)
        self.logprobs += new.logprobs or ()
        if new.cumulative_logprob is not None:
            self.cumulative_logprob = new.cumulative_logprob
        self.finish_reason = new.finish_reason

    def forget_told(self) -> None:
        self.text, self.num_tokens, self.logprobs = "", 0, []


class Answer:
    """One request's answer on its way: takes what the engine says, gives the tensors of one message after the other.

    Every message has an element for each choice, since clients know choices by their place: a choice without
    anything new has an empty text, no tokens, and the finish reason that it had.
    """

    def __init__(self, asked: Asked, *, num_choices: int, num_prompt_tokens: int) -> None:
        self._outputs = asked.outputs
        self._tells_logprobs = asked.tells_logprobs
        self._num_prompt_tokens = num_prompt_tokens
        self._choices = [_Choice(text=asked.prompt) for _ in range(num_choices)]  # the prompt comes first, if at all

    def take(self, completions: Iterable[Completion]) -> None:
        for completion in completions:
            self._choices[completion.index].take(completion)

    def tensors(self) -> list[OutputTensor]:
        """What was taken since the last call."""
        tensors = [self._tensor(name) for name in self._outputs]
        for choice in self._choices:
            choice.forget_told()
        return tensors

    def _tensor(self, name: str) -> OutputTensor:
        choices = self._choices
        match name:
            case "text_output":
                return _bytes_tensor(name, [choice.text for choice in choices])
            case "finish_reason":
                return _bytes_tensor(name, [str(choice.finish_reason) for choice in choices])
            case "logprobs":
                return _bytes_tensor(name, [self._logprobs(choice) for choice in choices])
            case "cumulative_logprob":
                return _packed(name, "FP32", "f", [choice.cumulative_logprob for choice in choices])
            case "num_input_tokens":
                return _packed(name, "UINT32", "I", [self._num_prompt_tokens])
            case _:
                assert name == "num_output_tokens"
                return _packed(name, "UINT32", "I", [choice.num_tokens for choice in choices])

    def _logprobs(self, choice: _Choice) -> str:
        if not self._tells_logprobs:
            return "null"
        return json.dumps(
            [{token: _told(entry) for token, entry in (entries or {}).items()} for entries in choice.logprobs]
        )


def _told(entry: TokenLogprob) -> dict[str, float | int | str | None]:
    logprob = entry.logprob if entry.logprob > _LEAST_LOGPROB else _LEAST_LOGPROB
    return {"logprob": logprob, "rank": entry.rank, "decoded_token": entry.decoded_token}


def _bytes_tensor(name: str, texts: Sequence[str]) -> OutputTensor:
    elements = [text.encode() for text in texts]
    raw = b"".join(struct.pack("<I", len(element)) + element for element in elements)
    return OutputTensor(name, "BYTES", len(elements), raw)


def _packed(name: str, datatype: str, letter: str, values: Sequence[float]) -> OutputTensor:
    return OutputTensor(name, datatype, len(values), struct.pack(f"<{len(values)}{letter}", *values))
