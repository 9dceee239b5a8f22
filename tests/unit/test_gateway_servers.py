"""Both doors on real sockets: keys on everything but health, TLS, limits, and how they close."""

import asyncio
import datetime
import json
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import grpc.aio
import httpx
import pytest
from gateway_fakes import Front, a_front
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray_cluster import free_port

from cluster import prompt_http
from cluster.config import GatewayConfig
from cluster.gateway_guard import ROUTES
from cluster.gateway_servers import Doors
from cluster.ingress import Gateway
from cluster.keys import Keys
from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc
from experts.errors import ConfigError

KEY = "a-key-that-is-long-enough"
AUTH = f"Bearer {KEY}"
FORGED_HOSTS = ("x/health?y=", "a/?x=", "#", "", "127.0.0.1/health", "health")


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    yield from a_front(tmp_path_factory.mktemp("model"))


class Open:
    """Doors with a key, on free ports, on the loop of `front`."""

    def __init__(self, front: Front, **settings: object) -> None:
        self.front = front
        self.config = GatewayConfig(http_port=free_port(), grpc_port=free_port(), **settings)  # type: ignore[arg-type]
        self.doors = Doors(self.config, Keys([KEY]))
        self.run(self.doors.open(front.http, front.whole.services()))

    def run(self, awaitable: Awaitable[object]) -> object:
        async def wait() -> object:
            return await awaitable

        return self.front.loop.run_until_complete(asyncio.wait_for(wait(), 20))

    def raw(self, request: bytes) -> bytes:
        """The answer to bytes on the HTTP port, until the server closes or has nothing more to say for a while."""

        async def send() -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.config.http_port)
            writer.write(request)
            answer = b""
            try:
                while piece := await asyncio.wait_for(reader.read(65536), 1.0):
                    answer += piece
            except TimeoutError:
                pass
            writer.close()
            return answer

        answer = self.run(send())
        assert isinstance(answer, bytes)
        return answer


@pytest.fixture(scope="module")
def door(front: Front) -> Iterator[Open]:
    opened = Open(front)
    yield opened
    opened.run(opened.doors.drain(1.0))


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    lines = (f"{method} {path} HTTP/1.1", *headers, "Connection: close", "Content-Length: 0")
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def test_every_route_but_health_wants_a_key(door: Open) -> None:
    for path, method in {**ROUTES, "/": "GET", "/-/routes": "GET", "/docs": "GET"}.items():
        refused = door.raw(get(path, "Host: x", method=method))
        is_open = path in ("/health", "/ready")
        assert refused.startswith(b"HTTP/1.1 200" if is_open else b"HTTP/1.1 401"), path
        assert (b"www-authenticate: Bearer" in refused) is not is_open
        served = door.raw(get(path, "Host: x", f"Authorization: {AUTH}", method=method))
        assert not served.startswith(b"HTTP/1.1 401"), path
    assert door.raw(get("/v1/models", "Host: x", method="OPTIONS")).startswith(b"HTTP/1.1 401")


HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "answers"), [([b""], 0), ([b"GET /hea"], 0), ([HEALTH[:-2], b"A: b\r\n"], 0), ([HEALTH, HEALTH[:-4]], 1)]
)
def test_who_does_not_come_to_the_end_of_his_headers_is_hung_up_on(
    door: Open, monkeypatch: pytest.MonkeyPatch, pieces: list[bytes], answers: int
) -> None:
    monkeypatch.setattr(prompt_http, "HEADERS_S", 0.5)

    async def drip() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.config.http_port)
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.2)
        answer = await reader.read()
        writer.close()
        return answer

    began_s = time.monotonic()
    answer = door.run(drip())
    assert isinstance(answer, bytes)
    assert answer.count(b"HTTP/1.1 200") == answers
    assert time.monotonic() - began_s < 2


def test_an_answer_may_take_longer_than_headers_may(door: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_http, "HEADERS_S", 0.1)
    monkeypatch.setattr(door.front.engine, "delay_s", 0.2)
    body = json.dumps({"model": "nano", "prompt": [1, 2], "max_tokens": 2}).encode()
    lines = ("POST /v1/completions HTTP/1.1", "Host: x", f"Authorization: {AUTH}", "Content-Type: application/json")
    head = "\r\n".join((*lines, "Connection: close", f"Content-Length: {len(body)}")).encode() + b"\r\n\r\n"
    assert door.raw(head + body).startswith(b"HTTP/1.1 200")


