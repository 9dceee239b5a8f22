"""How much a gateway replica has open, over all of its surfaces, and when it is enough."""

from collections.abc import Iterator
from contextlib import contextmanager

from cluster.gateway_errors import Overloaded


class OpenRequests:
    """Counts the generations that are open here; used from one event loop."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """A request, as long as the block takes. Raises Overloaded, at once, where there are enough already."""
        if self.count >= self.limit:
            raise Overloaded(f"{self.count} requests are open here, and no more are taken; try again")
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1
