"""One router of a node works, the others stand by: whose turn it is."""

import fcntl
import logging
import os
import threading
from pathlib import Path

log = logging.getLogger(__name__)


class Turn(threading.Thread):
    """Waits until no other router of the node works, then gives its own socket the name that engines connect to.

    The lock is the kernel's: it is free at the very moment when its process ends, however that happens. Whoever stands
    by has everything ready, so the engines miss the router for as long as it takes them to connect again.
    """

    def __init__(self, *, own: Path, shared: Path) -> None:
        """own: the Unix socket that this router listens on. shared: in the same folder, where the engines look."""
        super().__init__(name="turn", daemon=True)
        self._own = own
        self._shared = shared
        self._lock = os.open(shared.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        self._stopped = threading.Event()
        self._has_come = threading.Event()

    @property
    def has_come(self) -> bool:
        """Whether this router is the one that works."""
        return self._has_come.is_set()

    def run(self) -> None:
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        if self._stopped.is_set():
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            return
        # Put into its place as a whole: who connects meanwhile finds the old socket, and tries again.
        beside = self._own.with_suffix(".new")
        os.link(self._own, beside)
        beside.rename(self._shared)
        self._has_come.set()
        log.info("this router works now", extra={"socket": self._own.name})

    def stop(self) -> None:
        """Leaves the turn to whoever stands by. Without effect on the sockets."""
        self._stopped.set()
        fcntl.flock(self._lock, fcntl.LOCK_UN)
