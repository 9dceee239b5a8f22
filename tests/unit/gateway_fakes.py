"""A whole gateway without Ray for the tests: a fake engine, and a model folder without weights."""

import asyncio
import dataclasses
import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import grpc
import grpc.aio
import httpx
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from cluster import gateway_front
from cluster.config import GatewayConfig, GatewayModel
from cluster.gateway_guard import Guard
from cluster.gateway_health import DeploymentHealth, Health
from cluster.gateway_mark import MarkedAnswers
from cluster.grpc_bridge import Bridge, BridgeServer
from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc

CONTEXT = 64
CONFIG = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "max_position_embeddings": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "torch_dtype": "float32",
}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


class FakeEngine:
    """Says the tokens of `words`, then what `then` raises; remembers what it was asked, and counts early leavers."""

    def __init__(self) -> None:
        self.words = ["a", "b", "c"]
        self.then: Exception | None = None
        self.finish_reason = "length"
        self.delay_s = 0.0
        self.dropped_rows = [0]  # in the steps of a request, taken in turn
        self.seen: list[SamplingParams] = []
        self.aborted = 0

    async def generate(
        self, prompt: Mapping[str, object], params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        self.seen.append(params)
        try:
            for i, word in enumerate(self.words):
                await asyncio.sleep(self.delay_s)
                last = i + 1 == len(self.words)
                if params.output_kind is RequestOutputKind.DELTA:
                    yield self._output(prompt, request_id, [word], last and self.then is None)
                elif last and self.then is None:
                    yield self._output(prompt, request_id, self.words, True)
            if self.then is not None:
                raise self.then
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise

    def _output(self, prompt: Mapping[str, object], request_id: str, words: list[str], last: bool) -> RequestOutput:
        choice = CompletionOutput(
            index=0,
            text="".join(words),
            token_ids=[ord(word) for word in words],
            cumulative_logprob=None,
            logprobs=None,
            finish_reason=self.finish_reason if last else None,
        )
        if last:
            self.dropped_rows.append(dropped_rows := self.dropped_rows.pop(0))
            choice.routed_experts = np.array([dropped_rows]) if dropped_rows else None
        ids = prompt["prompt_token_ids"]
        assert isinstance(ids, list)
        return RequestOutput(request_id, None, ids, None, [choice], last)


class Current:
    """Whatever engine a test uses now."""

    def __init__(self, front: "Front") -> None:
        self._front = front

    def generate(
        self, prompt: Mapping[str, object], params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        return self._front.engine.generate(prompt, params, request_id)


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """How an RPC ended."""

    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""
    trailers: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Front:
    """The whole gateway without Ray, its gRPC services on a real server; one event loop for all tests of the module."""

    def __init__(self, folder: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.engine = FakeEngine()
        self.replicas = {"attention": {"RUNNING": 1}, "experts-0": {"RUNNING": 2}}
        self.health = Health(self._deployments, self._controller, max_age_s=0.0)
        model = GatewayModel(checkpoint=str(folder), served_name="nano", dtype="float32", max_model_len=CONTEXT)
        config = GatewayConfig(auth="none", request_timeout_s=5.0, max_body_bytes=4096)
        self.whole = gateway_front.Front(model, config, Current(self), self.health)
        self.limits = self.whole.limits
        self.http = cast("MarkedAnswers", self.loop.run_until_complete(self.whole.http_app()))
        self.app = cast("Guard", self.http._app)
        self.loop.run_until_complete(self._serve())

    def use(self, engine: FakeEngine) -> None:
        self.engine = engine

    def close(self) -> None:
        self.loop.run_until_complete(self._close())
        self.loop.close()

    async def _serve(self) -> None:
        services = self.whole.services()
        bridge = Bridge(self.loop, (services.check,))
        services.add_all(bridge)
        self._server = BridgeServer(bridge)
        port = self._server.start("127.0.0.1:0")
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self.stub = pb_grpc.InferenceStub(self.channel)
        self.health_stub = health_pb2_grpc.HealthStub(self.channel)

    async def _close(self) -> None:
        await self.channel.close()
        await self._server.stop(0.0)

    async def _deployments(self) -> dict[str, DeploymentHealth]:
        return {name: DeploymentHealth(status="HEALTHY", replicas=states) for name, states in self.replicas.items()}

    async def _controller(self) -> dict[str, object]:
        return {"placement_version": 7}

    def request(self, method: str, path: str, **kwargs: object) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.http)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                return await client.request(method, path, **kwargs)  # type: ignore[arg-type]

        return self.loop.run_until_complete(send())

    def stream(self, **fields: object) -> tuple[list[pb.GenerateChunk], Status]:
        """What a GenerateStream client gets: the chunks until it ended or broke, and the status."""
        chunks: list[pb.GenerateChunk] = []

        async def collect() -> None:
            async for chunk in self.stub.GenerateStream(pb.GenerateRequest(**fields)):  # type: ignore[arg-type]
                chunks.append(chunk)

        return chunks, self._status_of(lambda _: collect(), None)[1]

    def generate(self, **fields: object) -> tuple[pb.GenerateResponse, Status]:
        answer, status = self._status_of(self.stub.Generate, pb.GenerateRequest(**fields))  # type: ignore[arg-type]
        return cast("pb.GenerateResponse", answer or pb.GenerateResponse()), status

    def leave_early(self, **fields: object) -> None:
        """A GenerateStream client that cancels behind the first chunk; returns once the engine has heard of it."""

        async def leave() -> None:
            call = self.stub.GenerateStream(pb.GenerateRequest(**fields))  # type: ignore[arg-type]
            await call.read()
            call.cancel()
            async with asyncio.timeout(5):
                while not self.engine.aborted:  # noqa: ASYNC110  (the fake only counts)
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)  # and the gateway, too

        self.loop.run_until_complete(leave())

    def check(self, service: str) -> tuple[int, Status]:
        """grpc.health.v1 Check."""
        check = self.health_stub.Check  # type: ignore[attr-defined]
        answer, status = self._status_of(check, health_pb2.HealthCheckRequest(service=service))
        return getattr(answer, "status", 0), status

    def _status_of(self, rpc: Callable[..., Awaitable[object]], request: object) -> tuple[object, Status]:
        async def wait() -> object:
            return await rpc(request)  # called here: a call belongs to the loop on which it is made

        try:
            return self.loop.run_until_complete(wait()), Status()
        except grpc.aio.AioRpcError as error:
            trailers = {name: str(value) for name, value in error.trailing_metadata() or ()}
            return None, Status(error.code(), error.details() or "", trailers)

    def post(self, path: str, **body: object) -> httpx.Response:
        return self.request("POST", path, json=body)


def a_front(folder: Path) -> Iterator[Front]:
    """For fixtures: one over a model that is written into the folder, closed at the end."""
    write_model(folder)
    front = Front(folder)
    yield front
    front.close()


def write_model(folder: Path) -> None:
    """config.json and a byte tokenizer with a chat template; no weights."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocab = {chr(i): i for i in range(256) if chr(i) in letters}
    free = iter(sorted(set(range(256)) - set(vocab.values())))
    vocab |= {letter: next(free) for letter in sorted(letters) if letter not in vocab}
    vocab |= {"<pad>": 256, "<s>": 257, "</s>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
