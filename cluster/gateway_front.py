"""Everything that a gateway replica answers, without the servers that carry it: the HTTP app and the gRPC services."""

from functools import partial
from importlib.metadata import version

import grpc
from grpc_health.v1 import health_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2_grpc
from starlette.types import ASGIApp
from tritonclient.grpc import service_pb2_grpc

from cluster.config import GatewayConfig, GatewayModel
from cluster.gateway_errors import Overloaded
from cluster.gateway_generate import Generations
from cluster.gateway_health import Health
from cluster.gateway_http import build_http_app
from cluster.gateway_load import OpenRequests
from cluster.gateway_run import Engine
from cluster.gateway_schema import SchemaCheck
from cluster.gateway_servers import Services
from cluster.gateway_vllm import ForwardingClient, vllm_config_of
from cluster.grpc_health import HEALTH, HealthService
from cluster.grpc_inference import INFERENCE, Inference, model_info_of
from cluster.grpc_kserve import KSERVE, KServe, ServedModel
from cluster.grpc_vllm_engine import VLLM_ENGINE, VllmEngine
from cluster.metrics import GATEWAY
from cluster.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc
from cluster.validate import Limits

# RPCs that are one generation each; ModelStreamInfer refuses on its stream.
GENERATIONS = frozenset(
    {
        f"/{INFERENCE}/Generate",
        f"/{INFERENCE}/GenerateStream",
        f"/{KSERVE}/ModelInfer",
        f"/{VLLM_ENGINE}/Generate",
    }
)


class Front:
    """One per gateway replica."""

    def __init__(
        self,
        model: GatewayModel,
        config: GatewayConfig,
        engine: Engine,
        health: Health,
    ) -> None:
        """Raises ConfigError for a checkpoint that cannot be served."""
        self._config = config
        self._checkpoint = model.checkpoint
        self._health = health
        vllm_config = vllm_config_of(
            model.checkpoint, model.served_name, dtype=model.dtype, max_model_len=model.max_model_len
        )
        self.load = OpenRequests(config.max_open_requests)
        self.limits = Limits(max_model_len=model.max_model_len, vocab_size=vllm_config.model_config.get_vocab_size())
        self.client = ForwardingClient(
            vllm_config, engine, limits=self.limits, request_timeout_s=config.request_timeout_s
        )
        self.schemas = SchemaCheck(model.checkpoint, self.limits.vocab_size)
        self.generations = Generations(
            engine=engine,
            renderer=self.client.renderer,
            limits=self.limits,
            served_name=model.served_name,
            default_sampling=vllm_config.model_config.get_diff_sampling_param(),
            request_timeout_s=config.request_timeout_s,
        )
        self._model_info = model_info_of(model.checkpoint, vllm_config.model_config, model.served_name)

    async def http_app(self) -> ASGIApp:
        """Needs the running event loop on which it will serve."""
        return await build_http_app(
            self.client,
            self._health,
            limits=self.limits,
            request_timeout_s=self._config.request_timeout_s,
            max_body_bytes=self._config.max_body_bytes,
            load=self.load,
            schemas=self.schemas,
        )

    def services(self) -> Services:
        """All gRPC services."""
        common = {"generations": self.generations, "load": self.load}
        model = self.client.model_config
        inference = Inference(**common, model_info=self._model_info)
        kserve = KServe(
            **common,
            health=self._health,
            model=ServedModel(
                name=self.generations.served_name,
                max_model_len=self.limits.max_model_len,
                server_version=version("expertmesh"),
            ),
        )
        engine = VllmEngine(
            **common,
            health=self._health,
            checkpoint=self._checkpoint,
            model=model,
        )
        names = (INFERENCE, KSERVE, VLLM_ENGINE)
        health = HealthService(health=self._health, services=names)
        add = (
            partial(pb_grpc.add_InferenceServicer_to_server, inference),
            partial(service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server, kserve),
            partial(vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server, engine),
            partial(health_pb2_grpc.add_HealthServicer_to_server, health),
        )
        return Services(names=(*names, HEALTH), add=add, check=partial(_refuse_overload, self.load))


def _refuse_overload(load: OpenRequests, details: grpc.HandlerCallDetails) -> None:
    """On gRPC's thread, so that a refusal does not wait for the loop. Raises Overloaded."""
    if details.method in GENERATIONS:
        try:
            load.check()
        except Overloaded:
            GATEWAY.refused_rpcs += 1
            raise
