"""How much a gateway replica has open, over all of its surfaces, and when it is enough."""

from collections.abc import Iterator
from contextlib import contextmanager

from cluster.gateway_errors import Overloaded


class OpenRequests:
    """Counts the generations that are open here; used from one event loop, but for `check`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0

    def check(self) -> None:
        """Raises Overloaded, at once, where there are enough already; from any thread."""
        if self.count >= self.limit:
            raise Overloaded(f"{self.count} requests are open here, and no more are taken; try again")

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """A request, as long as the block takes. Raises as `check` does."""
        self.check()
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1
