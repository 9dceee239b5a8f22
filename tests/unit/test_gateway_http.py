"""The HTTP side of the gateway: vLLM's OpenAI server with our guard round it and a fake engine behind it."""

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Iterator, Mapping
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from cluster.gateway_guard import Guard
from cluster.gateway_health import DeploymentHealth, Health
from cluster.gateway_http import build_http_app
from cluster.gateway_rpc import Rpc, model_info_of
from cluster.gateway_vllm import ForwardingClient, vllm_config_of
from cluster.validate import Limits
from experts.errors import DeadlineExceeded, GroupUnavailable, RequestError

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
        ids = prompt["prompt_token_ids"]
        assert isinstance(ids, list)
        return RequestOutput(request_id, None, ids, None, [choice], last)


class Front:
    """The whole gateway without Ray; one event loop for all tests of the module."""

    def __init__(self, folder: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.engine = FakeEngine()
        self.replicas = {"attention": {"RUNNING": 1}, "experts-0": {"RUNNING": 2}}
        self.health = Health(self._deployments, self._controller, max_age_s=0.0)
        config = vllm_config_of(str(folder), "nano", dtype="float32", max_model_len=CONTEXT)
        self.limits = Limits(max_model_len=CONTEXT, vocab_size=259)
        self.client = ForwardingClient(config, self.engine, limits=self.limits, request_timeout_s=5.0)
        self.app: Guard = self.loop.run_until_complete(self._build())
        self.rpc = Rpc(
            engine=self.engine,
            renderer=self.client.renderer,
            health=self.health,
            limits=self.limits,
            model_info=model_info_of(str(folder), config.model_config, "nano"),
            default_sampling={},
            request_timeout_s=5.0,
        )

    async def _build(self) -> Guard:
        app = await build_http_app(
            self.client, self.health, limits=self.limits, request_timeout_s=5.0, max_body_bytes=4096
        )
        assert isinstance(app, Guard)
        return app

    async def _deployments(self) -> dict[str, DeploymentHealth]:
        return {name: DeploymentHealth(status="HEALTHY", replicas=states) for name, states in self.replicas.items()}

    async def _controller(self) -> dict[str, object]:
        return {"placement_version": 7}

    def request(self, method: str, path: str, **kwargs: object) -> httpx.Response:
        async def send() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://gateway") as client:
                return await client.request(method, path, **kwargs)  # type: ignore[arg-type]

        return self.loop.run_until_complete(send())

    def post(self, path: str, **body: object) -> httpx.Response:
        return self.request("POST", path, json=body)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("model")
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
    front = Front(folder)
    yield front
    front.loop.close()


@pytest.fixture
def front(running: Front) -> Front:
    running.engine.__init__()
    running.replicas = {"attention": {"RUNNING": 1}, "experts-0": {"RUNNING": 2}}
    return running


def test_a_completion_is_answered_with_text_and_counts(front: Front) -> None:
    answer = front.post("/v1/completions", model="nano", prompt="hello", max_tokens=3).json()
    assert answer["choices"][0]["text"] == "abc"
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": None,
    }


def test_it(front: Front) -> None:
    for r in (
        front.request("GET", "/v1/models"),
        front.request("GET", "/version"),
        front.request("GET", "/metrics"),
        front.request("GET", "/expertmesh/status"),
        front.post("/v1/chat/completions", messages=[{"role": "user", "content": "x"}], max_completion_tokens=3),
        front.post("/v1/completions", prompt="x", stream=True, max_tokens=3),
        front.post("/v1/completions", prompt="x" * 63, max_tokens=3),
        front.post("/v1/completions", prompt=[1] * 63, max_tokens=3),
        front.post("/tokenize", prompt="x"),
        front.post("/detokenize", tokens=[97]),
        front.post("/v1/completions", prompt="x", stream_options={"a": 1}),
        front.post("/v1/completions", prompt="x", stream=True, stream_options={"include_usage": 7}),
    ):
        print(r.status_code, dict(r.headers), r.text[:600])
    for then in (
        GroupUnavailable("no live copy of group 1"),
        DeadlineExceeded("late"),
        ValueError("boom /tmp/x/y.py"),
        RequestError("odd", field="top_k"),
    ):
        front.engine.then = then
        for stream in (False, True):
            for words in (["a"], []):
                front.engine.words = words
                r = front.post("/v1/completions", prompt="x", stream=stream)
                print(type(then).__name__, stream, words, r.status_code, r.headers.get("retry-after"), r.text)
    front.engine.__init__()
    front.engine.finish_reason = "error"
    print(front.post("/v1/completions", prompt="x").text)
