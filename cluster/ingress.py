"""The gateway: one Serve deployment that answers gRPC and OpenAI HTTP, and hands generations to the attention replicas.

Imported by the process that declares the application too, so everything that imports vLLM (ten seconds) is imported
by the replica's constructor.
"""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve._private.common import DeploymentStatus, ReplicaState
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from cluster.continuation import ReplicaLost
from cluster.exporter import OFF, Publisher
from cluster.gateway_errors import Overloaded
from cluster.gateway_health import DeploymentHealth, Health, Json
from cluster.metrics import GATEWAY
from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.validate import Limits
from experts.errors import GroupUnavailable, ServingError
from experts.member import own_ids

if TYPE_CHECKING:
    from starlette.types import ASGIApp
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

# For Serve's gRPC options: what the proxies must import to know our services.
GRPC_SERVICER_FUNCTIONS = (
    "cluster.proto.expertmesh.v1.inference_pb2_grpc.add_InferenceServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)


class HandleEngine:
    """The attention deployment as an engine (`gateway_run.Engine`)."""

    def __init__(self, attention: DeploymentHandle) -> None:
        self._attention = attention.options(stream=True)

    async def generate(
        self, prompt: Mapping[str, object], params: "SamplingParams", request_id: str
    ) -> AsyncGenerator["RequestOutput", None]:
        """Streams from one attention replica; leaving early cancels the call, so that its engine aborts."""
        call = self._attention.generate.remote(dict(prompt), params, request_id)
        answers = cast("DeploymentResponseGenerator[RequestOutput]", call)
        finished = False
        try:
            async for output in answers:
                finished = output.finished
                yield output
            finished = True
        except Exception as exc:
            finished = True
            raise unwrapped(exc) from None
        finally:
            if not finished:
                answers.cancel()


def unwrapped(exc: Exception) -> Exception:
    """What a call to another deployment failed of: its own error, or ours for what Ray and Serve report."""
    while isinstance(exc, RayTaskError) and isinstance(exc.cause, Exception):
        exc = exc.cause
    if isinstance(exc, BackPressureError):
        return Overloaded("all attention replicas are busy and their queues are full; try again")
    if isinstance(exc, RayActorError | ReplicaUnavailableError | ObjectLostError):
        return ReplicaLost("the attention replica that had this request is gone; try again")
    if isinstance(exc, DeploymentUnavailableError):
        return GroupUnavailable("no attention replica could be started; try again")
    return exc


@serve.ingress()
class Gateway:
    """One gateway replica. Method names are RPC names: Serve routes by them, and tells contexts by argument name.

    checkpoint: folder with config.json and the tokenizer's files; weights are not read.
    max_model_len: tokens of prompt and answer together.
    request_timeout_s: the deadline of a request that names none.
    attention: offers `generate(prompt, params, request_id)`, streaming RequestOutput.
    controller: offers `status()`, a JSON object; without one the status page has Serve's view only.
    keep: deployments that are called from elsewhere only: Serve starts what its ingress names.
    """

    async def __init__(
        self,
        *,
        checkpoint: str,
        served_name: str,
        dtype: str,
        max_model_len: int,
        request_timeout_s: float,
        attention: DeploymentHandle,
        drops_rows: bool = False,
        controller: DeploymentHandle | None = None,
        max_body_bytes: int = 4 << 20,
        keep: Sequence[DeploymentHandle] = (),
        publisher: Publisher = OFF,
    ) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the imports below: everything needed is in the folder
        from cluster.gateway_failover import ContinuingEngine
        from cluster.gateway_http import build_http_app
        from cluster.gateway_rpc import Rpc, model_info_of
        from cluster.gateway_vllm import ForwardingClient, vllm_config_of

        config = vllm_config_of(checkpoint, served_name, dtype=dtype, max_model_len=max_model_len)
        limits = Limits(max_model_len=max_model_len, vocab_size=config.model_config.get_vocab_size())
        engine = ContinuingEngine(HandleEngine(attention), drops_rows=drops_rows)
        GATEWAY.failovers = lambda: {"continued": engine.continued, "given_up": engine.given_up}
        publisher(own_ids()[0], GATEWAY)
        health = Health(_deployments, None if controller is None else lambda: _status_of(controller))
        client = ForwardingClient(config, engine, limits=limits, request_timeout_s=request_timeout_s)
        self._http_app = await build_http_app(
            client, health, limits=limits, request_timeout_s=request_timeout_s, max_body_bytes=max_body_bytes
        )
        self._rpc = Rpc(
            engine=engine,
            renderer=client.renderer,
            health=health,
            limits=limits,
            model_info=model_info_of(checkpoint, config.model_config, served_name),
            default_sampling=config.model_config.get_diff_sampling_param(),
            request_timeout_s=request_timeout_s,
        )

    def __serve_build_asgi_app__(self) -> "ASGIApp":
        return self._http_app

    async def Generate(self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext) -> pb.GenerateResponse:
        return await self._rpc.generate(request, grpc_context)

    async def GenerateStream(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.GenerateChunk]:
        async for chunk in self._rpc.generate_stream(request, grpc_context):
            yield chunk

    async def ModelInfo(self, request: pb.ModelInfoRequest) -> pb.ModelInfoResponse:
        return self._rpc.model_info

    async def Check(
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> health_pb2.HealthCheckResponse:
        return await self._rpc.check(request.service, grpc_context)

    async def Watch(self, request: health_pb2.HealthCheckRequest) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        async for status in self._rpc.watch(request.service):
            yield status

    async def List(self, request: Message) -> Message:
        return await self._rpc.list()


async def _deployments() -> dict[str, DeploymentHealth]:
    """Every deployment of this replica's application, as Serve's controller sees it."""
    client = _get_global_client()
    assert client is not None, "a replica is always connected to Serve"
    app_name = serve.get_replica_context().app_name
    # Not serve.status(), which pickles a class per deployment. The call blocks on Ray: off the event loop.
    details = await asyncio.to_thread(client.get_serve_details)
    app = details["applications"].get(app_name)
    if app is None:
        raise ServingError("Serve does not know this application")
    return {
        name: DeploymentHealth(
            status=DeploymentStatus(deployment["status"]).value,
            replicas=dict(Counter(ReplicaState(replica["state"]).value for replica in deployment["replicas"])),
        )
        for name, deployment in app["deployments"].items()
    }


async def _status_of(controller: DeploymentHandle) -> Json:
    return cast("Json", await controller.status.remote())
