"""The service inference.GRPCInferenceService: KServe v2 with Triton's additions, for one text-generation model.

Tensors are those of Triton's vLLM backend (cluster/kserve_tensors.py), so that its clients need another address only.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from types import ModuleType
from typing import Protocol, cast

from google.protobuf.message import Message
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from vllm.sampling_params import RequestOutputKind

from cluster.drop_mark import take_mark
from cluster.gateway_errors import NoSuchRoute
from cluster.gateway_generate import Generations
from cluster.gateway_health import Health, serving_status
from cluster.gateway_load import OpenRequests
from cluster.grpc_answer import Context, abort_with, answering, remaining_s
from cluster.grpc_kserve_stream import InferStream
from cluster.kserve_answer import Answer, OutputTensor
from cluster.kserve_request import read_request
from cluster.kserve_statistics import Durations, Statistics
from cluster.kserve_tensors import INPUTS, OUTPUTS, InferRequest, refuse
from cluster.validate import UnknownModel, check_model
from experts.errors import RequestError, ServingError

# Messages are made at run time, so a type checker cannot see them; those that we read are protocols.
pb = cast("ModuleType", service_pb2)
config_pb = cast("ModuleType", model_config_pb2)

KSERVE: str = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
VERSION = "1"  # of the only model
EXTENSIONS = ("model_configuration", "statistics", "model_repository")
_NAMES = {"prompt": "text_input", "request_id": "id", "timeout_s": "timeout"}
_CONFIG_TYPES = {"BYTES": "TYPE_STRING", "BOOL": "TYPE_BOOL", "FP32": "TYPE_FP32", "UINT32": "TYPE_UINT32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The one model, and who serves it."""

    name: str
    max_model_len: int
    server_version: str  # of expertmesh


class ModelQuery(Protocol):
    """A request that names a model."""

    name: str
    version: str


class IndexQuery(Protocol):
    """RepositoryIndexRequest."""

    repository_name: str
    ready: bool  # only models that are


def _not_offered(what: str) -> Callable[..., Awaitable[Message]]:
    async def refuse_call(self: "KServe", request: Message, context: Context) -> Message:
        return await abort_with(context, NoSuchRoute(f"{what} is not offered here"))

    return refuse_call


