"""How a replica tells the controller that it lives: a lease, renewed with everything the controller must know of it."""

import logging
import os
import threading
import time
from collections.abc import Callable

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from experts.placement import Member

log = logging.getLogger(__name__)

RENEW_S = 1.0
CONTROLLER_TIMEOUT_S = 2.0  # below the lease: a slow answer must not cost a member its place
LEAVE_TIMEOUT_S = 3.0
STUCK_S = 30.0  # every call ends after CONTROLLER_TIMEOUT_S


class Lease(threading.Thread):
    """Renews one member's lease once a second until `stop`, and asks again when the controller is away."""

    def __init__(self, controller: DeploymentHandle, describe: Callable[[], Member]) -> None:
        """describe: the member as it is now; only its `details` may change over time."""
        super().__init__(name="lease", daemon=True)
        self._controller = controller
        self._describe = describe
        self._stopped = threading.Event()
        self._tried_s = time.monotonic()

    def run(self) -> None:
        while not self._stopped.is_set():
            self._tried_s = time.monotonic()
            self._call("renew", lambda member: (member,))
            self._stopped.wait(RENEW_S)
        self._call("leave", lambda member: (member.member_id, member.incarnation))

    def check(self) -> None:
        """Raises where nobody tries to renew the lease any more; a replica's health check calls this."""
        stuck_s = time.monotonic() - self._tried_s
        if not self.is_alive() or stuck_s > STUCK_S:
            raise RuntimeError(f"the lease has not been renewed for {stuck_s:.0f} s, and its thread is dead or stuck")

    def stop(self) -> None:
        """Leaves the cluster: nothing is sent here from now on."""
        # This thread says so, since Serve stops a replica on its event loop, where nothing may be waited for.
        self._stopped.set()
        self.join(LEAVE_TIMEOUT_S)

    def _call(self, method: str, arguments: Callable[[Member], tuple[object, ...]]) -> None:
        try:
            response = getattr(self._controller, method).remote(*arguments(self._describe()))
            response.result(timeout_s=CONTROLLER_TIMEOUT_S)
        except Exception as error:  # Ray raises many kinds for a controller that restarts; all of them mean: later
            log.warning("controller not reached", extra={"method": method, "reason": str(error)[:200]})


def own_ids() -> tuple[str, str, int]:
    """(member id, Ray node id, pid) of the Serve replica that calls."""
    unique = serve.get_replica_context().replica_id.unique_id
    name = f"{serve.get_replica_context().deployment}#{unique}"
    return name[:32], ray.get_runtime_context().get_node_id(), os.getpid()
