"""Outputs of a generation on their way from an attention replica to a gateway, most of them as a few bytes.

Ray hands bytes over as they are and pickles everything else. A RequestOutput carries its whole prompt each time, and
to pickle and read it costs both ends more than the rest of a token's way between them.
"""

from typing import Any

import msgspec
from vllm.outputs import CompletionOutput, RequestOutput


class _Choice(msgspec.Struct, array_like=True):
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    finish_reason: str | None
    stop_reason: int | str | None


class _Output(msgspec.Struct, array_like=True):
    finished: bool
    choices: list[_Choice]
    num_cached_tokens: int | None
    num_cache_creation_tokens: int | None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Output)
_OF_OUTPUT = frozenset({"request_id", "prompt_token_ids", "outputs", *_Output.__struct_fields__})
_OF_CHOICE = frozenset(_Choice.__struct_fields__)


def pack(output: RequestOutput) -> bytes | RequestOutput:
    """As bytes; an output that says more than those can, such as logprobs, or a mark of dropped rows, as it is."""
    if _says_more(output, _OF_OUTPUT) or any(_says_more(choice, _OF_CHOICE) for choice in output.outputs):
        return output
    choices = [
        _Choice(
            index=choice.index,
            text=choice.text,
            token_ids=list(choice.token_ids),
            cumulative_logprob=choice.cumulative_logprob,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )
        for choice in output.outputs
    ]
    packed = _Output(
        finished=output.finished,
        choices=choices,
        num_cached_tokens=output.num_cached_tokens,
        num_cache_creation_tokens=output.num_cache_creation_tokens,
    )
    return _encoder.encode(packed)


def unpack(packed: bytes | RequestOutput, *, request_id: str, prompt_token_ids: list[int]) -> RequestOutput:
    """What was packed, of a request with this id and prompt."""
    if isinstance(packed, RequestOutput):
        return packed
    output = _decoder.decode(packed)
    return RequestOutput(
        request_id=request_id,
        prompt=None,
        prompt_token_ids=prompt_token_ids,
        prompt_logprobs=None,
        outputs=[
            CompletionOutput(
                index=choice.index,
                text=choice.text,
                token_ids=choice.token_ids,
                cumulative_logprob=choice.cumulative_logprob,
                logprobs=None,
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
            )
            for choice in output.choices
        ],
        finished=output.finished,
        num_cached_tokens=output.num_cached_tokens,
        num_cache_creation_tokens=output.num_cache_creation_tokens,
    )


def _says_more(part: Any, known: frozenset[str]) -> bool:
    return any(value is not None and name not in known for name, value in vars(part).items())