def test_two_authorizations_are_none(door: Open) -> None:
    twice = get("/v1/models", "Host: x", f"Authorization: {AUTH}", f"Authorization: {AUTH}")
    assert door.raw(twice).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("host", FORGED_HOSTS)
def test_a_forged_host_opens_nothing(door: Open, host: str) -> None:
    assert door.raw(get("/v1/models", f"Host: {host}"))[:12] in (b"HTTP/1.1 401", b"HTTP/1.1 400")


def test_an_error_of_a_key_is_shaped_as_clients_expect(door: Open) -> None:
    answer = door.raw(get("/v1/models", "Host: x", "Authorization: Bearer wrong"))
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
    assert "wrong" not in error["message"]


def services_of(door: Open) -> list[ServiceDescriptor]:
    """All but health, which the next test asks without a key."""
    names = set(door.front.whole.services().names) - {"grpc.health.v1.Health"}
    pool = descriptor_pool.Default()
    return [pool.FindServiceByName(name) for name in (*names, "grpc.reflection.v1alpha.ServerReflection")]


def test_every_rpc_but_health_wants_a_key(door: Open) -> None:
    async def codes() -> dict[str, grpc.StatusCode]:
        found = {}
        async with grpc.aio.insecure_channel(f"127.0.0.1:{door.config.grpc_port}") as channel:
            for service in services_of(door):
                for method in [*(method.name for method in service.methods), "NoSuchMethod"]:
                    path = f"/{service.full_name}/{method}"
                    # As a stream of both sides: the refusal must not wait for a message.
                    call = channel.stream_stream(path)()
                    found[path] = await call.code()
        return found

    found = door.run(codes())
    assert isinstance(found, dict)
    assert len(found) >= 30
    assert set(found.values()) == {grpc.StatusCode.UNAUTHENTICATED}, found


def ask(door: Open, **metadata: str) -> Callable[[], Awaitable[object]]:
    async def send() -> object:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{door.config.grpc_port}") as channel:
            stub = pb_grpc.InferenceStub(channel)
            return await stub.Generate(pb.GenerateRequest(prompt="hello"), metadata=tuple(metadata.items()))

    return send


def test_with_a_key_an_rpc_is_served_and_health_without(door: Open) -> None:
    answer = door.run(ask(door, authorization=AUTH)())
    assert isinstance(answer, pb.GenerateResponse) and answer.text == "abc"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        door.run(ask(door, authorization="Bearer wrong")())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

    async def check() -> object:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{door.config.grpc_port}") as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            return await stub.Check(health_pb2.HealthCheckRequest())

    answer = door.run(check())
    assert isinstance(answer, health_pb2.HealthCheckResponse) and answer.status == 1


def test_metadata_and_headers_beyond_the_limit_are_refused(door: Open) -> None:
    assert door.raw(get("/v1/models", "Host: x", "X-Long: " + "x" * 20_000))[:12] == b"HTTP/1.1 431"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        door.run(ask(door, authorization=AUTH, long="x" * 40_000)())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_message_beyond_the_limit_is_refused(front: Front) -> None:
    opened = Open(front, max_body_bytes=2048)

    async def send() -> object:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{opened.config.grpc_port}") as channel:
            request = pb.GenerateRequest(prompt="x" * 4000)
            return await pb_grpc.InferenceStub(channel).Generate(request, metadata=(("authorization", AUTH),))

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        opened.run(send())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    opened.run(opened.doors.drain(0.1))


def test_draining_doors_finish_their_streams_and_take_no_new_ones(front: Front) -> None:
    opened = Open(front)
    front.engine.delay_s = 0.2

    async def stream_while_it_drains() -> int:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{opened.config.grpc_port}") as channel:
            metadata = (("authorization", AUTH),)
            call = pb_grpc.InferenceStub(channel).GenerateStream(pb.GenerateRequest(prompt="x"), metadata=metadata)
            await call.read()
            drained = asyncio.create_task(opened.doors.drain(5.0))
            num_chunks = 1
            while await call.read():
                num_chunks += 1
            await drained
            return num_chunks

    try:
        assert opened.run(stream_while_it_drains()) == 3
    finally:
        front.engine.delay_s = 0.0
    with pytest.raises(OSError, match="refused|Connect call failed"):
        opened.raw(b"GET /health HTTP/1.1\r\n\r\n")


