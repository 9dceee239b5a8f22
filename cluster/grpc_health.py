"""The service grpc.health.v1.Health: "" is this process, a service's name the cluster behind it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.gateway_errors import NoSuchService
from cluster.gateway_health import Health, serving_status
from cluster.grpc_answer import Context, abort_with

HEALTH = "grpc.health.v1.Health"
WATCH_EVERY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthService(health_pb2_grpc.HealthServicer):
    """services: full names that are served."""

    health: Health
    services: tuple[str, ...]

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        status = await self._status_of(request.service)
        if status is None:
            await abort_with(context, NoSuchService(f"service: there is no {request.service[:64]!r} here"))
        return health_pb2.HealthCheckResponse(status=status)

    async def List(self, request: Message, context: Context) -> Message:
        statuses = {
            service: health_pb2.HealthCheckResponse(status=await self._status_of(service))
            for service in ("", *self.services)
        }
        # The package's type stub is older than its List.
        return health_pb2.HealthListResponse(statuses=statuses)  # pyright: ignore[reportAttributeAccessIssue]

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now, and each time it changes, until the client or this gateway goes."""
        before: str | None = None
        while True:
            status = await self._status_of(request.service) or "SERVICE_UNKNOWN"
            if status != before:
                yield health_pb2.HealthCheckResponse(status=status)
            before = status
            if self.health.is_draining():
                return  # it has been told, and would keep us from ending
            await asyncio.sleep(WATCH_EVERY_S)

    async def _status_of(self, service: str) -> str | None:
        if service and service not in self.services:
            return None
        if not service:
            return "NOT_SERVING" if self.health.is_draining() else "SERVING"
        return await serving_status(self.health)
