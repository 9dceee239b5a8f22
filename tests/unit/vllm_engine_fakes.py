"""vllm.grpc.engine.VllmEngine on a real gRPC server in this process, over a fake engine, and the package's stub."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
from gateway_fakes import CONTEXT, write_model
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as pb_grpc
from vllm.config import VllmConfig
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers import BaseRenderer, renderer_from_config
from vllm.sampling_params import RequestOutputKind, SamplingParams

from cluster.gateway_generate import Generations
from cluster.gateway_health import DeploymentHealth, Health
from cluster.gateway_load import OpenRequests
from cluster.gateway_vllm import vllm_config_of
from cluster.grpc_bridge import Bridge, BridgeServer
from cluster.grpc_vllm_engine import VllmEngine
from cluster.validate import Limits
from experts.errors import ServingError

PROMPT = pb.TokenizedInput(input_ids=[10, 11, 12])


class Engine:
    """Every choice says the tokens of `tokens`; remembers what it was asked, counts who is there and who left early."""

    def __init__(self) -> None:
        self.tokens = [97, 98, 99]
        self.then: Exception | None = None
        self.delay_s = 0.0
        self.stop_reason: int | str | None = None
        self.dropped_rows = 0
        self.seen: list[tuple[list[int], SamplingParams]] = []
        self.said = 0
        self.tokens_per_step = 1  # of a stream
        self.open = 0
        self.aborted = 0

    async def generate(
        self, prompt: Mapping[str, object], params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        ids = prompt["prompt_token_ids"]
        assert isinstance(ids, list)
        self.seen.append((ids, params))
        self.open += 1
        try:
            for i, token in enumerate(self.tokens):
                await asyncio.sleep(self.delay_s)
                self.said = i + 1
                last = i + 1 == len(self.tokens) and self.then is None
                if params.output_kind is RequestOutputKind.DELTA:
                    yield self._output(ids, params, [token] * self.tokens_per_step, last, is_first=i == 0)
                elif last:
                    yield self._output(ids, params, self.tokens, last, is_first=True)
            if self.then is not None:
                raise self.then
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise
        finally:
            self.open -= 1

    def _output(
        self, ids: list[int], params: SamplingParams, tokens: list[int], last: bool, *, is_first: bool
    ) -> RequestOutput:
        def entries(token: int) -> dict[int, Logprob]:
            return {token: Logprob(-2.0, 3), 5: Logprob(-1.0, 2), 6: Logprob(-0.5, 1)}

        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            prompt_logprobs = [None, *map(entries, ids[1:])] if is_first else []
        choices = [
            CompletionOutput(
                index=index,
                text="",
                token_ids=tokens,
                cumulative_logprob=None,
                logprobs=None if params.logprobs is None else [entries(token) for token in tokens],
                finish_reason="length" if last and self.stop_reason is None else "stop" if last else None,
                stop_reason=self.stop_reason if last else None,
                routed_experts=np.array([self.dropped_rows]) if last and self.dropped_rows else None,
            )
            for index in range(params.n)
        ]
        return RequestOutput("inner", None, ids, prompt_logprobs, choices, last, num_cached_tokens=2)  # type: ignore[arg-type]


@dataclass(kw_only=True)
class Served:
    """A client and what is behind its channel."""

    stub: pb_grpc.VllmEngineStub
    engine: Engine
    service: VllmEngine
    replicas: dict[str, int]
    load: OpenRequests
    draining: list[bool]

    async def answers(self, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
        return [answer async for answer in self.stub.Generate(request)]

    async def refusal(self, request: pb.GenerateRequest) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await self.answers(request)
        return refused.value

    async def is_idle(self) -> bool:
        """Whether, within a second, nothing of any request is left."""
        for _ in range(100):
            if (self.engine.open, self.load.count, len(self.service.open_by_id)) == (0, 0, 0):
                return True
            await asyncio.sleep(0.01)
        return False

    async def until_open(self, num_requests: int = 1) -> None:
        """Returns when the engine has so many requests."""
        for _ in range(500):
            if self.engine.open == num_requests:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"{self.engine.open} requests are open")


@dataclass(kw_only=True)
class Model:
    folder: Path
    config: VllmConfig
    renderer: BaseRenderer


def model_in(folder: Path) -> Model:
    write_model(folder)
    config = vllm_config_of(str(folder), "nano", dtype="float32", max_model_len=CONTEXT)
    return Model(folder=folder, config=config, renderer=renderer_from_config(config))


@asynccontextmanager
async def serving(model: Model) -> AsyncIterator[Served]:
    """A server of one test's own; nothing of a request may be left at its end."""
    engine, load, replicas, draining = Engine(), OpenRequests(8), {"RUNNING": 1}, [False]

    async def deployments() -> dict[str, DeploymentHealth]:
        if "LOST" in replicas:
            raise ServingError("Serve does not answer")
        return {"attention": DeploymentHealth(status="HEALTHY", replicas=replicas)}

    service = VllmEngine(
        generations=Generations(
            engine=engine,
            renderer=model.renderer,
            limits=Limits(max_model_len=CONTEXT, vocab_size=259),
            served_name="nano",
            default_sampling={"temperature": 0.25, "top_k": 3, "max_new_tokens": 8},
            request_timeout_s=5.0,
        ),
        health=Health(deployments, is_draining=lambda: draining[0], max_age_s=0.0),
        load=load,
        checkpoint=str(model.folder),
        model=model.config.model_config,
    )
    bridge = Bridge(asyncio.get_running_loop(), ())
    pb_grpc.add_VllmEngineServicer_to_server(service, bridge)
    server = BridgeServer(bridge)
    port = server.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = pb_grpc.VllmEngineStub(channel)
        served = Served(stub=stub, engine=engine, service=service, replicas=replicas, load=load, draining=draining)
        yield served
        assert await served.is_idle(), "something of a request is left"
    await server.stop(0.0)


async def rest_of(call: grpc.aio.UnaryStreamCall) -> list[pb.GenerateResponse]:
    """What is still to come on a call that was read from."""
    found: list[pb.GenerateResponse] = []
    while isinstance(answer := await call.read(), pb.GenerateResponse):  # and EOF behind the last one
        found.append(answer)
    return found


def asked(*, stream: bool = False, request_id: str = "", **sampling: object) -> pb.GenerateRequest:
    params = pb.SamplingParams(**sampling)  # type: ignore[arg-type]
    return pb.GenerateRequest(request_id=request_id, tokenized=PROMPT, sampling_params=params, stream=stream)