@pytest.mark.parametrize("name", ["http", "grpc"])
def test_a_gateway_one_of_whose_servers_has_ended_is_not_healthy(front: Front, name: str) -> None:
    opened = Open(front)
    gateway = cast("Gateway", SimpleNamespace(_doors=opened.doors))
    opened.run(Gateway.check_health(gateway))
    opened.run(getattr(opened.doors, f"_{name}").stop(0.1))
    with pytest.raises(RuntimeError, match=f"{name} server on 127.0.0.1:.* has ended"):
        opened.run(Gateway.check_health(gateway))
    opened.run(opened.doors.drain(0.1))
    opened.run(Gateway.check_health(gateway))  # it is to end, and Serve knows


def test_two_replicas_share_the_ports(front: Front) -> None:
    first = Open(front)
    second = Doors(first.config, Keys([KEY]))
    first.run(second.open(front.http, front.whole.services()))
    first.run(first.doors.drain(0.1))
    assert first.raw(get("/health", "Host: x")).startswith(b"HTTP/1.1 200")
    first.run(second.drain(0.1))


def test_with_a_client_ca_both_doors_want_a_certificate(front: Front, tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    server, client = ca.issue("server"), ca.issue("client")
    opened = Open(
        front,
        tls_cert_file=str(server[0]),
        tls_key_file=str(server[1]),
        tls_client_ca_file=str(ca.file),
    )
    trusting = ssl.create_default_context(cafile=str(ca.file))
    proving = ssl.create_default_context(cafile=str(ca.file))
    proving.load_cert_chain(*map(str, client))

    async def over_https(context: ssl.SSLContext) -> int:
        async with httpx.AsyncClient(verify=context) as http:
            return (await http.get(f"https://localhost:{opened.config.http_port}/health")).status_code

    async def over_grpc(pair: tuple[bytes, bytes] | None) -> object:
        key, chain = (None, None) if pair is None else pair
        credentials = grpc.ssl_channel_credentials(ca.file.read_bytes(), key, chain)
        async with grpc.aio.secure_channel(f"localhost:{opened.config.grpc_port}", credentials) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            return await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)

    assert opened.run(over_https(proving)) == 200
    with pytest.raises((httpx.TransportError, ssl.SSLError)):
        opened.run(over_https(trusting))
    assert getattr(opened.run(over_grpc((client[1].read_bytes(), client[0].read_bytes()))), "status", 0) == 1
    with pytest.raises(grpc.aio.AioRpcError):
        opened.run(over_grpc(None))
    opened.run(opened.doors.drain(0.1))


def test_a_certificate_that_is_none_is_said(front: Front, tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match="tls_cert_file"):
        Open(front, tls_cert_file=str(tmp_path / "x.pem"), tls_key_file=str(tmp_path / "x.pem"))


class Authority:
    """A certificate authority for localhost."""

    def __init__(self, folder: Path) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec

        self._folder, self._x509, self._ec = folder, x509, ec
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
        self.file, _ = self._write("ca", self._certificate("ca", self._key, is_ca=True), self._key)

    def issue(self, name: str) -> tuple[Path, Path]:
        """Files of a certificate and its key."""
        key = self._ec.generate_private_key(self._ec.SECP256R1())
        return self._write(name, self._certificate(name, key, is_ca=False), key)

    def _certificate(self, name: str, key, *, is_ca: bool):
        from cryptography.hazmat.primitives import hashes

        x509, now = self._x509, datetime.datetime.now(datetime.UTC)
        subject = self._name if is_ca else x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def _write(self, name: str, certificate, key) -> tuple[Path, Path]:
        from cryptography.hazmat.primitives import serialization as form

        files = (self._folder / f"{name}.pem", self._folder / f"{name}.key")
        files[0].write_bytes(certificate.public_bytes(form.Encoding.PEM))
        files[1].write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
        return files
