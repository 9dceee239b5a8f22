"""The gateway's two doors: an HTTP and a gRPC server of its own in every gateway replica.

Replicas on one node share the ports (SO_REUSEPORT): the kernel gives each new connection to one of them, and a replica
that drains takes no more. Why they do not stand behind Serve's proxies is in docs/adr/0008-own-servers.md.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc
import uvicorn
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from starlette.types import ASGIApp

from cluster.config import GatewayConfig
from cluster.gateway_keys import MAX_HEADER_BYTES, KeyedApp, KeyedServices
from cluster.grpc_bridge import Bridge, BridgeServer, Check
from cluster.keys import Keys
from cluster.prompt_http import HEADERS_S, PromptH11
from experts.errors import ConfigError

MAX_STREAMS = 100  # RPCs of one connection at a time
log = logging.getLogger(__name__)

KEEPALIVE_S = 30.0  # a peer that is gone without a word is noticed after this and PING_TIMEOUT_S
PING_TIMEOUT_S = 20.0
END_MARGIN_S = 5.0  # for the servers themselves, once nothing is open any more
_BACKLOG = 1024
_STARTED_EVERY_S = 0.01
_CONNECT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """PEM files; with client_ca, clients must show a certificate of it, too."""

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None

    @classmethod
    def of(cls, config: GatewayConfig) -> "Tls | None":
        """None where the config names no certificate. Raises ConfigError for files that cannot be used."""
        if config.tls_cert_file is None or config.tls_key_file is None:
            return None
        ca = config.tls_client_ca_file
        try:
            ssl.create_default_context(cafile=ca).load_cert_chain(config.tls_cert_file, config.tls_key_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"gateway.tls_cert_file, tls_key_file, tls_client_ca_file: {error}") from None
        return cls(
            cert_file=Path(config.tls_cert_file),
            key_file=Path(config.tls_key_file),
            client_ca_file=None if ca is None else Path(ca),
        )

    @property
    def grpc_credentials(self) -> grpc.ServerCredentials:
        ca = None if self.client_ca_file is None else self.client_ca_file.read_bytes()
        pair = (self.key_file.read_bytes(), self.cert_file.read_bytes())
        return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)

    @property
    def uvicorn_options(self) -> dict[str, object]:
        wanted = ssl.CERT_NONE if self.client_ca_file is None else ssl.CERT_REQUIRED
        return {
            "ssl_certfile": self.cert_file,
            "ssl_keyfile": self.key_file,
            "ssl_ca_certs": self.client_ca_file,
            "ssl_cert_reqs": wanted,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What the gRPC server serves: each entry adds one service."""

    names: tuple[str, ...]  # full names, for reflection
    add: Sequence[Callable[[Bridge], object]]
    check: Check = field(default=lambda details: None)  # of an RPC, once its key has been judged

    def add_all(self, bridge: Bridge) -> None:
        """All of them, and reflection."""
        described = reflection.aio.ReflectionServicer((*self.names, reflection.SERVICE_NAME))
        for add in (*self.add, partial(reflection_pb2_grpc.add_ServerReflectionServicer_to_server, described)):
            add(bridge)


class Doors:
    """Both servers; made and stopped on the event loop on which they serve."""

    def __init__(self, config: GatewayConfig, keys: Keys) -> None:
        self._config = config
        self._keys = keys
        self._tls = Tls.of(config)
        self.is_draining = False

    async def open(self, app: ASGIApp, services: Services) -> None:
        """Returns once both listen. Raises ConfigError where a port or a certificate does not allow it."""
        self._grpc = self._open_grpc(services)
        self._http = _Http(self._uvicorn_config(KeyedApp(app, self._keys)))
        await self._http.open(_listen(self._config.http_host, self._config.http_port))

    async def check(self) -> None:
        """Raises RuntimeError where one of the servers has ended, or nobody listens on its port."""
        if self.is_draining:
            return
        for name, server in (("http", self._http), ("grpc", self._grpc)):
            host, port = getattr(self._config, f"{name}_host"), getattr(self._config, f"{name}_port")
            if not server.is_serving or not await _is_listening(host, port):
                raise RuntimeError(f"the gateway's {name} server on {host}:{port} has ended")

    async def drain(self, timeout_s: float) -> None:
        """Takes nothing new; what is open may go on for `timeout_s`, and is ended then."""
        self.is_draining = True
        ending = [asyncio.ensure_future(one) for one in (self._grpc.stop(timeout_s), self._http.stop(timeout_s))]
        _, left = await asyncio.wait(ending, timeout=timeout_s + END_MARGIN_S)
        if left:
            log.warning("not all of the gateway's servers ended in time", extra={"left": len(left)})

    def _open_grpc(self, services: Services) -> BridgeServer:
        bridge = Bridge(asyncio.get_running_loop(), (KeyedServices(self._keys).check, services.check))
        services.add_all(bridge)
        server = BridgeServer(bridge, _grpc_options(self._config))
        address = f"{self._config.grpc_host}:{self._config.grpc_port}"
        try:
            server.start(address, None if self._tls is None else self._tls.grpc_credentials)
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"gateway.grpc_port: {address} cannot be served: {error}") from None
        return server

    def _uvicorn_config(self, app: ASGIApp) -> uvicorn.Config:
        return uvicorn.Config(
            app,
            http=PromptH11,  # on the stricter parser; KeyedApp refuses what it lets pass all the same
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            backlog=_BACKLOG,
            **({} if self._tls is None else self._tls.uvicorn_options),  # type: ignore[arg-type]
        )


class _Http:
    """uvicorn on our event loop: it listens once `open` returns, and ends nothing but itself."""

    def __init__(self, config: uvicorn.Config) -> None:
        self._server = uvicorn.Server(config)

    async def open(self, sock: socket.socket) -> None:
        self._task = asyncio.create_task(self._server.serve(sockets=[sock]))
        while not self._server.started:
            if self._task.done():
                await self._task  # raises why
            await asyncio.sleep(_STARTED_EVERY_S)

    @property
    def is_serving(self) -> bool:
        return not self._task.done()

    async def stop(self, timeout_s: float) -> None:
        self._server.config.timeout_graceful_shutdown = max(1, round(timeout_s))
        self._server.should_exit = True
        await self._task


def _listen(host: str, port: int) -> socket.socket:
    """Raises ConfigError where nothing can listen there."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(f"gateway.http_port: {host}:{port} cannot be served: {error}") from None
    return sock


async def _is_listening(host: str, port: int) -> bool:
    """False only if a connection is refused: one that waits waits for a busy server."""
    try:
        async with asyncio.timeout(_CONNECT_S):
            _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return False
    except OSError:  # TimeoutError is one
        return True
    writer.close()
    return True


def _grpc_options(config: GatewayConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", config.max_body_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", MAX_HEADER_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_HEADER_BYTES),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.keepalive_time_ms", round(KEEPALIVE_S * 1000)),
        ("grpc.keepalive_timeout_ms", round(PING_TIMEOUT_S * 1000)),
        ("grpc.server_handshake_timeout_ms", round(HEADERS_S * 1000)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ]
