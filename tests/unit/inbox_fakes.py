"""A gateway's inbox, and an attention replica's links to it, without Ray."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from cluster.output_inbox import Inbox, InboxOptions
from cluster.output_link import NO_MODEL, OutputLinks
from experts.handshake import Identity, Role, read_secret, write_secret


@asynccontextmanager
async def open_inbox(folder: Path) -> AsyncIterator[Inbox]:
    write_secret(folder / "secret")
    inbox = Inbox(InboxOptions(runtime_dir=str(folder), secret_file=str(folder / "secret")))
    await inbox.open()
    yield inbox
    await inbox.close()


def identity(role: Role = Role.ATTENTION) -> Identity:
    return Identity(role=role, member_id="attention#1", incarnation=1, fingerprint=NO_MODEL)


def links_of(folder: Path) -> OutputLinks:
    return OutputLinks(read_secret(folder / "secret"), identity())
