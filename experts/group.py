"""The deployment `experts-<g>`: one replica holds the home experts of one group in every MoE layer and serves them."""

import gc
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from ray.serve.handle import DeploymentHandle

from experts.checkpoint import Checkpoint, open_checkpoint
from experts.compute import make_expert_ffn
from experts.config import ExpertsConfig
from experts.counting import Counting, Publish
from experts.errors import ConfigError
from experts.handshake import fresh_incarnation, model_fingerprint, read_secret
from experts.load import LoadMeter, pair_flops
from experts.logs import set_up_logs
from experts.member import Lease, own_ids
from experts.metrics import ExpertMetrics
from experts.placement import Member
from experts.server import ExpertServer
from experts.weights import load_group, resident_bytes
from experts.wire import Limits

log = logging.getLogger(__name__)

SILENCE_LIMIT_S = 10.0  # a data-plane thread that has not come round for this long is stuck
MAX_FAILED_IN_A_ROW = 5  # a device that has failed for good fails everything
DRAIN_TIMEOUT_S = 2.0  # routers hear at once that we leave, and have got their answers a step later
PROGRESS_EVERY_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What every member must agree on; its fingerprint is part of each handshake."""

    checkpoint: str  # folder
    dtype: str  # float32, bfloat16 or float16: of hidden states and weights
    num_groups: int  # D
    max_rows: int  # tokens of one step at most
    runtime_dir: str  # Unix sockets
    secret_path: str | None = None  # the cluster's secret; None: in runtime_dir

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def secret_file(self) -> Path:
        return Path(self.runtime_dir) / "secret" if self.secret_path is None else Path(self.secret_path)

    @property
    def router_address(self) -> str:
        """Where the router of a node listens; the same for every router, so that a new one is found at once."""
        return f"unix:{self.runtime_dir}/router.sock"

    def fingerprint(self, checkpoint: Checkpoint) -> bytes:
        return model_fingerprint(checkpoint.fingerprint, dtype=self.dtype, num_groups=self.num_groups)


class ExpertGroup:
    """One interchangeable copy of an expert group."""

    def __init__(
        self,
        controller: DeploymentHandle,
        model: ServedModel,
        config: ExpertsConfig,
        group: int,
        *,
        load_window_s: float,
        publish: Publish,
    ) -> None:
        """load_window_s: time constant of the load that the replica reports. publish: its metrics."""
        set_up_logs()
        torch.set_num_threads(config.threads)
        checkpoint = open_checkpoint(model.checkpoint)
        shape = checkpoint.shape
        held = shape.home_experts(group, model.num_groups)
        check_memory(checkpoint, len(held), model.torch_dtype, on_gpu=config.num_gpus > 0)
        weights = load_group(checkpoint, held, model.torch_dtype, on_progress=_progress(group))
        if config.num_gpus > 0:
            for layer in weights:
                weights[layer] = weights[layer].to(torch.device("cuda"))
        self._member_id, self._node_id, self._pid = own_ids()
        self._group = group
        self._held = held
        flops = pair_flops(hidden_size=shape.hidden_size, moe_intermediate_size=shape.moe_intermediate_size)
        self._load = LoadMeter(flops_per_pair=flops, window_s=load_window_s, now_s=time.monotonic())
        incarnation = fresh_incarnation()
        self._server = ExpertServer(
            make_expert_ffn(weights, path=config.compute),
            held=held,
            layers=frozenset(shape.moe_layers),
            dtype=model.torch_dtype,
            num_experts=shape.num_experts,
            address=_address(model, config, group, incarnation),
            secret=read_secret(model.secret_file),
            fingerprint=model.fingerprint(checkpoint),
            incarnation=incarnation,
            group=group,
            limits=Limits.of(shape, max_rows=model.max_rows),
            load=self._load,
        )
        self._server.start()
        self._lease = Lease(controller, self._describe)
        self._lease.start()
        metrics = ExpertMetrics(self._server, group=group, held=held, layers=shape.moe_layers)
        self._counting = Counting(metrics.fold)
        self._counting.start()
        publish(self._member_id, metrics)
        gc.freeze()  # modules and weights: no collection in the middle of a trip looks at them again

    def check_health(self) -> None:
        """Raises where the data-plane thread is gone or stuck; Serve replaces the replica then."""
        if not self._server.is_alive() or self._server.silent_s > SILENCE_LIMIT_S:
            raise RuntimeError(f"experts-{self._group}: data plane silent for {self._server.silent_s:.1f} s")
        if self._server.failed_in_a_row >= MAX_FAILED_IN_A_ROW:
            raise RuntimeError(f"experts-{self._group}: the last {self._server.failed_in_a_row} batches failed")
        self._lease.check()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The replica's load; Serve asks once a second and hands it to the policy of cluster/autoscale_policy.py."""
        return self._load.read(time.monotonic()).stats()

    def __del__(self) -> None:
        if hasattr(self, "_counting"):
            self._lease.stop()
            self._server.drain(DRAIN_TIMEOUT_S)
            self._server.stop()
            self._counting.stop()

    def _describe(self) -> Member:
        counts = self._server.counts
        return Member(
            kind="experts",
            member_id=self._member_id,
            incarnation=self._server.incarnation,
            address=self._server.address,
            node_id=self._node_id,
            pid=self._pid,
            group=self._group,
            first_expert=self._held.start,
            num_experts=len(self._held),
            details=tuple((name, str(counts[name])) for name in ("rows", "batches", "joined", "nacks")),
        )


def check_memory(checkpoint: Checkpoint, num_experts_held: int, dtype: torch.dtype, *, on_gpu: bool) -> None:
    """Raises ConfigError where the experts of one replica do not fit into the memory that is free."""
    needed = resident_bytes(checkpoint, num_experts_held, dtype, on_cpu=not on_gpu)
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"an expert group needs {needed / 2**30:.1f} GiB for {num_experts_held} experts a layer, and "
            f"{free / 2**30:.1f} GiB are free: raise experts.groups, or use machines with more memory"
        )


def _address(model: ServedModel, config: ExpertsConfig, group: int, incarnation: int) -> str:
    if config.listen == "tcp":
        import ray

        return f"tcp:{ray.util.get_node_ip_address()}:0"
    return f"unix:{model.runtime_dir}/e{group}-{incarnation:x}.sock"


def _progress(group: int):
    started_s = said_s = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal said_s
        now_s = time.monotonic()
        if now_s - said_s > PROGRESS_EVERY_S or done == total:
            said_s = now_s
            log.info("loading experts", extra={"group": group, "done": done, "total": total, "s": now_s - started_s})

    return say
