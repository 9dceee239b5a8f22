"""The gateway: one Serve deployment that answers gRPC and OpenAI HTTP, and hands generations to the attention replicas.

Imported by the process that declares the application too, so everything that imports vLLM (ten seconds) is imported
by the replica's constructor.
"""

import asyncio
import gc
import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import cast

from ray import serve
from ray.serve._private.common import DeploymentStatus, ReplicaState
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle

from cluster.attention_calls import HandleEngine
from cluster.config import GatewayConfig, GatewayModel
from cluster.exporter import OFF, Publisher
from cluster.gateway_health import DeploymentHealth, Health, Json
from cluster.keys import Keys
from cluster.metrics import GATEWAY
from cluster.output_inbox import Inbox, InboxOptions
from cluster.traces import set_up, shut_down
from cluster.traces_config import TracesConfig
from experts.errors import ServingError
from experts.logs import set_up_logs
from experts.member import own_ids

SWITCH_INTERVAL_S = 0.0003  # after which gRPC's thread and the event loop let each other run; Python's own 5 ms add up


class Gateway:
    """One gateway replica: an HTTP and a gRPC server of its own (cluster/gateway_servers.py)."""

    async def __init__(
        self,
        model: GatewayModel,
        config: GatewayConfig,
        attention: DeploymentHandle,
        controller: DeploymentHandle | None = None,
        *,
        drops_rows: bool = False,
        keep: Sequence[DeploymentHandle] = (),
        inbox: InboxOptions | None = None,
        publisher: Publisher = OFF,
        traces: TracesConfig | None = None,
    ) -> None:
        """attention: offers what Attention.generate does.

        controller: offers `status()`, a JSON object; without one the status page has Serve's view only.
        keep: deployments that are called from elsewhere only: Serve starts what its ingress names.
        inbox: where attention replicas of this node send outputs; without one they all come by Ray.
        Raises ConfigError where a port, a certificate or the keys cannot be used.
        """
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the imports below: everything needed is in the folder
        from cluster.gateway_failover import ContinuingEngine
        from cluster.gateway_front import Front
        from cluster.gateway_servers import Doors

        set_up_logs()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        keys = Keys(()) if config.auth == "none" else Keys.read(config.keys_file)
        self._inbox = None if inbox is None else Inbox(inbox)
        if self._inbox is not None:
            await self._inbox.open()
        engine = ContinuingEngine(HandleEngine(attention, self._inbox), drops_rows=drops_rows)
        GATEWAY.log_detail = config.log_requests
        loop = asyncio.get_running_loop()
        GATEWAY.tasks = lambda: len(asyncio.all_tasks(loop))
        GATEWAY.failovers = lambda: {"continued": engine.continued, "given_up": engine.given_up}
        member_id = own_ids()[0]
        publisher(member_id, GATEWAY)
        set_up(traces or TracesConfig(), "gateway", member_id, model=model.served_name)
        self._doors = doors = Doors(config, keys)
        health = Health(
            _deployments,
            None if controller is None else lambda: _status_of(controller),
            is_draining=lambda: doors.is_draining,
        )
        self._front = Front(model, config, engine, health)
        await self._doors.open(await self._front.http_app(), self._front.services())
        self._drain_timeout_s = config.drain_timeout_s
        gc.freeze()  # modules: vLLM's alone make a full collection stop all streams for half a second

    def reconfigure(self, elastic: dict[str, float]) -> None:
        """What may change while the replica lives: `max_open_requests` and `drain_timeout_s`."""
        self._front.load.limit = int(elastic["max_open_requests"])
        self._drain_timeout_s = elastic["drain_timeout_s"]

    async def check_health(self) -> None:
        """Raises where one of its servers has ended; Serve replaces the replica then."""
        await self._doors.check()

    async def __del__(self) -> None:
        if hasattr(self, "_drain_timeout_s"):
            await self._doors.drain(self._drain_timeout_s)
            if self._inbox is not None:
                await self._inbox.close()
            await self._front.schemas.close()
            await asyncio.to_thread(shut_down)


async def _deployments() -> dict[str, DeploymentHealth]:
    """Every deployment of this replica's application, as Serve's controller sees it."""
    client = _get_global_client()
    assert client is not None, "a replica is always connected to Serve"
    app_name = serve.get_replica_context().app_name
    # Not serve.status(), which pickles a class per deployment. The call blocks on Ray: off the event loop.
    details = await asyncio.to_thread(client.get_serve_details)
    app = details["applications"].get(app_name)
    if app is None:
        raise ServingError("Serve does not know this application")
    return {
        name: DeploymentHealth(
            status=DeploymentStatus(deployment["status"]).value,
            replicas=dict(Counter(ReplicaState(replica["state"]).value for replica in deployment["replicas"])),
        )
        for name, deployment in app["deployments"].items()
    }


async def _status_of(controller: DeploymentHandle) -> Json:
    return cast("Json", await controller.status.remote())
