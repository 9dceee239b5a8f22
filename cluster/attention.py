"""The deployment `attention`: a vLLM engine that holds everything of the model but its routed experts."""

import asyncio
import importlib
import logging
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING

from ray.serve.handle import DeploymentHandle

from cluster.config import AttentionConfig
from cluster.continuation import ReplicaLost
from cluster.engine_link import EngineLinkOptions
from cluster.exporter import OFF, Publisher
from cluster.metrics import AttentionMetrics
from cluster.output_link import NO_MODEL, OutputLinks
from cluster.traces import follow, set_up, shut_down, take_traceparent
from cluster.traces_config import TracesConfig
from cluster.vllm_plugin import ACTIVATION_VARIABLE, LOAD_FORMAT
from experts.errors import GroupUnavailable, RequestError
from experts.gently import gently
from experts.handshake import Identity, Role, fresh_incarnation, read_secret
from experts.logs import set_up_logs
from experts.member import Lease, own_ids
from experts.placement import Member
from experts.served_model import ServedModel

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput

log = logging.getLogger(__name__)

END_AFTER_S = 0.2
ENGINE_DIED = 70  # exit code: EX_SOFTWARE of sysexits.h


class Attention:
    """One engine. Its requests end with an error only if a step of theirs could not be computed in time."""

    def __init__(
        self,
        controller: DeploymentHandle,
        model: ServedModel,
        config: AttentionConfig,
        max_model_len: int,
        publisher: Publisher,
        traces: TracesConfig | None = None,
    ) -> None:
        set_up_logs()
        prepare_environment(threads=config.threads)
        gently(lambda: importlib.import_module("vllm.v1.engine.async_llm"))  # ten seconds, beside running streams
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from cluster.vllm_models import look_at_models_here

        look_at_models_here(model.checkpoint)
        self._member_id, self._node_id, self._pid = own_ids()
        self._incarnation = fresh_incarnation()
        self._requests = 0
        traces = traces or TracesConfig()
        arguments = engine_arguments(
            model, config, max_model_len=max_model_len, member_id=self._member_id, publisher=publisher, traces=traces
        )
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))  # type: ignore[arg-type]
        publisher(self._member_id, AttentionMetrics(lambda: self._requests))
        set_up(traces, "attention", self._member_id)
        identity = Identity(
            role=Role.ATTENTION, member_id=self._member_id, incarnation=self._incarnation, fingerprint=NO_MODEL
        )
        self._links = OutputLinks(read_secret(model.secret_file), identity)
        self._lease = Lease(controller, self._describe)
        self._lease.start()

    async def generate(
        self,
        prompt: dict[str, object],
        sampling_params: "SamplingParams",
        request_id: str,
        reply_to: tuple[str, int] | None = None,
    ) -> AsyncIterator["bytes | RequestOutput | tuple[int, RequestOutput] | int"]:
        """Continues one prompt; yields outputs as output_wire.pack makes them.

        prompt: has prompt_token_ids. sampling_params: output_kind says whether outputs are deltas or whole.
        reply_to: a gateway's address and number for the request. Where that can be reached, outputs that are bytes go
        there (output_link.py), each other one is yielded with its place, and last the number of all outputs is.
        Raises GroupUnavailable where a step of the request could not be computed, ReplicaLost where the engine died.
        Closing the iterator aborts the request in the engine.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        from cluster.output_wire import pack

        self._requests += 1
        traceparent = take_traceparent(prompt)
        address, call = reply_to or ("", 0)
        place = 0
        try:
            link = await self._links.to(address) if address else None
            # Closed here and not by the garbage collector: only then is the request aborted at once.
            outputs = self._engine.generate(prompt, sampling_params, request_id)  # type: ignore[arg-type]
            outputs = follow(outputs, traceparent, request_id)
            async with aclosing(outputs):
                async for output in outputs:
                    _raise_if_poisoned(output)
                    packed = pack(output)
                    if link is None:
                        yield packed
                    elif isinstance(packed, bytes):
                        link.send(call, place, packed)
                    else:
                        yield place, packed
                    place += 1
            if link is not None:
                yield place
        except EngineDeadError:
            self._end_soon()
            raise ReplicaLost("the attention engine died; try again") from None
        except ValueError as error:  # how vLLM refuses what it finds only when the request arrives
            raise RequestError(str(error)) from None
        finally:
            self._requests -= 1

    async def check_health(self) -> None:
        """Raises where the engine's process is gone or nobody renews the lease; Serve replaces the replica then."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._engine.check_health()
        except EngineDeadError:
            self._end_soon()
            # Not vLLM's class: Serve's controller would import vLLM to read it, and stand still for twenty seconds.
            raise RuntimeError("the engine of this attention replica died") from None
        self._lease.check()

    def _end_soon(self) -> None:
        """Ends the process once those who wait for its engine have been told.

        Serve would ask three times before it replaced the replica, and send it requests meanwhile.
        """
        log.error("the engine died, and this replica ends with it")
        asyncio.get_running_loop().call_later(END_AFTER_S, os._exit, ENGINE_DIED)

    def __del__(self) -> None:
        if hasattr(self, "_lease"):
            self._lease.stop()
            self._links.close()
            self._engine.shutdown()
            shut_down()

    def _describe(self) -> Member:
        return Member(
            kind="attention",
            member_id=self._member_id,
            incarnation=self._incarnation,
            address="",
            node_id=self._node_id,
            pid=self._pid,
            details=(("requests", str(self._requests)),),
        )


