"""The service expertmesh.v1.Inference."""

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from vllm.config import ModelConfig
from vllm.logprobs import Logprob
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from cluster.drop_mark import take_mark
from cluster.gateway_generate import Generations, Prepared
from cluster.gateway_load import OpenRequests
from cluster.grpc_answer import Context, answering, remaining_s
from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc
from cluster.validate import GenerationRequest
from experts.shape import routing_of

INFERENCE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_OPTIONAL: tuple[str, ...] = tuple(
    field.name
    for field in pb.GenerateRequest.DESCRIPTOR.fields
    if field.containing_oneof is not None and field.containing_oneof.name == f"_{field.name}"  # proto3 optional
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference(pb_grpc.InferenceServicer):
    """One object per gateway replica."""

    generations: Generations
    model_info: pb.ModelInfoResponse
    load: OpenRequests

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        answer = pb.GenerateResponse()
        async with answering(context, self.load):
            prepared = await self._prepare(request, RequestOutputKind.FINAL_ONLY, context)
            async with aclosing(self.generations.outputs(prepared)) as outputs:
                async for output in outputs:
                    answer = _response(prepared.request_id, output)
        return answer

    async def GenerateStream(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateChunk]:
        num_new_tokens = 0
        async with answering(context, self.load):
            prepared = await self._prepare(request, RequestOutputKind.DELTA, context)
            async with aclosing(self.generations.outputs(prepared)) as outputs:
                async for output in outputs:
                    num_new_tokens += len(output.outputs[0].token_ids)
                    yield _chunk(prepared.request_id, output, num_new_tokens)

    async def ModelInfo(self, request: pb.ModelInfoRequest, context: Context) -> pb.ModelInfoResponse:
        return self.model_info

    async def _prepare(self, request: pb.GenerateRequest, kind: RequestOutputKind, context: Context) -> Prepared:
        return await self.generations.prepare(logical_request(request), kind, remaining_s=remaining_s(context))


def logical_request(request: pb.GenerateRequest) -> GenerationRequest:
    """A message as the validator reads it: what is absent there is None here."""
    optional = {name: getattr(request, name) if request.HasField(name) else None for name in _OPTIONAL}
    given = request.WhichOneof("input")
    return _build_request(
        prompt=request.prompt if given == "prompt" else None,
        prompt_token_ids=tuple(request.prompt_token_ids.ids) if given == "prompt_token_ids" else None,
        model=request.model or None,
        request_id=request.request_id or None,
        stop=tuple(request.stop),
        **optional,
    )


# The message's field names are the validator's, and protobuf has already checked their types.
_build_request = cast("Callable[..., GenerationRequest]", GenerationRequest)


def model_info_of(checkpoint: str, config: ModelConfig, served_name: str) -> pb.ModelInfoResponse:
    """What ModelInfo answers. Raises ConfigError for a checkpoint whose routing we do not know."""
    routing = routing_of(json.loads((Path(checkpoint) / "config.json").read_text()))
    hf = config.hf_text_config
    return pb.ModelInfoResponse(
        name=served_name,
        model_type=hf.model_type,
        dtype=str(config.dtype).removeprefix("torch."),
        max_model_len=config.max_model_len,
        vocab_size=config.get_vocab_size(),
        hidden_size=config.get_hidden_size(),
        num_layers=hf.num_hidden_layers,
        num_experts=cast("int", routing["num_experts"]),
        top_k=cast("int", routing["top_k"]),
        num_model_groups=cast("int", routing["num_model_groups"]),
        topk_group=cast("int", routing["topk_group"]),
        routing_method=str(routing["method"]),
    )


def _response(request_id: str, output: RequestOutput) -> pb.GenerateResponse:
    choice = output.outputs[0]
    return pb.GenerateResponse(
        text=choice.text,
        token_ids=choice.token_ids,
        finish_reason=choice.finish_reason or "",
        prompt_tokens=len(output.prompt_token_ids or ()),
        completion_tokens=len(choice.token_ids),
        request_id=request_id,
        logprobs=_logprobs(choice.token_ids, choice.logprobs),
        dropped_rows=take_mark(output),
    )


def _chunk(request_id: str, output: RequestOutput, num_new_tokens: int) -> pb.GenerateChunk:
    choice = output.outputs[0]
    chunk = pb.GenerateChunk(
        text=choice.text,
        token_ids=choice.token_ids,
        request_id=request_id,
        logprobs=_logprobs(choice.token_ids, choice.logprobs),
    )
    if output.finished:
        chunk.finish_reason = choice.finish_reason or ""
        chunk.prompt_tokens = len(output.prompt_token_ids or ())
        chunk.completion_tokens = num_new_tokens
        chunk.dropped_rows = take_mark(output)
    return chunk


def _logprobs(token_ids: Sequence[int], logprobs: Sequence[dict[int, Logprob] | None] | None) -> list[pb.Logprobs]:
    """One entry per new token; vLLM's dict holds the chosen token and the best ones."""
    found = []
    for token, alternatives in zip(token_ids, logprobs or (), strict=False):
        ranked = sorted((alternatives or {}).items(), key=lambda item: -item[1].logprob)
        top = [pb.TokenLogprob(token_id=other, logprob=entry.logprob) for other, entry in ranked]
        found.append(pb.Logprobs(token_id=token, logprob=alternatives[token].logprob if alternatives else 0.0, top=top))
    return found
