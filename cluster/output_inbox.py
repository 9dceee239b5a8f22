"""A gateway's end of the links on which attention replicas send outputs (cluster/output_link.py)."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, cast

import msgspec

from cluster.continuation import ReplicaLost
from cluster.output_link import LENGTH, MAX_WAITING_BYTES, NO_MODEL, Sent
from experts.errors import FrameError, HandshakeError
from experts.handshake import HELLO_BYTES, Role, ServerSide, fresh_incarnation, read_secret
from experts.link import listen, socket_id, unlink_if_ours

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

log = logging.getLogger(__name__)

HANDSHAKE_S = 2.0
LATE_S = 5.0  # by so much an output may come behind the end of its call; its link is gone otherwise

_decoder = msgspec.msgpack.Decoder(list[Sent])


@dataclass(frozen=True, slots=True, kw_only=True)
class InboxOptions:
    """Where a gateway's inbox is; only replicas on its node find it there."""

    runtime_dir: str
    secret_file: str


class Mailbox:
    """The outputs of one call, on whatever way they come, in their order."""

    def __init__(self) -> None:
        self._outputs: dict[int, bytes | RequestOutput] = {}  # by place
        self._next = 0
        self._num_outputs: int | None = None  # None: not known yet
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, place: int, output: "bytes | RequestOutput") -> None:
        self._outputs[place] = output
        self._wake()

    def end(self, num_outputs: int) -> None:
        """No more than these will come. Those that are late are given up after LATE_S."""
        self._num_outputs = num_outputs
        if self._next + len(self._outputs) < num_outputs:
            lost = ReplicaLost("outputs of the attention replica were lost on their way; try again")
            asyncio.get_running_loop().call_later(LATE_S, self.fail, lost)
        self._wake()

    def fail(self, error: Exception) -> None:
        """What has come is read before the error is."""
        self._error = error
        self._wake()

    async def next(self) -> "bytes | RequestOutput | None":
        """The next output; None behind the last one. Raises what the call failed of."""
        while (output := self._outputs.pop(self._next, None)) is None:
            if self._next == self._num_outputs:
                return None
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._next += 1
        return output

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Inbox:
    """Takes the links of attention replicas, and sorts what comes on them into mailboxes."""

    def __init__(self, options: InboxOptions) -> None:
        """Raises ConfigError for a secret that cannot be read."""
        self._secret = read_secret(options.secret_file)
        self._incarnation = fresh_incarnation()
        self.address = f"unix:{options.runtime_dir}/g-{self._incarnation:x}.sock"
        self._calls = count()
        self._mailboxes: dict[int, Mailbox] = {}
        self._links: set[_Incoming] = set()

    async def open(self) -> None:
        """Listens, on the running event loop. Raises ConfigError, OSError."""
        sock, _ = listen(self.address)
        self._socket_id = socket_id(self.address)
        self._server = await asyncio.get_running_loop().create_unix_server(lambda: _Incoming(self), sock=sock)

    async def close(self) -> None:
        self._server.close()
        for link in list(self._links):
            link.hang_up()
        unlink_if_ours(self.address, self._socket_id)

    @contextmanager
    def mailbox(self) -> Iterator[tuple[int, Mailbox]]:
        """For a new call: its number, and where its outputs come to."""
        call, box = next(self._calls), Mailbox()
        self._mailboxes[call] = box
        try:
            yield call, box
        finally:
            del self._mailboxes[call]

    def sort(self, outputs: list[Sent]) -> None:
        for call, place, output in outputs:
            if (box := self._mailboxes.get(call)) is not None:  # else nobody waits for it any more
                box.put(place, output)

    def server_side(self) -> ServerSide:
        """A handshake for one link."""
        return ServerSide(
            self._secret,
            fingerprint=NO_MODEL,
            incarnation=self._incarnation,
            group=-1,
            roles=frozenset({Role.ATTENTION}),
        )

    def came(self, link: "_Incoming") -> None:
        self._links.add(link)

    def left(self, link: "_Incoming") -> None:
        self._links.discard(link)


class _Incoming(asyncio.Protocol):
    """A link from one attention replica. Who says anything that is no output is hung up on."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._side: ServerSide | None = inbox.server_side()
        self._received = bytearray()

    def hang_up(self) -> None:
        self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert self._side is not None
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        self._inbox.came(self)
        self._late = asyncio.get_running_loop().call_later(HANDSHAKE_S, self.hang_up)
        self._transport.write(self._side.greeting)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._side is None or self._is_welcome(self._side):
            try:
                self._take_messages()
            except (FrameError, msgspec.MsgspecError) as error:
                self._refuse(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
        self._inbox.left(self)

    def _take_messages(self) -> None:
        received, begin = memoryview(bytes(self._received)), 0
        while len(received) - begin >= LENGTH.size:
            (length,) = LENGTH.unpack_from(received, begin)
            if length > MAX_WAITING_BYTES:
                raise FrameError(f"a message of {length} bytes; {MAX_WAITING_BYTES} are the most")
            end = begin + LENGTH.size + length
            if len(received) < end:
                break
            self._inbox.sort(_decoder.decode(received[begin + LENGTH.size : end]))
            begin = end
        del self._received[:begin]

    def _is_welcome(self, side: ServerSide) -> bool:
        if len(self._received) < HELLO_BYTES:
            return False
        try:
            _, welcome = side.answer(bytes(self._received[:HELLO_BYTES]))
        except HandshakeError as error:
            self._refuse(str(error))
            return False
        del self._received[:HELLO_BYTES]
        self._side = None
        self._late.cancel()
        self._transport.write(welcome)
        return True

    def _refuse(self, reason: str) -> None:
        log.warning("a link for outputs is refused", extra={"reason": reason})
        self.hang_up()