@dataclass(frozen=True, slots=True, kw_only=True)
class KServe(service_pb2_grpc.GRPCInferenceServiceServicer):
    """One object per gateway replica."""

    generations: Generations
    health: Health
    load: OpenRequests
    model: ServedModel
    statistics: Statistics = field(default_factory=Statistics)

    async def ServerLive(self, request: Message, context: Context) -> Message:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Message, context: Context) -> Message:
        return pb.ServerReadyResponse(ready=await self._is_ready())

    async def ModelReady(self, request: ModelQuery, context: Context) -> Message:
        return pb.ModelReadyResponse(ready=self._serves(request.name, request.version) and await self._is_ready())

    async def ServerMetadata(self, request: Message, context: Context) -> Message:
        return pb.ServerMetadataResponse(name="expertmesh", version=self.model.server_version, extensions=EXTENSIONS)

    async def ModelMetadata(self, request: ModelQuery, context: Context) -> Message:
        await self._require(request.name, request.version, context)
        answer = pb.ModelMetadataResponse(name=self.model.name, versions=[VERSION], platform="vllm")
        for tensors, specs in ((answer.inputs, INPUTS), (answer.outputs, OUTPUTS)):
            for spec in specs:
                tensors.add(name=spec.name, datatype=spec.datatype, shape=[spec.num_elements])
        return answer

    async def ModelConfig(self, request: ModelQuery, context: Context) -> Message:
        await self._require(request.name, request.version, context)
        return pb.ModelConfigResponse(config=_config_of(self.model))

    async def ModelStatistics(self, request: ModelQuery, context: Context) -> Message:
        await self._require(request.name, request.version, context)
        return pb.ModelStatisticsResponse(model_stats=[_statistics_of(self.model, self.statistics)])

    async def RepositoryIndex(self, request: IndexQuery, context: Context) -> Message:
        answer = pb.RepositoryIndexResponse()
        if request.repository_name:
            await abort_with(context, RequestError("repository_name: there is one repository here, without a name"))
        if await self._is_ready():
            answer.models.add(name=self.model.name, version=VERSION, state="READY")
        elif not request.ready:
            answer.models.add(name=self.model.name, version=VERSION, state="UNAVAILABLE", reason="not ready")
        return answer

    async def ModelInfer(self, request: InferRequest, context: Context) -> Message:
        """One whole answer."""
        answer = pb.ModelInferResponse()
        async with (
            answering(context, self.load),
            aclosing(self._responses(request, context, may_stream=False)) as responses,
        ):
            async for response in responses:
                answer = response
        return answer

    async def ModelStreamInfer(self, request_iterator: AsyncIterator[InferRequest], context: Context) -> None:
        """Writes ModelStreamInferResponse messages to the context."""

        async def answer(request: InferRequest) -> AsyncGenerator[Message, None]:
            with self.load.one_more():
                async with aclosing(self._responses(request, context, may_stream=True)) as responses:
                    async for response in responses:
                        yield pb.ModelStreamInferResponse(infer_response=response)

        metadata = dict(context.invocation_metadata() or ())
        ends_on_error = metadata.get("triton_grpc_error") == "true"
        await InferStream(context, answer, self._stream_error, ends_on_error=ends_on_error).serve(request_iterator)

    RepositoryModelLoad = _not_offered("loading models")
    RepositoryModelUnload = _not_offered("unloading models")
    SystemSharedMemoryStatus = _not_offered("shared memory")
    SystemSharedMemoryRegister = _not_offered("shared memory")
    SystemSharedMemoryUnregister = _not_offered("shared memory")
    CudaSharedMemoryStatus = _not_offered("shared memory")
    CudaSharedMemoryRegister = _not_offered("shared memory")
    CudaSharedMemoryUnregister = _not_offered("shared memory")
    TraceSetting = _not_offered("changing trace settings")
    LogSettings = _not_offered("changing log settings")

    async def _responses(
        self, request: InferRequest, context: Context, *, may_stream: bool
    ) -> AsyncGenerator[Message, None]:
        """One request's ModelInferResponse messages. Raises RequestError and ServingError."""
        with self.statistics.inference() as watch:
            if self.health.is_draining():
                raise ServingError("this gateway is shutting down; open a new connection")
            self._check_served(request.model_name, request.model_version)
            asked = read_request(request, self.generations.limits)
            if asked.stream and not may_stream:
                refuse("stream", "is true, which takes ModelStreamInfer")
            kind = RequestOutputKind.DELTA if asked.stream else RequestOutputKind.FINAL_ONLY
            prepared = await self.generations.prepare(
                asked.generation, kind, remaining_s=remaining_s(context), names=_NAMES
            )
            watch.input_is_read()
            answer = Answer(asked, num_choices=prepared.params.n, num_prompt_tokens=len(prepared.prompt_token_ids))
            dropped_rows = 0
            async with aclosing(self.generations.outputs(prepared)) as outputs:
                async for output in outputs:
                    answer.take(output.outputs)
                    dropped_rows += take_mark(output)
                    if asked.stream or output.finished:
                        yield self._response(request.id, answer.tensors(), output.finished, dropped_rows)

    def _response(self, request_id: str, tensors: list[OutputTensor], is_last: bool, dropped_rows: int) -> Message:
        response = pb.ModelInferResponse(model_name=self.model.name, model_version=VERSION, id=request_id)
        response.parameters["triton_final_response"].bool_param = is_last
        if is_last and dropped_rows:
            response.parameters["dropped_rows"].int64_param = dropped_rows
        for tensor in tensors:
            response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=[tensor.num_elements])
            response.raw_output_contents.append(tensor.raw)
        return response

    def _stream_error(self, request: InferRequest, sentence: str) -> Message:
        answer = pb.ModelStreamInferResponse(error_message=sentence)
        # The client's own id, so that it finds its request; a longer one than we take is not sent back whole.
        answer.infer_response.id = request.id[: self.generations.limits.max_request_id_chars]
        answer.infer_response.parameters["triton_final_response"].bool_param = True
        return answer

    async def _is_ready(self) -> bool:
        return await serving_status(self.health) == "SERVING"

    def _check_served(self, name: str, version: str) -> None:
        check_model(name, self.model.name)
        if version not in ("", VERSION):
            raise UnknownModel(
                f"model_version: there is no {version[:64]!r} here; {VERSION!r} is", field="model_version"
            )

    def _serves(self, name: str, version: str) -> bool:
        try:
            self._check_served(name, version)
        except UnknownModel:
            return False
        return True

    async def _require(self, name: str, version: str, context: Context) -> None:
        try:
            self._check_served(name, version)
        except UnknownModel as exc:
            await abort_with(context, exc)


def _config_of(model: ServedModel) -> Message:
    config = config_pb.ModelConfig(name=model.name, backend="vllm", max_batch_size=0)
    config.model_transaction_policy.decoupled = True
    config.parameters["max_model_len"].string_value = str(model.max_model_len)
    for spec in INPUTS:
        config.input.add(
            name=spec.name,
            data_type=_CONFIG_TYPES[spec.datatype],
            dims=[spec.num_elements],
            optional=spec.name != "text_input",
        )
    for spec in OUTPUTS:
        config.output.add(name=spec.name, data_type=_CONFIG_TYPES[spec.datatype], dims=[spec.num_elements])
    return config


def _statistics_of(model: ServedModel, statistics: Statistics) -> Message:
    """Queueing is the engine's and is part of compute_infer; nothing is batched before it."""
    durations: dict[str, Durations] = {
        name: getattr(statistics, name) for name in ("success", "fail", "compute_input", "compute_infer")
    }
    stats = pb.InferStatistics(
        **{name: pb.StatisticDuration(count=found.count, ns=found.ns) for name, found in durations.items()}
    )
    return pb.ModelStatistics(
        name=model.name,
        version=VERSION,
        last_inference=statistics.last_inference_ms,
        inference_count=statistics.success.count,
        execution_count=statistics.success.count,
        inference_stats=stats,
    )
