"""Messages of vllm.grpc.engine: a GenerateRequest as the validator reads it, and outputs as GenerateResponses.

Who calls this service is a gateway that tokenises, applies chat templates and the model's own sampling defaults, and
makes text of token ids: it wants ids back, and means what it sends.
Knows protobuf, and neither gRPC nor, at run time, vLLM.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from google.protobuf.message import Message
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from cluster.validate import GenerationRequest
from experts.errors import RequestError

if TYPE_CHECKING:
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import SamplingParams

# What is not listed here is refused by name where it is set, also what a later version of the protos adds.
_HONOURED = frozenset({"request_id", "tokenized", "text", "sampling_params", "stream", "data_parallel_rank"})
_HONOURED_SAMPLING = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "max_tokens",
        "min_tokens",
        "stop",
        "stop_token_ids",
        "skip_special_tokens",
        "spaces_between_special_tokens",  # of a text that is not sent
        "ignore_eos",
        "n",
        "logprobs",
        "prompt_logprobs",
        "seed",
        "include_stop_str_in_output",
        "logit_bias",
        "grammar_from_first_token",  # says nothing without a constraint, and those are refused
    }
)


def logical_request(request: pb.GenerateRequest) -> GenerationRequest:
    """A message as the validator reads it. A number that has no presence in the message is unset where it is 0.

    Raises RequestError, naming the field, for whatever would have an effect elsewhere and has none here.
    """
    params = request.sampling_params
    _refuse_others(request, _HONOURED)
    _refuse_others(params, _HONOURED_SAMPLING)
    if request.data_parallel_rank != 0:
        raise RequestError(
            f"data_parallel_rank must be 0 or unset, since there is one rank, and is {request.data_parallel_rank}",
            field="data_parallel_rank",
        )
    given = request.WhichOneof("input")
    if given is None:
        raise RequestError("give the prompt as tokenized.input_ids or as text", field="tokenized")
    # What is unset is 1.0 or off and not the model's own default: that the caller has from GetModelInfo.
    return GenerationRequest(
        prompt=request.text if given == "text" else None,
        prompt_token_ids=tuple(request.tokenized.input_ids) if given == "tokenized" else None,
        request_id=request.request_id or None,
        max_tokens=params.max_tokens if params.HasField("max_tokens") else None,
        min_tokens=params.min_tokens,
        temperature=params.temperature if params.HasField("temperature") else 1.0,
        top_p=params.top_p or 1.0,
        top_k=params.top_k,
        min_p=params.min_p,
        n=params.n or None,
        seed=params.seed if params.HasField("seed") else None,
        stop=tuple(params.stop),
        stop_token_ids=tuple(params.stop_token_ids),
        logit_bias={str(token): bias for token, bias in params.logit_bias.items()} or None,
        logprobs=params.logprobs if params.HasField("logprobs") else None,
        prompt_logprobs=params.prompt_logprobs if params.HasField("prompt_logprobs") else None,
        repetition_penalty=params.repetition_penalty or 1.0,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        ignore_eos=params.ignore_eos,
        skip_special_tokens=params.skip_special_tokens,
        include_stop_str_in_output=params.include_stop_str_in_output,
    )


def _refuse_others(message: Message, honoured: frozenset[str]) -> None:
    for descriptor, _ in message.ListFields():
        if descriptor.name not in honoured:
            raise RequestError(f"{descriptor.name} is not supported here; leave it unset", field=descriptor.name)


@dataclass(slots=True, kw_only=True)
class Answers:
    """Makes the messages of one request of its outputs; made anew for each request.

    stream: the outputs are deltas, and each becomes a chunk; otherwise there is one output, with everything.
    Either way every choice ends with one `complete`. The caller adds up what is in the chunks, so that counts are
    of the message itself; the `complete` of a stream repeats the choice's last delta.
    """

    stream: bool
    prompt_token_ids: Sequence[int]
    params: "SamplingParams"
    _begun: set[int] = field(default_factory=set[int], init=False)  # choices that have their first chunk
    _ended: set[int] = field(default_factory=set[int], init=False)  # choices that have their `complete`

    def of(self, output: "RequestOutput") -> Iterator[pb.GenerateResponse]:
        """The messages of one output of the engine."""
        for choice in output.outputs:
            if self.stream:
                yield pb.GenerateResponse(chunk=self._chunk(output, choice))
            if choice.finish_reason is not None:
                self._ended.add(choice.index)
                yield pb.GenerateResponse(complete=self._complete(output, choice))

    def aborted(self) -> Iterator[pb.GenerateResponse]:
        """The end of every choice that has none, since the request was aborted; what it had is in its chunks."""
        for index in range(self.params.n):
            if index not in self._ended:
                end = pb.GenerateComplete(finish_reason="abort", prompt_tokens=len(self.prompt_token_ids), index=index)
                yield pb.GenerateResponse(complete=end)

    def _chunk(self, output: "RequestOutput", choice: "CompletionOutput") -> pb.GenerateStreamChunk:
        is_first = choice.index not in self._begun
        self._begun.add(choice.index)
        return pb.GenerateStreamChunk(
            token_ids=choice.token_ids,
            prompt_tokens=len(self.prompt_token_ids),
            completion_tokens=len(choice.token_ids),
            cached_tokens=output.num_cached_tokens or 0,
            output_logprobs=_output_logprobs(choice, self.params.logprobs),
            input_logprobs=self._input_logprobs(output) if is_first else None,
            index=choice.index,
        )

    def _complete(self, output: "RequestOutput", choice: "CompletionOutput") -> pb.GenerateComplete:
        complete = pb.GenerateComplete(
            output_ids=choice.token_ids,
            finish_reason=choice.finish_reason,
            prompt_tokens=len(self.prompt_token_ids),
            completion_tokens=len(choice.token_ids),
            cached_tokens=output.num_cached_tokens or 0,
            output_logprobs=_output_logprobs(choice, self.params.logprobs),
            input_logprobs=None if self.stream else self._input_logprobs(output),
            index=choice.index,
        )
        if isinstance(choice.stop_reason, int):
            complete.matched_token_id = choice.stop_reason
        elif choice.stop_reason is not None:
            complete.matched_stop_str = choice.stop_reason
        return complete

    def _input_logprobs(self, output: "RequestOutput") -> pb.InputLogProbs | None:
        if not output.prompt_logprobs:
            return None
        found = pb.InputLogProbs()
        for token, entries in zip(self.prompt_token_ids, output.prompt_logprobs, strict=False):
            found.token_ids.append(token)
            own = (entries or {}).get(token)  # nothing comes before the first token that could predict it
            found.token_logprobs.append(pb.InputTokenLogProb(value=None if own is None else own.logprob))
            if self.params.prompt_logprobs:
                found.top_logprobs.append(_best(entries or {}, self.params.prompt_logprobs))
        return found


def _output_logprobs(choice: "CompletionOutput", num_best: int | None) -> pb.OutputLogProbs | None:
    """Parallel lists, one entry per new token whose log-probability is known."""
    if num_best is None or not choice.logprobs:
        return None
    found = pb.OutputLogProbs()
    for token, entries in zip(choice.token_ids, choice.logprobs, strict=False):
        if entries is None:
            continue  # of a token that the engine was given and did not choose
        found.token_ids.append(token)
        found.token_logprobs.append(entries[token].logprob)
        if num_best:
            found.top_logprobs.append(_best(entries, num_best))
    return found


def _best(entries: "Mapping[int, Logprob]", num_best: int) -> pb.TopLogProbs:
    """The likeliest tokens, the likeliest first; vLLM's dict also holds the chosen one, however unlikely."""
    ranked = sorted(entries.items(), key=lambda item: -item[1].logprob)[:num_best]
    return pb.TopLogProbs(token_ids=[token for token, _ in ranked], values=[entry.logprob for _, entry in ranked])
