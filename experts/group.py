"""The deployment `experts-<g>`: one replica holds the home experts of one group in every MoE layer and serves them."""

import gc
import time
from typing import TYPE_CHECKING

from ray.serve.handle import DeploymentHandle

from experts.config import ExpertsConfig
from experts.counting import Counting, Publish
from experts.gently import gently, give_way
from experts.handshake import fresh_incarnation
from experts.logs import set_up_logs
from experts.member import Lease, own_ids
from experts.placement import Member
from experts.served_model import SILENCE_LIMIT_S, ServedModel

if TYPE_CHECKING:
    from experts.loading import LoadedGroup

MAX_FAILED_IN_A_ROW = 5  # a device that has failed for good fails everything
DRAIN_TIMEOUT_S = 2.0  # routers hear at once that we leave, and have got their answers a step later


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
        # More often than not, streams go on beside it: those of the copy that this one replaces.
        loaded = gently(lambda: _load(model, config, group))
        _set_threads(config.threads)  # here, too: OpenMP keeps the number for each thread
        give_way(config.niceness)
        self._member_id, self._node_id, self._pid = own_ids()
        self._group = group
        self._held = loaded.held
        self._load = loaded.load_meter(load_window_s)
        incarnation = fresh_incarnation()
        address = _address(model, config, group, incarnation)
        self._server = loaded.server(address, incarnation=incarnation, load=self._load)
        self._server.start()
        self._lease = Lease(controller, self._describe)
        self._lease.start()
        metrics = loaded.metrics(self._server)
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


def _load(model: ServedModel, config: ExpertsConfig, group: int) -> "LoadedGroup":
    """Imports what computes, torch above all, and reads the weights."""
    from experts.loading import LoadedGroup

    _set_threads(config.threads)
    return LoadedGroup.of(model, config, group)


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _address(model: ServedModel, config: ExpertsConfig, group: int, incarnation: int) -> str:
    if config.listen == "tcp":
        import ray

        return f"tcp:{ray.util.get_node_ip_address()}:0"
    return f"unix:{model.runtime_dir}/e{group}-{incarnation:x}.sock"
