"""The gRPC methods of expertmesh.v1.Inference and grpc.health.v1.Health, without a server.

Serve's gRPC proxy calls them by name. What it does to errors shapes this file: a unary method sets code and details
and returns an empty message (raising would lose the trailers); a stream sets them and raises (returning would look
like success).
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from vllm.config import ModelConfig
from vllm.logprobs import Logprob
from vllm.outputs import RequestOutput
from vllm.renderers import BaseRenderer
from vllm.sampling_params import RequestOutputKind, SamplingParams

from cluster.drop_mark import take_mark
from cluster.gateway_errors import Refusal, RefusedStream, refusal_of
from cluster.gateway_health import Health, serving_status
from cluster.gateway_run import Engine, run
from cluster.gateway_vllm import new_request_id
from cluster.metrics import GATEWAY
from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.validate import GenerationRequest, Limits, check, check_length, check_model
from experts.errors import RequestError
from experts.shape import routing_of

INFERENCE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_DEFAULT_MAX_TOKENS = 16  # as in OpenAI completions
_OPTIONAL: tuple[str, ...] = tuple(
    field.name
    for field in pb.GenerateRequest.DESCRIPTOR.fields
    if field.containing_oneof is not None and field.containing_oneof.name == f"_{field.name}"  # proto3 optional
)
_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class GrpcContext(Protocol):
    """What we use of Serve's gRPC context."""

    def set_code(self, code: grpc.StatusCode) -> None: ...
    def set_details(self, details: str) -> None: ...
    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str]]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rpc:
    """The methods, over an engine; one object per gateway replica."""

    engine: Engine
    renderer: BaseRenderer
    health: Health
    limits: Limits
    model_info: pb.ModelInfoResponse
    default_sampling: dict[str, object]  # of the model's generation_config.json
    request_timeout_s: float

    async def generate(self, request: pb.GenerateRequest, context: GrpcContext) -> pb.GenerateResponse:
        answer = pb.GenerateResponse()
        with GATEWAY.request("grpc") as counted:
            try:
                async with aclosing(self._run(request, RequestOutputKind.FINAL_ONLY)) as outputs:
                    async for request_id, output in outputs:
                        answer = _response(request_id, output)
            except Exception as exc:
                refusal = refusal_of(exc)
                counted.outcome = refusal.outcome
                _tell(context, refusal)
                if refusal.retry_after_s is not None:
                    context.set_trailing_metadata([("retry-after", str(refusal.retry_after_s))])
                return pb.GenerateResponse()
        return answer

    async def generate_stream(
        self, request: pb.GenerateRequest, context: GrpcContext
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        num_new_tokens = 0
        with GATEWAY.request("grpc") as counted:
            try:
                async with aclosing(self._run(request, RequestOutputKind.DELTA)) as outputs:
                    async for request_id, output in outputs:
                        num_new_tokens += len(output.outputs[0].token_ids)
                        yield _chunk(request_id, output, num_new_tokens)
            except Exception as exc:
                refusal = refusal_of(exc)
                counted.outcome = refusal.outcome
                _tell(context, refusal)
                raise RefusedStream from None

    async def _run(
        self, request: pb.GenerateRequest, kind: RequestOutputKind
    ) -> AsyncGenerator[tuple[str, RequestOutput], None]:
        """Checks, tokenises and runs one request; yields the client's request id with each output."""
        logical = logical_request(request)
        check_model(logical.model, self.model_info.name)
        check(logical, self.limits)
        deadline = asyncio.get_running_loop().time() + (logical.timeout_s or self.request_timeout_s)
        max_tokens = logical.max_tokens or _DEFAULT_MAX_TOKENS
        ids = await self._tokenise(logical)
        if logical.max_tokens is None:
            max_tokens = max(1, min(max_tokens, self.limits.max_model_len - len(ids)))
        check_length(len(ids), max_tokens, self.limits)
        params = self._sampling_params(logical, max_tokens, kind)
        request_id = logical.request_id or new_request_id()
        async with aclosing(run(self.engine, ids, params, request_id, deadline=deadline)) as outputs:
            async for output in outputs:
                yield request_id, output

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
        try:
            return SamplingParams(
                **sampling,  # type: ignore[arg-type]
                seed=request.seed,
                stop=list(request.stop),
                presence_penalty=request.presence_penalty or 0.0,
                frequency_penalty=request.frequency_penalty or 0.0,
                ignore_eos=bool(request.ignore_eos),
                max_tokens=max_tokens,
                min_tokens=request.min_tokens or 0,
                logprobs=request.logprobs,
                output_kind=kind,
            )
        except ValueError as error:  # combinations that only vLLM knows to be wrong
            raise RequestError(str(error)) from None

    async def check(self, service: str, context: GrpcContext) -> health_pb2.HealthCheckResponse:
        """grpc.health.v1 Check: "" is this process, the service's name the cluster behind it."""
        status = await self._status_of(service)
        if status is None:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details(f"service: there is no {service[:64]!r} here; {INFERENCE!r} is")
            return health_pb2.HealthCheckResponse()
        return health_pb2.HealthCheckResponse(status=status)

    async def list(self) -> Message:
        """grpc.health.v1 List: every service that Check knows."""
        statuses = {service: await self.check(service, _NoContext()) for service in ("", INFERENCE)}
        # The package's type stub is older than its List.
        return health_pb2.HealthListResponse(statuses=statuses)  # pyright: ignore[reportAttributeAccessIssue]

    async def watch(self, service: str, *, every_s: float = 1.0) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """grpc.health.v1 Watch: the status now, and each time it changes, until the client goes."""
        before: str | None = None
        while True:
            status = await self._status_of(service) or "SERVICE_UNKNOWN"
            if status != before:
                yield health_pb2.HealthCheckResponse(status=status)
            before = status
            await asyncio.sleep(every_s)

    async def _status_of(self, service: str) -> str | None:
        if service == "":
            return "SERVING"
        return await serving_status(self.health) if service == INFERENCE else None


def logical_request(request: pb.GenerateRequest) -> GenerationRequest:
    """A gRPC message as the validator reads it: what is absent there is None here."""
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


class _NoContext:
    def set_code(self, code: grpc.StatusCode) -> None: ...
    def set_details(self, details: str) -> None: ...
    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str]]) -> None: ...


def _tell(context: GrpcContext, refusal: Refusal) -> None:
    context.set_code(refusal.grpc_code)
    seconds = refusal.retry_after_s
    context.set_details(refusal.message if seconds is None else f"{refusal.message} (retry after {seconds} s)")


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
