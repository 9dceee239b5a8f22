"""From the options that an attention replica gives its engine to a client of the node's router."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Self, cast

import torch

from cluster.exporter import OFF, Publisher
from cluster.helper_threads import HelperThreads
from cluster.metrics import ENGINE
from cluster.router_client import RouterAddress, RouterClient, TracedRouterClient
from cluster.step import CURRENT
from cluster.traces import set_up_steps
from cluster.traces_config import TracesConfig
from cluster.vllm_rounding import kernel_truncates
from experts.checkpoint import open_checkpoint
from experts.handshake import Identity, Role, fresh_incarnation, model_fingerprint, read_secret
from experts.shape import MoEShape
from experts.wire import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLinkOptions:
    """Travels to the engine process inside vLLM's `additional_config`, so plain values only."""

    checkpoint: str  # folder
    router_address: str
    secret_file: str
    num_groups: int
    max_rows: int  # tokens of one step at most
    member_id: str
    step_timeout_s: float
    start_timeout_s: float
    niceness: int = 0  # of the engine's process
    publisher: Publisher = OFF
    traces: TracesConfig = field(default_factory=TracesConfig)

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "traces": self.traces.model_dump()}

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Self:
        """From `as_dict`."""
        publisher = Publisher(**cast("dict[str, object]", options["publisher"]))  # type: ignore[arg-type]
        traces = TracesConfig.model_validate(options["traces"])
        return cls(**{**options, "publisher": publisher, "traces": traces})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLink:
    client: RouterClient
    helpers: HelperThreads  # of the thread that computes steps
    shape: MoEShape
    max_rows: int  # tokens of one step at most
    start_timeout_s: float
    publish: Callable[[], object]  # the engine's metrics, from now on


def open_link(given: EngineLinkOptions, dtype: torch.dtype) -> EngineLink:
    """A client that is not connected yet. dtype: of the engine's hidden states.

    Raises ConfigError for a checkpoint or a secret that cannot be read.
    """
    checkpoint = open_checkpoint(given.checkpoint)
    shape = checkpoint.shape
    kernel_truncates(dtype)  # found out here, where a failure is a failed start and not a failed step
    identity = Identity(
        role=Role.ATTENTION,
        member_id=given.member_id,
        incarnation=fresh_incarnation(),
        fingerprint=model_fingerprint(
            checkpoint.fingerprint, dtype=str(dtype).removeprefix("torch."), num_groups=given.num_groups
        ),
    )
    tracer = set_up_steps(given.traces, given.member_id)
    if tracer is not None:
        CURRENT.trace_with(tracer)
    client = (RouterClient if tracer is None else TracedRouterClient)(
        RouterAddress(address=given.router_address, secret=read_secret(given.secret_file), identity=identity),
        Limits.of(shape, max_rows=given.max_rows),
        CURRENT,
        step_timeout_s=given.step_timeout_s,
    )
    return EngineLink(
        client=client,
        helpers=HelperThreads(),
        shape=shape,
        max_rows=given.max_rows,
        start_timeout_s=given.start_timeout_s,
        # Not on the node's port: the thread that computes steps leaves no time for it.
        publish=lambda: given.publisher(given.member_id, ENGINE, exports=False),
    )
