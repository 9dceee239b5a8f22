"""uvicorn's HTTP connections with a limit that it lacks: who does not say what he wants in time is hung up on.

Without it, anybody could hold connections for ever, with headers that drip in, or with none.
"""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 10.0  # from the connection, or the first bytes of a later request, to the end of a request's headers


class PromptH11(H11Protocol):
    """One connection. Key checks and bodies come after the headers, and have limits of their own."""

    _hang_up: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_watching()
        elif self._hang_up is None:
            self._hang_up = self.loop.call_later(HEADERS_S, self._on_late)

    def _stop_watching(self) -> None:
        if self._hang_up is not None:
            self._hang_up.cancel()
            self._hang_up = None

    def _on_late(self) -> None:
        self._hang_up = None
        if self.conn.their_state is h11.IDLE:
            self.transport.close()
