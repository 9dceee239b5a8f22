"""An attention replica's end of the links on which outputs travel to gateways: those of a step in one message.

    frame: u32 length of what follows, msgpack of [[call, place, output], ...]

call: the gateway's number for a request. place: of the output in its request, from 0. output: output_wire's bytes.
"""

import asyncio
import logging
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import msgspec

from cluster.continuation import ReplicaLost
from experts.errors import LinkError
from experts.handshake import Identity
from experts.link import connect

log = logging.getLogger(__name__)

Sent = tuple[int, int, bytes]  # call, place, output

LENGTH = struct.Struct("!I")
NO_MODEL = bytes(32)  # a fingerprint: of a gateway's model nothing has to be known here
MAX_WAITING_BYTES = 64 << 20  # for a gateway that does not read; then its requests end here
CONNECT_TIMEOUT_S = 2.0
AGAIN_S = 10.0  # after which a gateway that could not be reached is tried again

_encoder = msgspec.msgpack.Encoder()


class OutputLink(asyncio.Protocol):
    """A connection to one gateway."""

    def __init__(self) -> None:
        self._waiting: list[Sent] = []
        self.is_lost = False

    def send(self, call: int, place: int, output: bytes) -> None:
        """Sends it with everything else of this turn of the event loop. Raises ReplicaLost where the link is gone."""
        if self.is_lost:
            raise ReplicaLost("the link from the attention replica to this gateway broke; try again")
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append((call, place, output))

    def close(self) -> None:
        self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._transport.write(frame(waiting))
        if self._transport.get_write_buffer_size() > MAX_WAITING_BYTES:
            log.warning("a gateway does not read its outputs", extra={"bytes": MAX_WAITING_BYTES})
            self.is_lost = True
            self._transport.abort()


class OutputLinks:
    """The links of one attention replica, by the addresses of gateways; each is opened when it is first needed."""

    def __init__(self, secret: bytes, identity: Identity) -> None:
        self._secret = secret
        self._identity = identity
        self._tries: dict[str, _Try] = {}

    async def to(self, address: str) -> OutputLink | None:
        """None where the gateway cannot be reached, such as from another node: outputs go by Ray then."""
        tried = self._tries.get(address)
        if tried is None or tried.is_over():
            self._tries = {other: each for other, each in self._tries.items() if not each.is_over()}
            tried = self._tries[address] = _Try(asyncio.create_task(self._open(address)))
        return await asyncio.shield(tried.link)  # others wait for it, too

    def close(self) -> None:
        for tried in self._tries.values():
            if tried.link.done() and (link := tried.link.result()) is not None:
                link.close()

    async def _open(self, address: str) -> OutputLink | None:
        try:
            sock, _ = await asyncio.to_thread(
                connect, address, self._secret, self._identity, timeout_s=CONNECT_TIMEOUT_S
            )
            sock.setblocking(False)
            return (await asyncio.get_running_loop().create_unix_connection(OutputLink, sock=sock))[1]
        except (LinkError, OSError) as error:
            log.warning("outputs go to a gateway by Ray", extra={"gateway": address, "reason": str(error)})
            return None


@dataclass(frozen=True, slots=True)
class _Try:
    """An attempt to reach a gateway."""

    link: asyncio.Task[OutputLink | None]
    begun_s: float = field(default_factory=time.monotonic)

    def is_over(self) -> bool:
        """Whether its link has been lost, or another attempt is worth its time."""
        if not self.link.done():
            return False
        link = self.link.result()
        return time.monotonic() - self.begun_s > AGAIN_S if link is None else link.is_lost


def frame(outputs: Sequence[Sent]) -> bytes:
    """Outputs as one message of a link."""
    packed = _encoder.encode(outputs)
    return LENGTH.pack(len(packed)) + packed
