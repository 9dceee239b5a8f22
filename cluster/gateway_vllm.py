"""vLLM's half of the gateway: its configuration without weights, and an engine client without an engine.

vLLM's OpenAI server wants an EngineClient. Ours forwards every generation to the attention deployment; rendering of
prompts and chats, sampling parameters and answers stay vLLM's own code.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from typing import NoReturn, cast

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import EngineClient
from vllm.exceptions import GenerationError
from vllm.outputs import RequestOutput
from vllm.renderers import renderer_from_config
from vllm.sampling_params import SamplingParams
from vllm.tasks import SupportedTask
from vllm.v1.engine.input_processor import InputProcessor

from cluster.drop_mark import take_mark
from cluster.gateway_errors import Refusal, refusal_of
from cluster.gateway_mark import MARK, Mark
from cluster.gateway_run import Engine, run
from cluster.validate import Limits, check_length
from cluster.vllm_models import look_at_models_here


@dataclass(slots=True)
class Admission:
    """What the HTTP guard and the engine client tell each other of one request; vLLM's server has no place for it."""

    deadline: float  # on the event loop's clock
    max_tokens: int | None = None  # as the client asked; vLLM's server would silently shorten it
    refusal: Refusal | None = None  # set by the client: the first one is what the caller is told


ADMISSION: ContextVar[Admission] = ContextVar("admission")


def vllm_config_of(checkpoint: str, served_name: str, *, dtype: str, max_model_len: int) -> VllmConfig:
    """vLLM's view of the checkpoint, from config.json and the tokenizer's files only; reads no weights."""
    look_at_models_here(checkpoint)
    args = AsyncEngineArgs(
        model=checkpoint,
        served_model_name=[served_name],
        dtype=cast("str", dtype),  # type: ignore[arg-type]
        max_model_len=max_model_len,
        enforce_eager=True,
        load_format="auto",
        distributed_executor_backend="uni",  # inside a Ray actor vLLM would otherwise look for a placement group
        kv_cache_memory_bytes=1 << 26,  # nothing is allocated here; it keeps vLLM from measuring the machine
    )
    return args.create_engine_config()


class Failed(GenerationError):
    """A refusal on its way through vLLM's server, which logs no traceback for this class."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.status_code = HTTPStatus(refusal.http_status)


class _WithoutEngine(EngineClient):
    """Refuses what only makes sense beside an engine; no route that we serve asks for it."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise NotImplementedError("the gateway has no engine of its own")

    encode = notify_kv_transfer_request_rejected = start_profile = stop_profile = _refuse
    reset_mm_cache = reset_encoder_cache = reset_prefix_cache = _refuse
    sleep = wake_up = release_kv_cache_memory = pause_generation = resume_generation = add_lora = _refuse


class ForwardingClient(_WithoutEngine):
    """vLLM's EngineClient whose engine is elsewhere; it is never "errored", since replicas come back."""

    def __init__(self, vllm_config: VllmConfig, engine: Engine, *, limits: Limits, request_timeout_s: float) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self._engine = engine
        self._limits = limits
        self._request_timeout_s = request_timeout_s

    async def generate(  # type: ignore[override]
        self, prompt: Mapping[str, object], sampling_params: SamplingParams, request_id: str, **_: object
    ) -> AsyncGenerator[RequestOutput, None]:
        """Forwards a rendered prompt; raises errors that vLLM's server turns into the right status."""
        admission = ADMISSION.get(Admission(asyncio.get_running_loop().time() + self._request_timeout_s))
        mark = MARK.get(Mark())
        ids = cast("list[int]", prompt["prompt_token_ids"])
        try:
            check_length(len(ids), admission.max_tokens, self._limits)
            answers = run(self._engine, ids, sampling_params, request_id, deadline=admission.deadline)
            async with aclosing(answers) as outputs:
                async for output in outputs:
                    mark.dropped_rows += take_mark(output)
                    yield output
        except Exception as exc:
            refusal = refusal_of(exc)
            admission.refusal = admission.refusal or refusal
            raise Failed(refusal) from None

    @property
    def is_running(self) -> bool:
        return True

    @property
    def is_stopped(self) -> bool:
        return False

    @property
    def errored(self) -> bool:
        return False

    @property
    def dead_error(self) -> BaseException:
        return RuntimeError("the gateway has no engine of its own that could be dead")

    async def get_supported_tasks(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    async def is_tracing_enabled(self) -> bool:
        return False

    async def is_sleeping(self) -> bool:
        return False

    async def is_paused(self) -> bool:
        return False

    async def abort(self, request_id: object) -> None:
        """Nothing to do: closing `generate` aborts upstream."""

    async def do_log_stats(self) -> None:
        """Nothing to log: the engines log their own."""

    async def check_health(self) -> None:
        """Always healthy: the gateway's own health routes answer instead of vLLM's."""

    def shutdown(self, timeout: float | None = None) -> None:
        self.renderer.shutdown()


def new_request_id() -> str:
    return uuid.uuid4().hex
