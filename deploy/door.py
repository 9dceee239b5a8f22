"""How our own commands come through a cluster's doors: with the caller's key, and TLS where the cluster speaks it."""

import json
import os
import ssl
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import grpc

from cluster.keys import KEYS_VARIABLE
from experts.errors import ConfigError

KEY_VARIABLE = "EXPERTMESH_API_KEY"
CA_VARIABLE = "EXPERTMESH_CA_FILE"  # whom to trust, PEM; with it the doors are asked over TLS
CERT_VARIABLE, CERT_KEY_VARIABLE = "EXPERTMESH_CLIENT_CERT_FILE", "EXPERTMESH_CLIENT_KEY_FILE"  # for mutual TLS
HTTP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """What a client shows."""

    key: str | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    cert_key_file: Path | None = None

    @classmethod
    def of_environment(cls) -> Self:
        """From the variables above; without a key of one's own, the first of those that the gateway takes."""
        key = os.environ.get(KEY_VARIABLE) or os.environ.get(KEYS_VARIABLE, "").split(",")[0].strip()
        files = [os.environ.get(name) for name in (CA_VARIABLE, CERT_VARIABLE, CERT_KEY_VARIABLE)]
        ca, cert, cert_key = (None if file is None else Path(file) for file in files)
        return cls(key=key or None, ca_file=ca, cert_file=cert, cert_key_file=cert_key)

    def channel(self, address: str) -> grpc.Channel:
        """A channel to host:port. Raises ConfigError where a file cannot be read."""
        if self.ca_file is None:
            channel = grpc.insecure_channel(address)
        else:
            pair = (
                None if self.cert_file is None or self.cert_key_file is None else (self.cert_key_file, self.cert_file)
            )
            key, chain = (None, None) if pair is None else map(_read, pair)
            channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(_read(self.ca_file), key, chain))
        return channel if self.key is None else grpc.intercept_channel(channel, _ShowsKey(self.key))

    def get_json(self, url: str) -> dict[str, object]:
        """The object that a GET of the URL answers. Raises OSError, ValueError, http.client.HTTPException."""
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(url, headers=headers)  # noqa: S310  (http and https only)
        with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S, context=self._context(url)) as answer:  # noqa: S310
            return json.load(answer)

    def _context(self, url: str) -> ssl.SSLContext | None:
        if not url.startswith("https:"):
            return None
        context = ssl.create_default_context(cafile=None if self.ca_file is None else str(self.ca_file))
        if self.cert_file is not None:
            context.load_cert_chain(self.cert_file, self.cert_key_file)
        return context


class _Details(NamedTuple):
    """As gRPC wants a call's details, with metadata of ours."""

    method: str
    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _ShowsKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds the key to every call."""

    def __init__(self, key: str) -> None:
        self._key = key

    def intercept_unary_unary(
        self, continuation: Callable, client_call_details: grpc.ClientCallDetails, request: object
    ):
        return continuation(self._with_key(client_call_details), request)

    def intercept_unary_stream(
        self, continuation: Callable, client_call_details: grpc.ClientCallDetails, request: object
    ):
        return continuation(self._with_key(client_call_details), request)

    def _with_key(self, details: grpc.ClientCallDetails) -> _Details:
        return _Details(
            method=details.method,
            timeout=details.timeout,
            metadata=(*(details.metadata or ()), ("authorization", f"Bearer {self._key}")),
            credentials=details.credentials,
            wait_for_ready=getattr(details, "wait_for_ready", None),
            compression=getattr(details, "compression", None),
        )


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
