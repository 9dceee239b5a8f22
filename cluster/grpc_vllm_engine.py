"""The service vllm.grpc.engine.VllmEngine: how the smg gateway, and vLLM's own gRPC server, talk to an engine.

It stands for the whole cluster as one engine of one rank. `Abort` knows the requests of this process only.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import grpc
from google.protobuf.message import Message
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as pb_grpc
from vllm import __version__ as vllm_version
from vllm.config import ModelConfig
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from cluster.drop_mark import take_mark
from cluster.gateway_errors import NoSuchRoute
from cluster.gateway_generate import Generations, Prepared
from cluster.gateway_health import Health
from cluster.gateway_load import OpenRequests
from cluster.grpc_answer import Context, abort_with, answering, remaining_s
from cluster.vllm_engine_info import model_info_of, tokenizer_archive_of
from cluster.vllm_engine_request import Answers, logical_request
from experts.errors import ServingError

VLLM_ENGINE = pb.DESCRIPTOR.services_by_name["VllmEngine"].full_name
DROPPED_ROWS = "expertmesh-dropped-rows"  # a trailer, since the protos have no field for it


def _not_offered(name: str) -> Callable[..., Awaitable[Message]]:
    async def refuse(_: "VllmEngine", request: Message, context: Context) -> Message:
        await abort_with(context, NoSuchRoute(f"{name} is not offered here"))

    return refuse


class Abortable:
    """One open request, and how `Abort` reaches it; used from one event loop."""

    def __init__(self) -> None:
        self.is_aborted = False
        self._waiting: asyncio.Timeout | None = None

    def abort(self) -> None:
        """Ends the request's wait for its next output, now or when it begins. A second time changes nothing."""
        if self.is_aborted:
            return
        self.is_aborted = True
        if self._waiting is not None:
            self._waiting.reschedule(asyncio.get_running_loop().time())

    async def next_of(self, outputs: AsyncGenerator[RequestOutput, None]) -> RequestOutput | None:
        """The next output; None behind the last one, and once the request is aborted. Raises what `outputs` does.

        An abort that finds it waiting cancels the wait, and that ends `outputs`.
        """
        if self.is_aborted:
            return None
        try:
            # A time-out without a time, until `abort` gives it one: only the wait is cancelled, and not the RPC.
            async with asyncio.timeout(None) as self._waiting:
                return await anext(outputs, None)
        except TimeoutError:
            if not self.is_aborted:
                raise
            return None
        finally:
            self._waiting = None


class OpenById:
    """The open requests of this process by the ids that clients gave them; several may have the same."""

    def __init__(self) -> None:
        self._open: dict[str, set[Abortable]] = {}

    def __len__(self) -> int:
        return sum(len(same) for same in self._open.values())

    @contextmanager
    def one_more(self, request_id: str) -> Iterator[Abortable]:
        """A request, as long as the block takes."""
        abortable = Abortable()
        same = self._open.setdefault(request_id, set())
        same.add(abortable)
        try:
            yield abortable
        finally:
            same.discard(abortable)
            if not same:
                self._open.pop(request_id, None)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Aborts all that have one of the ids; "" is the id of nobody."""
        for request_id in filter(None, request_ids):
            for abortable in self._open.get(request_id, ()):
                abortable.abort()


@dataclass(frozen=True, kw_only=True)
class VllmEngine(pb_grpc.VllmEngineServicer):
    """One object per gateway replica.

    checkpoint: folder with config.json and the tokenizer's files.
    """

    generations: Generations
    health: Health
    load: OpenRequests
    checkpoint: str
    model: ModelConfig
    open_by_id: OpenById = field(default_factory=OpenById, init=False)
    started_s: float = field(default_factory=time.monotonic, init=False)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        dropped_rows = 0
        with self.open_by_id.one_more(request.request_id) as abortable:
            async with answering(context, self.load) as counted:
                prepared = await self._prepare(request, context)
                answers = Answers(
                    stream=request.stream, prompt_token_ids=prepared.prompt_token_ids, params=prepared.params
                )
                async with aclosing(self.generations.outputs(prepared)) as outputs:
                    while (output := await abortable.next_of(outputs)) is not None:
                        dropped_rows += take_mark(output)
                        for answer in answers.of(output):
                            yield answer
                if abortable.is_aborted:
                    counted.outcome = "cancelled"
                    for answer in answers.aborted():
                        yield answer
        if dropped_rows:
            context.set_trailing_metadata(((DROPPED_ROWS, str(dropped_rows)),))

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        self.open_by_id.abort(request.request_ids)
        return pb.AbortResponse()

    async def HealthCheck(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:
        if self.health.is_draining():
            return pb.HealthCheckResponse(healthy=False, message="this gateway is about to go; ask another one")
        try:
            missing = await self.health.missing()
        except ServingError as exc:
            return pb.HealthCheckResponse(healthy=False, message=str(exc))
        if missing:
            return pb.HealthCheckResponse(healthy=False, message=f"no running replica of {', '.join(missing)}")
        return pb.HealthCheckResponse(healthy=True, message="ready")

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        generations = self.generations
        return model_info_of(self.checkpoint, self.model, generations.served_name, generations.default_sampling)

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(
            server_type="vllm-grpc",
            data_parallel_size=1,
            max_num_seqs=self.load.limit,
            active_requests=self.load.count,
            uptime_seconds=time.monotonic() - self.started_s,
        )

    async def GetLoads(self, request: pb.GetLoadsRequest, context: Context) -> pb.GetLoadsResponse:
        """One entry, whatever rank is asked for: it is the only one, and who asks takes the first."""
        num_open, limit = self.load.count, self.load.limit
        load = pb.SchedulerLoad(
            num_running_reqs=num_open,
            num_total_reqs=num_open,
            max_running_requests=limit,
            utilization=num_open / max(limit, 1),
        )
        now = datetime.now(UTC).isoformat()
        return pb.GetLoadsResponse(timestamp=now, version=vllm_version, dp_rank_count=1, loads=[load])

    async def GetTokenizer(
        self, request: common_pb2.GetTokenizerRequest, context: Context
    ) -> AsyncIterator[common_pb2.GetTokenizerChunk]:
        try:
            archive = await asyncio.to_thread(tokenizer_archive_of, self.checkpoint)
        except Exception as exc:
            await abort_with(context, exc)
        if archive is None:
            why = "the checkpoint's folder has no tokenizer.json of its own; links that lead out of it are not followed"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, why)
        for chunk in archive.chunks():
            yield chunk

    Embed = _not_offered("Embed")
    FlushCache = _not_offered("FlushCache")
    StartProfile = _not_offered("StartProfile")
    StopProfile = _not_offered("StopProfile")
    SubscribeKvEvents = _not_offered("SubscribeKvEvents")

    async def _prepare(self, request: pb.GenerateRequest, context: Context) -> Prepared:
        kind = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
        # Who names no max_tokens gets the rest of the context.
        return await self.generations.prepare(
            logical_request(request), kind, remaining_s=remaining_s(context), default_max_tokens=None
        )