def _raise_if_poisoned(output: "RequestOutput") -> None:
    for completion in output.outputs:
        if completion.finish_reason == "error":
            raise GroupUnavailable(str(completion.stop_reason or "the engine ended the request; try again"))


def prepare_environment(*, threads: int) -> None:
    """What vLLM reads from the environment, set before it is imported; its child processes inherit it."""
    os.environ |= {
        ACTIVATION_VARIABLE: "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # otherwise the CPU platform turns the executor `uni` into `mp`
        "VLLM_PLUGINS": "expertmesh",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
    }


def engine_arguments(
    model: ServedModel,
    config: AttentionConfig,
    *,
    max_model_len: int,
    member_id: str,
    publisher: Publisher = OFF,
    traces: TracesConfig | None = None,
) -> dict[str, object]:
    """Keyword arguments of vLLM's engine; the same for a replica, a test and a benchmark."""
    link = EngineLinkOptions(
        checkpoint=model.checkpoint,
        router_address=model.router_address,
        secret_file=str(model.secret_file),
        num_groups=model.num_groups,
        max_rows=model.max_rows,
        member_id=member_id,
        step_timeout_s=config.step_timeout_s,
        start_timeout_s=config.start_timeout_s,
        niceness=config.niceness,
        publisher=publisher,
        traces=traces or TracesConfig(),
    )
    return {
        **plain_engine_arguments(model, max_model_len=max_model_len, kv_cache_mib=config.kv_cache_mib),
        "max_num_seqs": config.max_num_seqs,
        "load_format": LOAD_FORMAT,
        "scheduler_cls": "cluster.vllm_scheduler.PoisonAwareScheduler",
        # The one that gateways have tried a schema with; vLLM would turn to another one for what it does not take.
        "structured_outputs_config": {"backend": "xgrammar"},
        "additional_config": {"expertmesh": link.as_dict()},
    }


def plain_engine_arguments(model: ServedModel, *, max_model_len: int, kv_cache_mib: int) -> dict[str, object]:
    """What an unmodified engine needs to be comparable with ours: `expertmesh parity` uses it too."""
    return {
        "model": model.checkpoint,
        "dtype": model.dtype,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": model.max_rows,
        "kv_cache_memory_bytes": kv_cache_mib << 20,
        "distributed_executor_backend": "uni",
        "enforce_eager": True,
        "async_scheduling": False,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
