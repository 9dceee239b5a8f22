"""The sweep of malformed requests: its cases, how it judges, and a run against a whole gateway without Ray."""

import asyncio
import hashlib
from collections.abc import Iterator
from threading import Thread

import grpc
import pytest
from gateway_fakes import Front, write_model
from google.protobuf import struct_pb2
from malformed import SURFACES, Case, Surface, cases
from malformed_case import SILENT, RpcCase, WireCase
from malformed_fields import values_of
from malformed_http import ROUTES
from malformed_proto import broken_messages, extremes
from ray_cluster import free_port
from sweep import Doors, run_sweep, wrong_with
from sweep_wire import Answer

from cluster import gateway_guard, gateway_servers
from cluster.config import GatewayConfig
from cluster.gateway_body import FIELDS
from cluster.keys import Keys
from cluster.proto.expertmesh.v1 import inference_pb2 as pb

KEY = "a-key-that-is-long-enough"


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    """A gateway with keys on both of its ports, on an event loop in a thread."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    front = Front(folder)
    front.app._max_body_bytes = 4 << 20  # as it is by default, so that large bodies are read, too
    config = GatewayConfig(http_port=free_port(), grpc_port=free_port())
    servers = gateway_servers.Doors(config, Keys([KEY]))
    front.loop.run_until_complete(servers.open(front.http, front.whole.services()))
    thread = Thread(target=front.loop.run_forever, daemon=True)
    thread.start()
    at = "127.0.0.1"
    yield Doors(http=f"{at}:{config.http_port}", grpc=f"{at}:{config.grpc_port}", model="nano", key=KEY)
    asyncio.run_coroutine_threadsafe(servers.drain(1.0), front.loop).result(20)
    front.loop.call_soon_threadsafe(front.loop.stop)
    thread.join()
    front.close()


@pytest.mark.parametrize("surface", SURFACES)
def test_a_gateway_passes(doors: Doors, surface: Surface) -> None:
    result = run_sweep(doors, surfaces=(surface,))
    assert not result.failures, "\n".join(result.failures)
    assert result.num_good == result.num_cases and result.num_generations == result.num_cases // 20


def test_there_are_hundreds_of_cases_on_every_surface_with_names_of_their_own() -> None:
    names = {surface: [case.name for case in cases(surface)] for surface in SURFACES}
    assert len(names["http"]) >= 300 and len(names["grpc"]) >= 300 and len(names["http2"]) >= 80
    every = [name for of_surface in names.values() for name in of_surface]
    assert len(every) == len(set(every))


def test_the_cases_are_always_the_same() -> None:
    first, second = ([_digest(case) for surface in SURFACES for case in cases(surface, KEY)] for _ in range(2))
    assert first == second


def test_the_key_is_sent_with_all_but_those_that_are_about_keys() -> None:
    without = [case.name for surface in SURFACES for case in cases(surface, KEY) if not _carries_the_key(case)]
    assert all(
        any(word in name for word in ("without a key", "Authorization", "authorization")) for name in _requests(without)
    )


def test_every_field_that_the_gateway_takes_has_wrong_values_of_its_own() -> None:
    unknown = values_of("/v1/completions", "no such field")
    assert not [(path, name) for path, fields in FIELDS.items() for name in fields if values_of(path, name) == unknown]


def test_the_routes_are_the_gateways() -> None:
    assert dict(gateway_guard.ROUTES) == ROUTES


def test_what_is_called_wrong_for_every_message_is_refused_by_protobuf_itself() -> None:
    whole = pb.GenerateRequest(prompt="hi", max_tokens=2).SerializeToString()
    for each in broken_messages(whole):
        if each.is_wrong:
            with pytest.raises(Exception, match="Error parsing"):
                pb.GenerateRequest.FromString(each.wire)


def test_messages_inside_messages_are_filled_down_to_a_depth() -> None:
    names = {each.name for each in extremes(struct_pb2.Struct.DESCRIPTOR, 3)}
    assert {"fields.key is no UTF-8", "fields.value.number_value is NaN", "fields.value.list_value is empty"} <= names
    assert not any(name.startswith("fields.value.list_value.") for name in names)
    assert len(names) == len([*extremes(struct_pb2.Struct.DESCRIPTOR, 3)])


@pytest.mark.parametrize(
    ("end", "text", "why"),
    [
        ("400", b'{"error": {"message": "max_tokens must be a whole number"}}', ""),
        ("200", b"{}", "ended with 200"),
        ("500", b"{}", "ended with 500"),
        ("503", b"{}", "ended with 503"),
        (SILENT, b"", "ended with silent"),
        ("400", b"Traceback (most recent call last)", "inside"),
        ("400", b"<Engine object at 0x7f00>", "inside"),
        ("400", b"cannot read /usr/lib/a.so", "inside"),
    ],
)
def test_an_answer_is_judged_by_its_end_and_by_what_it_tells(end: str, text: bytes, why: str) -> None:
    case = WireCase(name="a case", wire=b"", allowed=frozenset({"400"}))
    found = "".join(wrong_with(case, Answer(end=end, text=text, seconds=0.0)))
    assert (why in found) if why else not found


def test_what_is_never_right_is_wrong_although_a_case_allows_it() -> None:
    case = RpcCase(name="a case", method="/a/b", messages=(), allowed=frozenset({"INTERNAL", "UNKNOWN"}))
    for code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        assert [*wrong_with(case, Answer(end=code.name, text=b"", seconds=0.0))]


def test_a_gateway_that_is_not_there_fails_soon_and_says_so() -> None:
    nobody = f"127.0.0.1:{free_port()}"
    result = run_sweep(Doors(http=nobody, grpc=nobody, model="nano"), surfaces=("http",))
    assert "could not be sent" in result.failures[0] and "were not sent" in result.failures[-1]
    assert result.num_cases < 20 and result.num_good == 0


def _requests(names: list[str]) -> list[str]:
    """Without what never gets as far as headers."""
    return [name for name in names if not name.startswith(("HTTP: ", "HTTP/2: "))]


def _carries_the_key(case: Case) -> bool:
    if isinstance(case, RpcCase):
        return ("authorization", f"Bearer {KEY}") in case.metadata
    return KEY.encode() in case.wire


def _digest(case: Case) -> tuple[object, ...]:
    sent = case.wire if isinstance(case, WireCase) else b"|".join(case.messages) + repr(case.metadata).encode()
    return case.name, sorted(case.allowed), hashlib.sha256(sent).hexdigest()
