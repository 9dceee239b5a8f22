"""The mutual proof of two members: who may not pass, and what the secret's file must be."""

import os
import stat
import struct
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from experts.errors import ConfigError, HandshakeError
from experts.handshake import (
    GREETING_BYTES,
    HELLO_BYTES,
    MIN_SECRET_BYTES,
    WELCOME_BYTES,
    ClientSide,
    Identity,
    Role,
    ServerSide,
    Welcome,
    fresh_incarnation,
    model_fingerprint,
    read_secret,
    write_secret,
)

SECRET = bytes(range(32))
OTHER = bytes(32)
MODEL = model_fingerprint("abc", dtype="float32", num_groups=4)
ME = Identity(role=Role.ROUTER, member_id="router#1", incarnation=2**63 - 1, fingerprint=MODEL)


def server(secret: bytes = SECRET, *, fingerprint: bytes = MODEL) -> ServerSide:
    return ServerSide(secret, fingerprint=fingerprint, incarnation=77, group=3, roles=frozenset({Role.ROUTER}))


def test_with_one_secret_each_learns_who_the_other_is() -> None:
    there, here = server(), ClientSide(SECRET, ME)
    hello = here.hello(there.greeting)
    identity, welcome = there.answer(hello)
    assert identity == ME
    assert here.check(welcome) == Welcome(incarnation=77, group=3)
    assert (len(there.greeting), len(hello), len(welcome)) == (GREETING_BYTES, HELLO_BYTES, WELCOME_BYTES)


def test_a_client_with_another_secret_is_refused() -> None:
    there = server()
    with pytest.raises(HandshakeError, match="secret"):
        there.answer(ClientSide(OTHER, ME).hello(there.greeting))


def test_a_server_with_another_secret_is_refused_by_the_client() -> None:
    here, there = ClientSide(SECRET, ME), server()
    hello = here.hello(there.greeting)
    there.answer(hello)
    impostor_client = ClientSide(OTHER, ME)
    impostor = server(OTHER)
    _, welcome = impostor.answer(impostor_client.hello(impostor.greeting))
    with pytest.raises(HandshakeError, match="secret"):
        here.check(welcome)


def test_a_replayed_hello_is_refused() -> None:
    first = server()
    hello = ClientSide(SECRET, ME).hello(first.greeting)
    first.answer(hello)
    with pytest.raises(HandshakeError):
        server().answer(hello)


def test_a_replayed_welcome_is_refused() -> None:
    there = server()
    _, welcome = there.answer(ClientSide(SECRET, ME).hello(there.greeting))
    again = ClientSide(SECRET, ME)
    again.hello(there.greeting)
    with pytest.raises(HandshakeError):
        again.check(welcome)


def test_a_clients_own_proof_sent_back_is_refused() -> None:
    here = ClientSide(SECRET, ME)
    proof = here.hello(server().greeting)[-32:]
    with pytest.raises(HandshakeError):
        here.check(struct.pack("<Qi32s", 77, 3, proof))


@pytest.mark.parametrize("position", range(0, HELLO_BYTES, 7))
def test_a_hello_with_any_byte_changed_is_refused(position: int) -> None:
    there = server()
    hello = bytearray(ClientSide(SECRET, ME).hello(there.greeting))
    hello[position] ^= 1
    with pytest.raises(HandshakeError):
        there.answer(bytes(hello))


@pytest.mark.parametrize("position", range(0, WELCOME_BYTES, 5))
def test_a_welcome_with_any_byte_changed_is_refused(position: int) -> None:
    there, here = server(), ClientSide(SECRET, ME)
    _, welcome = there.answer(here.hello(there.greeting))
    changed = bytearray(welcome)
    changed[position] ^= 0x80
    with pytest.raises(HandshakeError):
        here.check(bytes(changed))


def test_another_checkpoint_dtype_or_split_is_refused() -> None:
    for other in (
        model_fingerprint("abd", dtype="float32", num_groups=4),
        model_fingerprint("abc", dtype="bfloat16", num_groups=4),
        model_fingerprint("abc", dtype="float32", num_groups=8),
    ):
        there = server()
        with pytest.raises(HandshakeError, match="another checkpoint"):
            there.answer(ClientSide(SECRET, replace(ME, fingerprint=other)).hello(there.greeting))


def test_a_role_that_has_no_business_here_is_refused() -> None:
    there = server()
    with pytest.raises(HandshakeError, match="ATTENTION"):
        there.answer(ClientSide(SECRET, replace(ME, role=Role.ATTENTION)).hello(there.greeting))


def test_foreign_bytes_are_refused_on_both_sides() -> None:
    for data in (b"GET / HTTP/1.1\r\n", b"\x80\x04", b"", b"\xff" * HELLO_BYTES):
        with pytest.raises(HandshakeError):
            server().answer(data.ljust(HELLO_BYTES, b"\0")[:HELLO_BYTES])
        with pytest.raises(HandshakeError, match="protocol"):
            ClientSide(SECRET, ME).hello(data.ljust(GREETING_BYTES, b"\0")[:GREETING_BYTES])
        here = ClientSide(SECRET, ME)
        here.hello(server().greeting)
        with pytest.raises(HandshakeError):
            here.check(data.ljust(WELCOME_BYTES, b"\0")[:WELCOME_BYTES])


def test_another_protocol_version_is_refused() -> None:
    greeting = bytearray(server().greeting)
    greeting[10] += 1
    with pytest.raises(HandshakeError, match="protocol version 1"):
        ClientSide(SECRET, ME).hello(bytes(greeting))


def test_a_long_or_foreign_member_id_is_cut_and_never_an_error() -> None:
    there = server()
    identity, _ = there.answer(ClientSide(SECRET, replace(ME, member_id="é" * 40)).hello(there.greeting))
    assert identity.member_id == "?" * 32


def test_no_two_starts_share_a_nonce_or_an_incarnation() -> None:
    assert len({server().greeting for _ in range(100)}) == 100
    assert len({fresh_incarnation() for _ in range(100)}) == 100
    assert all(0 <= fresh_incarnation() < 2**63 for _ in range(100))


def test_a_written_secret_is_private_and_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    write_secret(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(read_secret(file)) == MIN_SECRET_BYTES
    assert read_secret(file) == read_secret(file)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_a_secret_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "secret"
    write_secret(file)
    os.chmod(file, mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_secret(file)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a file of root's")
@pytest.mark.parametrize(("mode", "is_read"), [(0o440, True), (0o640, True), (0o660, False), (0o444, False)])
def test_a_process_that_is_not_root_may_read_roots_secret_by_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, is_read: bool
) -> None:
    file = tmp_path / "secret"
    write_secret(file)
    os.chmod(file, mode)
    monkeypatch.setattr(os, "geteuid", lambda: 10001)
    with nullcontext() if is_read else pytest.raises(ConfigError, match="chmod 600"):
        assert len(read_secret(file)) == MIN_SECRET_BYTES


def test_a_short_or_missing_secret_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    with pytest.raises(ConfigError, match="cannot read the cluster secret"):
        read_secret(file)
    write_secret(file)
    file.write_bytes(b"x" * (MIN_SECRET_BYTES - 1))
    with pytest.raises(ConfigError, match="31 bytes"):
        read_secret(file)
