"""All malformed requests of the sweep: bytes for the HTTP port, RPCs for the gRPC port, and bytes for that port."""

from collections.abc import Iterator
from typing import Literal, get_args

from malformed_case import RpcCase, WireCase
from malformed_fields import field_cases
from malformed_grpc import grpc_cases
from malformed_http import http_cases
from malformed_http2 import http2_cases
from malformed_json import json_cases

Surface = Literal["http", "grpc", "http2"]
Case = WireCase | RpcCase
SURFACES: tuple[Surface, ...] = get_args(Surface)


def cases(surface: Surface, key: str | None = None) -> Iterator[Case]:
    """Always the same ones in the same order; names are unique. key: sent with each; None: none is needed."""
    if surface == "http":
        yield from field_cases(key)
        yield from json_cases(key)
        yield from http_cases(key)
    elif surface == "grpc":
        yield from grpc_cases(key)
    else:
        yield from http2_cases(key)
