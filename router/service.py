"""The deployment `router`: one replica per Ray node that hosts attention."""

import gc
import logging
import threading
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from ray.serve.handle import DeploymentHandle

from experts.checkpoint import Checkpoint, open_checkpoint
from experts.counting import Counting, Publish
from experts.errors import FrameError
from experts.handshake import Identity, Role, fresh_incarnation, read_secret
from experts.logs import set_up_logs
from experts.member import Lease, own_ids
from experts.placement import Member, Placement
from experts.served_model import SILENCE_LIMIT_S, ServedModel
from experts.weights import read_bias
from experts.wire import DType, Limits
from router.config import RouterConfig
from router.dispatch import Gate
from router.gate_fast import route_fast, warm_up
from router.metrics import RouterMetrics
from router.routing_counts import RoutingCounts
from router.server import RouterServer
from router.turn import Turn

log = logging.getLogger(__name__)

ASK_AGAIN_S = 0.2


class Router:
    """Routes, dispatches and combines for the attention engines of its node; or stands by, where another one does."""

    def __init__(
        self, controller: DeploymentHandle, model: ServedModel, config: RouterConfig, publish: Publish
    ) -> None:
        set_up_logs()
        checkpoint = open_checkpoint(model.checkpoint)
        self._member_id, self._node_id, self._pid = own_ids()
        identity = Identity(
            role=Role.ROUTER,
            member_id=self._member_id,
            incarnation=fresh_incarnation(),
            fingerprint=model.fingerprint(checkpoint),
        )
        own = Path(model.runtime_dir) / f"r-{identity.incarnation:x}.sock"
        routing = RoutingCounts(checkpoint.shape, num_groups=model.num_groups)
        self._server = RouterServer(
            routing.counted(make_gate(checkpoint)),
            identity=identity,
            secret=read_secret(model.secret_file),
            address=f"unix:{own}",
            limits=Limits.of(checkpoint.shape, max_rows=model.max_rows),
            num_groups=model.num_groups,
            dispatch_timeout_s=config.dispatch_timeout_s,
            capacity_factor=config.capacity_factor,
        )
        self._server.start()
        self._watcher = PlacementWatcher(controller, self._server)
        self._watcher.start()
        self._turn = Turn(own=own, shared=Path(model.router_address.removeprefix("unix:")))
        self._turn.start()
        self._lease = Lease(controller, self._describe)
        self._lease.start()
        metrics = RouterMetrics(routing, self._server)
        self._counting = Counting(metrics.fold)
        self._counting.start()
        publish(self._member_id, metrics)
        gc.freeze()  # modules and compiled code: no collection in the middle of a trip looks at them again

    def check_health(self) -> None:
        """Raises where the data-plane thread is gone or stuck; Serve replaces the replica then."""
        if not self._server.is_alive() or self._server.silent_s > SILENCE_LIMIT_S:
            raise RuntimeError(f"router: data plane silent for {self._server.silent_s:.1f} s")
        if not self._watcher.is_alive():
            raise RuntimeError("router: it does not hear from the controller any more")
        self._lease.check()

    def __del__(self) -> None:
        if hasattr(self, "_counting"):
            self._watcher.stop()
            self._lease.stop()
            self._turn.stop()
            self._server.stop()
            self._counting.stop()

    def _describe(self) -> Member:
        dispatcher = self._server.dispatcher
        counts = dispatcher.counts
        names = (
            "rows",
            "dropped_rows",
            "reroutes",
            "nacks",
            "timeouts",
            "hedges",
            "probes",
            "late_answers",
            "failures",
        )
        return Member(
            kind="router",
            member_id=self._member_id,
            incarnation=self._server.incarnation,
            address=self._server.address,
            node_id=self._node_id,
            pid=self._pid,
            details=(
                ("state", "works" if self._turn.has_come else "stands by"),
                ("placement_version", str(dispatcher.placement.version)),
                *((name, str(counts[name])) for name in names),
            ),
        )


class PlacementWatcher(threading.Thread):
    """Keeps a router's placement new: asks the controller, which answers when there is something newer."""

    def __init__(self, controller: DeploymentHandle, server: RouterServer) -> None:
        super().__init__(name="placement", daemon=True)
        self._controller = controller
        self._server = server
        self._stopped = threading.Event()

    def run(self) -> None:
        known = 0
        while not self._stopped.is_set():
            try:
                placement: Placement | None = self._controller.newer_placement.remote(known).result(timeout_s=30)
            except Exception as error:  # whatever Ray raises while a controller restarts: keep the placement we have
                log.warning("placement not renewed", extra={"reason": str(error)[:200]})
                time.sleep(ASK_AGAIN_S)
                continue
            if placement is not None:
                known = placement.version
                self._server.set_placement(placement)

    def stop(self) -> None:
        self._stopped.set()


def make_gate(checkpoint: Checkpoint) -> Gate:
    """The checkpoint's routing as the dispatcher wants it; compiled here, so that no request waits for it."""
    shape = checkpoint.shape
    biases: dict[int, NDArray[np.float32] | None] = dict.fromkeys(shape.moe_layers)
    if shape.uses_bias:
        for layer in shape.moe_layers:
            bias = read_bias(checkpoint, layer)
            biases[layer] = None if bias is None else bias.numpy()
    warm_up(shape)

    def gate(
        layer: int, logits: NDArray[np.generic], dtype: DType, scale: float
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        if layer not in biases:
            raise FrameError(f"layer {layer} has no routed experts")
        routing = route_fast(logits, shape, bias=biases[layer], scale=scale)
        return routing.topk_idx, routing.topk_weights

    return gate
