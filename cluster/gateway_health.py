"""Is the gateway alive, and is the cluster behind it ready? One answer for HTTP, gRPC health and the status page."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.gateway_errors import refusal_of
from experts.errors import ServingError

log = logging.getLogger(__name__)

Json = dict[str, object]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentHealth:
    """One Serve deployment, as Serve tells it."""

    status: str  # Serve's word: HEALTHY, UPDATING, …
    replicas: dict[str, int]  # state -> how many

    @property
    def can_serve(self) -> bool:
        return self.replicas.get("RUNNING", 0) > 0


@dataclass(slots=True)
class Health:
    """What the gateway knows of the cluster, asked for at most once every `max_age_s` and never longer than timeout_s.

    deployments: asks Serve; the controller's own page is asked for only by the status page.
    """

    deployments: Callable[[], Awaitable[dict[str, DeploymentHealth]]]
    controller: Callable[[], Awaitable[Json]] | None = None
    is_draining: Callable[[], bool] = lambda: False  # this gateway is about to go
    max_age_s: float = 1.0
    timeout_s: float = 5.0
    _seen: dict[str, DeploymentHealth] = field(default_factory=dict)
    _seen_at_s: float = float("-inf")

    async def missing(self) -> list[str]:
        """Deployments that have no running replica; empty when the cluster is ready.

        Raises ServingError where that is not known, and where this gateway drains.
        """
        if self.is_draining():
            raise ServingError("this gateway drains; try again")
        deployments = await self._ask()
        return sorted(name for name, health in deployments.items() if not health.can_serve)

    async def status(self) -> Json:
        """The status page: the controller's, and every deployment of the application, as Serve told it last.

        Raises ServingError where Serve has never told.
        """
        try:
            deployments = await self._ask()
        except ServingError:
            # Serve is busy, most likely because something has just happened: the very moment to show what is known.
            if not self._seen:
                raise
            deployments = self._seen
        page: Json = {
            "ready": all(health.can_serve for health in deployments.values()),
            "deployments_age_s": round(time.monotonic() - self._seen_at_s, 1),
        }
        if self.controller is not None:
            try:
                page["controller"] = await self._bounded(self.controller())
            except ServingError:
                page["controller"] = None  # it is being replaced; the rest of the page is true without it
        page["deployments"] = {
            name: {"status": health.status, "replicas": health.replicas} for name, health in deployments.items()
        }
        return page

    async def _ask(self) -> dict[str, DeploymentHealth]:
        now_s = time.monotonic()
        if now_s - self._seen_at_s > self.max_age_s:
            self._seen = await self._bounded(self.deployments())
            self._seen_at_s = now_s
        return self._seen

    async def _bounded(self, answer: Awaitable[_T]) -> _T:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await answer
        except Exception as exc:
            log.warning("the cluster's state could not be read", exc_info=exc)
            raise ServingError("the cluster's state could not be read; try again") from exc


def health_routes(health: Health) -> list[Route]:
    """/health (this process), /ready (the whole cluster) and /expertmesh/status."""

    async def live(_: Request) -> Response:
        return Response(status_code=200)

    async def ready(_: Request) -> Response:
        try:
            missing = await health.missing()
        except ServingError as exc:
            return _refused(exc)
        if missing:
            return _refused(ServingError(f"not ready: no running replica of {', '.join(missing)}"))
        return Response(status_code=200)

    async def status(_: Request) -> Response:
        try:
            return JSONResponse(await health.status())
        except ServingError as exc:
            return _refused(exc)

    return [Route("/health", live), Route("/ready", ready), Route("/expertmesh/status", status)]


def _refused(exc: ServingError) -> JSONResponse:
    refusal = refusal_of(exc)
    return JSONResponse(refusal.body, status_code=refusal.http_status)


ServingStatus = Literal["SERVING", "NOT_SERVING"]


async def serving_status(health: Health) -> ServingStatus:
    """The same in grpc.health.v1's words; a cluster that cannot be asked is not serving."""
    try:
        return "NOT_SERVING" if await health.missing() else "SERVING"
    except ServingError:
        return "NOT_SERVING"
