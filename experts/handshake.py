"""How two members of one cluster recognise each other before the first frame (mutual HMAC challenge and response).

    server -> client   greeting: magic, protocol version, server nonce
    client -> server   hello: client nonce, identity (role, member id, incarnation, fingerprint), HMAC("client", ...)
    server -> client   welcome: server incarnation, group, HMAC("server", ...)

Both HMACs cover both nonces and the identity, and begin with the word of their side: a proof can be neither
replayed nor reflected. All messages have a fixed length, so nothing is allocated by a peer's numbers.
"""

import hashlib
import hmac
import os
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from experts.errors import ConfigError, HandshakeError

_MAGIC = b"EXPERTMESH"
_PROTOCOL = 1
_NONCE_BYTES = 32
_GREETING = struct.Struct("<10sH32s")
_IDENTITY = struct.Struct("<B32sQ32s")
_HELLO = struct.Struct(f"<32s{_IDENTITY.size}s32s")
_WELCOME = struct.Struct("<Qi32s")
GREETING_BYTES, HELLO_BYTES, WELCOME_BYTES = _GREETING.size, _HELLO.size, _WELCOME.size
MIN_SECRET_BYTES = 32


class Role(IntEnum):
    ATTENTION = 1
    ROUTER = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who opens a link, and for which model."""

    role: Role
    member_id: str  # at most 32 bytes of ASCII
    incarnation: int  # fresh for every process start, never a pid
    fingerprint: bytes  # 32 bytes, SHA-256 over the checkpoint's headers

    def pack(self) -> bytes:
        return _IDENTITY.pack(
            self.role, self.member_id.encode("ascii", "replace")[:32], self.incarnation, self.fingerprint
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    incarnation: int
    group: int  # expert group of the server, -1 for a router


def read_secret(path: str | Path) -> bytes:
    """The cluster's secret. Raises ConfigError where it is missing, short, or readable by others.

    A process that is not root may read root's file by its group: so Kubernetes mounts a Secret.
    """
    file = Path(path)
    try:
        stat = file.stat()
        mode = stat.st_mode & (0o037 if stat.st_uid == 0 != os.geteuid() else 0o077)
        secret = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the cluster secret {file}: {error.strerror}") from None
    if mode:
        raise ConfigError(f"the cluster secret {file} can be read by others: chmod 600 it")
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(f"the cluster secret {file} has {len(secret)} bytes; it needs at least {MIN_SECRET_BYTES}")
    return secret


def write_secret(path: str | Path) -> None:
    """A fresh random secret in a file of mode 0600."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)  # a file that was there keeps its mode otherwise
        file.write(os.urandom(MIN_SECRET_BYTES))


def fresh_incarnation() -> int:
    """A number that no other process start has had."""
    return int.from_bytes(os.urandom(8), "little") >> 1


class ServerSide:
    """The server's half: send `greeting`, feed the hello to `answer`, send what it returns."""

    def __init__(
        self, secret: bytes, *, fingerprint: bytes, incarnation: int, group: int, roles: frozenset[Role]
    ) -> None:
        self._secret = secret
        self._fingerprint = fingerprint
        self._incarnation = incarnation
        self._group = group
        self._roles = roles
        self._nonce = os.urandom(_NONCE_BYTES)
        self.greeting = _GREETING.pack(_MAGIC, _PROTOCOL, self._nonce)

    def answer(self, hello: bytes) -> tuple[Identity, bytes]:
        """The peer's identity and the welcome for it. Raises HandshakeError."""
        client_nonce, identity_bytes, proof = _HELLO.unpack(hello)
        nonces = self._nonce + client_nonce
        if not hmac.compare_digest(proof, _proof(self._secret, b"client", nonces, identity_bytes)):
            raise HandshakeError("wrong secret")
        identity = _unpack_identity(identity_bytes)
        if identity.role not in self._roles:
            raise HandshakeError(f"role {identity.role.name} may not connect here")
        if identity.fingerprint != self._fingerprint:
            raise HandshakeError("the peer serves another checkpoint")
        mine = struct.pack("<Qi", self._incarnation, self._group)
        return identity, _WELCOME.pack(
            self._incarnation, self._group, _proof(self._secret, b"server", nonces, identity_bytes + mine)
        )


class ClientSide:
    """The client's half: feed the greeting to `hello`, send what it returns, feed the welcome to `check`."""

    def __init__(self, secret: bytes, identity: Identity) -> None:
        self._secret = secret
        self._identity = identity.pack()
        self._nonces = b""

    def hello(self, greeting: bytes) -> bytes:
        magic, protocol, server_nonce = _GREETING.unpack(greeting)
        if magic != _MAGIC or protocol != _PROTOCOL:
            raise HandshakeError(f"the peer does not speak protocol version {_PROTOCOL}")
        client_nonce = os.urandom(_NONCE_BYTES)
        self._nonces = server_nonce + client_nonce
        return _HELLO.pack(client_nonce, self._identity, _proof(self._secret, b"client", self._nonces, self._identity))

    def check(self, welcome: bytes) -> Welcome:
        incarnation, group, proof = _WELCOME.unpack(welcome)
        mine = struct.pack("<Qi", incarnation, group)
        if not hmac.compare_digest(proof, _proof(self._secret, b"server", self._nonces, self._identity + mine)):
            raise HandshakeError("the peer does not know the cluster's secret")
        return Welcome(incarnation=incarnation, group=group)


def _proof(secret: bytes, side: bytes, nonces: bytes, fields: bytes) -> bytes:
    message = side + struct.pack("<H", _PROTOCOL) + nonces + hashlib.sha256(fields).digest()
    return hmac.digest(secret, message, "sha256")


def _unpack_identity(packed: bytes) -> Identity:
    role, member_id, incarnation, fingerprint = _IDENTITY.unpack(packed)
    try:
        known_role = Role(role)
    except ValueError:
        raise HandshakeError(f"unknown role {role}") from None
    return Identity(
        role=known_role,
        member_id=member_id.rstrip(b"\0").decode("ascii", "replace"),
        incarnation=incarnation,
        fingerprint=fingerprint,
    )


def model_fingerprint(checkpoint_fingerprint: str, *, dtype: str, num_groups: int) -> bytes:
    """32 bytes that differ for whatever must be equal on both ends of a link: weights, their type, the split."""
    return hashlib.sha256(f"{checkpoint_fingerprint} {dtype} {num_groups}".encode()).digest()
