"""Outputs on their way over links: in order, never lost without a word, and from nobody without the secret."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import pytest
from inbox_fakes import identity, open_inbox
from vllm.outputs import CompletionOutput, RequestOutput

from cluster import output_inbox, output_link
from cluster.continuation import ReplicaLost
from cluster.output_inbox import Inbox, Mailbox
from cluster.output_link import LENGTH, OutputLink, OutputLinks, frame
from experts.handshake import GREETING_BYTES, WELCOME_BYTES, ClientSide, Role, read_secret

SLOW = RequestOutput(
    request_id="r",
    prompt=None,
    prompt_token_ids=[1],
    prompt_logprobs=[None],
    outputs=[CompletionOutput(index=0, text="", token_ids=[], cumulative_logprob=None, logprobs=[])],
    finished=True,
)


@pytest.fixture
async def inbox(tmp_path: Path) -> AsyncIterator[Inbox]:
    async with open_inbox(tmp_path) as inbox:
        yield inbox


@pytest.fixture
def secret(inbox: Inbox, tmp_path: Path) -> bytes:
    return read_secret(tmp_path / "secret")


async def opened(links: OutputLinks, inbox: Inbox) -> OutputLink:
    link = await links.to(inbox.address)
    assert link is not None
    return link


async def read_all(box: Mailbox) -> list[bytes | RequestOutput]:
    found = []
    while (output := await asyncio.wait_for(box.next(), 5)) is not None:
        found.append(output)
    return found


async def test_outputs_come_to_the_call_that_they_belong_to(inbox: Inbox, secret: bytes) -> None:
    with (
        closing(OutputLinks(secret, identity())) as links,
        inbox.mailbox() as (a, box_a),
        inbox.mailbox() as (b, box_b),
    ):
        link = await opened(links, inbox)
        for place in range(3):
            link.send(a, place, b"a%d" % place)
            link.send(b, place, b"b" * 300_000)
        box_a.end(3)
        box_b.end(3)
        assert await read_all(box_a) == [b"a0", b"a1", b"a2"]
        assert await read_all(box_b) == [b"b" * 300_000] * 3
        assert await opened(links, inbox) is link  # one for all calls


async def test_an_output_that_came_by_ray_is_read_in_its_place(inbox: Inbox, secret: bytes) -> None:
    with closing(OutputLinks(secret, identity())) as links, inbox.mailbox() as (call, box):
        box.put(1, SLOW)
        box.end(3)
        link = await opened(links, inbox)
        link.send(call, 0, b"first")
        link.send(call, 2, b"last")
        assert await read_all(box) == [b"first", SLOW, b"last"]


async def test_what_came_is_read_before_the_error_is() -> None:
    box = Mailbox()
    box.put(0, b"first")
    box.fail(ReplicaLost("gone"))
    assert await box.next() == b"first"
    with pytest.raises(ReplicaLost, match="gone"):
        await box.next()


async def test_an_output_that_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_inbox, "LATE_S", 0.05)
    box = Mailbox()
    box.put(0, b"first")
    box.end(2)
    assert await box.next() == b"first"
    with pytest.raises(ReplicaLost, match="lost on their way"):
        await asyncio.wait_for(box.next(), 5)


async def test_an_answer_of_no_outputs_ends() -> None:
    box = Mailbox()
    reading = asyncio.create_task(box.next())
    await asyncio.sleep(0)
    box.end(0)
    assert await reading is None


async def test_outputs_for_a_call_that_is_over_are_dropped(inbox: Inbox, secret: bytes) -> None:
    with closing(OutputLinks(secret, identity())) as links:
        link = await opened(links, inbox)
        with inbox.mailbox() as (gone, _):
            pass
        with inbox.mailbox() as (call, box):
            link.send(gone, 0, b"late")
            link.send(call, 0, b"mine")
            box.end(1)
            assert await read_all(box) == [b"mine"]


async def test_a_broken_link_is_an_error_and_the_next_request_opens_another_one(inbox: Inbox, secret: bytes) -> None:
    with closing(OutputLinks(secret, identity())) as links, inbox.mailbox() as (call, box):
        link = await opened(links, inbox)
        for incoming in list(inbox._links):
            incoming.hang_up()
        await until(lambda: link.is_lost)
        with pytest.raises(ReplicaLost, match="link"):
            link.send(call, 0, b"x")
        another = await opened(links, inbox)
        assert another is not link
        another.send(call, 0, b"x")
        box.end(1)
        assert await read_all(box) == [b"x"]


async def test_a_gateway_that_does_not_read_loses_the_link_and_not_the_replica(
    inbox: Inbox, secret: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_link, "MAX_WAITING_BYTES", 1000)
    with closing(OutputLinks(secret, identity())) as links:
        link = await opened(links, inbox)
        link.send(0, 0, bytes(64 << 20))
        await until(lambda: link.is_lost)


async def test_who_cannot_be_reached_is_not_asked_again_at_once(
    inbox: Inbox, secret: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(OutputLinks(secret, identity())) as links:
        nobody = f"unix:{tmp_path}/nobody.sock"
        assert await links.to(nobody) is None
        os.rename(inbox.address.removeprefix("unix:"), nobody.removeprefix("unix:"))
        assert await links.to(nobody) is None
        monkeypatch.setattr(output_link, "AGAIN_S", 0.0)
        assert await links.to(nobody) is not None
        assert list(links._tries) == [nobody]
        os.rename(nobody.removeprefix("unix:"), inbox.address.removeprefix("unix:"))


@pytest.mark.parametrize(("wrong_secret", "role"), [(True, Role.ATTENTION), (False, Role.ROUTER)])
async def test_who_is_no_attention_replica_of_this_cluster_gets_no_link(
    inbox: Inbox, secret: bytes, wrong_secret: bool, role: Role
) -> None:
    with closing(OutputLinks(bytes(32) if wrong_secret else secret, identity(role))) as links:
        assert await links.to(inbox.address) is None


@pytest.mark.parametrize(
    "nonsense",
    [
        LENGTH.pack(1 << 31),
        LENGTH.pack(3) + b"\xc1\xc1\xc1",
        frame([("call", 0, b"")]),  # type: ignore[list-item]
        LENGTH.pack(1) + b"\x01",
    ],
)
async def test_who_says_what_is_no_output_is_hung_up_on(inbox: Inbox, secret: bytes, nonsense: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(inbox.address.removeprefix("unix:"))
    client = ClientSide(secret, identity())
    writer.write(client.hello(await reader.readexactly(GREETING_BYTES)))
    client.check(await reader.readexactly(WELCOME_BYTES))
    writer.write(nonsense)
    assert await asyncio.wait_for(ended(reader), 5)
    writer.close()


def test_a_closed_inbox_leaves_no_file(tmp_path: Path) -> None:
    async def once() -> None:
        async with open_inbox(tmp_path):
            pass

    asyncio.run(once())
    assert [file.name for file in tmp_path.iterdir()] == ["secret"]


async def test_who_says_nothing_is_hung_up_on(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_inbox, "HANDSHAKE_S", 0.1)
    reader, writer = await asyncio.open_unix_connection(inbox.address.removeprefix("unix:"))
    await reader.readexactly(GREETING_BYTES)
    assert await asyncio.wait_for(ended(reader), 5)
    writer.close()


async def ended(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read() == b""
    except ConnectionResetError:
        return True


async def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.01)
