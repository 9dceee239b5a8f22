"""Waiting for Serve until the application is as it should be, with what is missing shown meanwhile."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from experts.errors import ExpertmeshError

if TYPE_CHECKING:
    from ray.serve._private.application_state import StatusOverview
    from ray.serve._private.client import ServeControllerClient

START_TIMEOUT_S = 600.0
POLL_S = 1.0
Say = Callable[[str], None]


class StartError(ExpertmeshError):
    """The cluster did not come up; the text says which part, and why."""


def wait_until_running(client: "ServeControllerClient", *, started_s: float, say: Say) -> None:
    """Shows progress until every deployment is healthy. Raises StartError with the reason of what failed.

    started_s: on time.monotonic(), what the shown seconds and START_TIMEOUT_S are counted from.
    """
    from deploy.app import APP_NAME  # imports Ray, whose environment must be set by then

    shown = ""
    while time.monotonic() - started_s < START_TIMEOUT_S:
        # Not serve.status(): it pickles a class per deployment, which takes a second of CPU each time.
        app = client.get_serve_status(APP_NAME)
        if app.app_status.status == "RUNNING":
            say(f"ready after {time.monotonic() - started_s:.0f} s")
            return
        if app.app_status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise StartError(_why(app))
        progress = _progress(app)
        if progress != shown:
            shown = progress
            say(f"{time.monotonic() - started_s:4.0f} s  {progress}")
        time.sleep(POLL_S)
    raise StartError(f"the cluster was not ready after {START_TIMEOUT_S:.0f} s: {shown}")


def last_sentence(message: str) -> str:
    """Of a traceback, what it says: our own errors are one sentence there."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    ours = [line for line in lines if "experts.errors." in line]
    return (ours or lines or ["no reason given"])[-1]


def _progress(app: "StatusOverview") -> str:
    """Deployments that are up, and those that are not."""
    waiting = sorted(d.name for d in app.deployment_statuses if d.status != "HEALTHY")
    total = len(app.deployment_statuses)
    if not total:
        return "building the application"
    return f"{total - len(waiting)} of {total} deployments up, waiting for {', '.join(waiting)}"


def _why(app: "StatusOverview") -> str:
    """What a replica said when it failed."""
    for deployment in sorted(app.deployment_statuses, key=lambda d: d.name):
        if deployment.status not in ("HEALTHY", "UPDATING") and deployment.message:
            return f"{deployment.name} did not start: {last_sentence(deployment.message)}"
    return f"the application did not start: {last_sentence(app.app_status.message)}"
