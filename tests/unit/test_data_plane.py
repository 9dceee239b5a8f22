"""A router and its expert groups over real sockets: right answers, whatever other peers do to their own links."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from local_plane import LocalPlane
from peers import LAYER, Asker, Reference, authenticated, closed_by_peer, raw, wait_until

from experts.compute import Pairs
from experts.handshake import HELLO_BYTES, Role
from experts.link import BlockingLink
from experts.loop import MAX_PENDING_HANDSHAKES, DataPlaneLoop
from experts.placement import Placement, Replica
from experts.wire import HEADER_BYTES, DType, Header, Kind, encode


@pytest.fixture(scope="module")
def plane(nano: Path) -> Iterator[LocalPlane]:
    """Four groups and a router; on exit every thread must still be alive."""
    with LocalPlane(nano, dtype="float32", num_groups=4, max_rows=64) as plane:
        plane.start()
        router = plane.router
        assert router is not None
        wait_until(lambda: len(router.connected_groups) == 4)
        yield plane
        assert router.is_alive() and all(server.is_alive() for server in plane.groups.values())
        assert router.silent_s < 1


@pytest.fixture(scope="module")
def reference(plane: LocalPlane) -> Reference:
    return Reference(plane)


@pytest.fixture
def asker(plane: LocalPlane) -> Iterator[Asker]:
    asker = Asker(plane)
    yield asker
    asker.close()


@pytest.fixture(params=["router", "experts"])
def attacked(request: pytest.FixtureRequest, plane: LocalPlane) -> tuple[DataPlaneLoop, Role]:
    """A server and the role that may connect to it."""
    if request.param == "router":
        assert plane.router is not None
        return plane.router, Role.ATTENTION
    return next(iter(plane.groups.values())), Role.ROUTER


@pytest.mark.parametrize("num_tokens", [1, 2, 17, 64])
def test_routed_over_sockets_equals_dense(reference: Reference, asker: Asker, num_tokens: int) -> None:
    for layer in reference.shape.moe_layers:
        question = reference.question(num_tokens, seed=layer)
        asker.send(question, layer=layer)
        answer = asker.receive()
        assert isinstance(answer, torch.Tensor)
        reference.check(answer, question, layer=layer)


def test_garbage_instead_of_a_hello_ends_its_own_link_only(
    attacked: tuple[DataPlaneLoop, Role], reference: Reference, asker: Asker
) -> None:
    server, _ = attacked
    before = server.refused["handshake"]
    dice = random.Random(0)
    for garbage in (b"GET / HTTP/1.1\r\n\r\n" * 20, bytes(500), dice.randbytes(5000)):
        with raw(server.address) as sock:
            sock.sendall(garbage)
            assert closed_by_peer(sock)
    assert server.refused["handshake"] == before + 3
    question = reference.question(5)
    reference.check(asker.ask(question), question)


def test_a_hello_that_drips_keeps_nobody_waiting_and_does_not_spin_the_loop(
    attacked: tuple[DataPlaneLoop, Role], reference: Reference, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = attacked
    passes = 0
    on_pass = server.on_pass

    def counted() -> None:
        nonlocal passes
        passes += 1
        on_pass()

    with raw(server.address) as sock:
        for _ in range(10):
            sock.sendall(b"x")
            time.sleep(0.005)
        question = reference.question(3)
        reference.check(asker.ask(question), question)
        monkeypatch.setattr(server, "on_pass", counted)
        time.sleep(0.5)
        assert passes < 40  # ticks, not a pass for every moment that an unfinished hello lies there
        monkeypatch.undo()


def test_a_hundred_links_without_a_hello_lock_nobody_out(
    attacked: tuple[DataPlaneLoop, Role], plane: LocalPlane, reference: Reference
) -> None:
    server, role = attacked
    before = server.refused["pending"]
    idle = [raw(server.address) for _ in range(100)]
    wait_until(lambda: server.refused["pending"] - before >= 100 - MAX_PENDING_HANDSHAKES)
    authenticated(plane, server.address, role).close()
    late = Asker(plane)
    question = reference.question(4)
    reference.check(late.ask(question), question)
    late.close()
    for sock in idle:
        sock.close()


def test_a_malformed_frame_behind_a_valid_hello_ends_its_own_link_only(
    attacked: tuple[DataPlaneLoop, Role], plane: LocalPlane, reference: Reference, asker: Asker
) -> None:
    server, role = attacked
    limits, hidden = plane.limits, plane.limits.hidden_size
    good = {
        Role.ATTENTION: Header(Kind.QUESTION, layer=LAYER, num_rows=1, num_extra=limits.num_experts, budget_ms=1000),
        Role.ROUTER: Header(Kind.ROWS, layer=LAYER, num_rows=1, num_extra=1, incarnation=server.incarnation),
    }[role]
    header = bytearray(encode(good, limits))
    bad = [b"\x80\x04\x95" + bytes(HEADER_BYTES), bytes(HEADER_BYTES), header[:5] + b"\x63" + header[6:]]
    bad += [header[:12] + b"\xff\xff\xff\xff" + header[16:], header[:24] + b"\xff\xff\xff\xff" + header[28:]]
    # Whole frames of our protocol that have no business here.
    bad += [
        encode(Header(Kind.NACK), limits),
        encode(Header(Kind.ANSWER, num_rows=1), limits) + bytes(hidden * 4),
        encode(Header(Kind.PARTIAL, num_rows=1), limits) + bytes(hidden * 4),
    ]
    if role is Role.ATTENTION:
        no_such_layer = encode(good._replace(layer=0), limits)
        bad.append(no_such_layer + bytes(hidden * 4 + limits.num_experts * 4))
    else:
        pairs = np.zeros((3, 1), dtype=np.int32)
        for row, expert in ((1, 0), (-1, 0), (0, -1), (0, limits.num_experts), (0, 2**31 - 1)):
            pairs[:2, 0] = row, expert
            bad.append(bytes(header) + bytes(hidden * 4) + pairs.tobytes())
        wrong_dtype = encode(good._replace(dtype=DType.BFLOAT16), limits)
        bad.append(wrong_dtype + bytes(hidden * 2 + 12))
    for data in bad:
        before = server.refused["FrameError"]
        with authenticated(plane, server.address, role) as sock:
            sock.sendall(data)
            assert closed_by_peer(sock), data
        assert server.refused["FrameError"] == before + 1
    question = reference.question(5)
    reference.check(asker.ask(question), question)


def test_what_the_gate_refuses_ends_the_askers_link_only(
    plane: LocalPlane, reference: Reference, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plane.router is not None

    def gate(*_: object) -> None:
        raise ValueError("scale=2.5 does not fit")

    question = reference.question(2)
    with monkeypatch.context() as patched:
        patched.setattr(plane.router.dispatcher, "_gate", gate)
        bad = Asker(plane)
        bad.send(question)
        assert closed_by_peer(bad.sock)
        bad.close()
    reference.check(asker.ask(question), question)


@pytest.mark.parametrize("role", [Role.ROUTER, Role.ATTENTION])
def test_a_member_in_the_wrong_role_is_refused(plane: LocalPlane, role: Role) -> None:
    assert plane.router is not None
    server = plane.router if role is Role.ROUTER else next(iter(plane.groups.values()))
    before = server.refused["handshake"]
    with pytest.raises(Exception, match="no handshake"):
        authenticated(plane, server.address, role)
    assert server.refused["handshake"] == before + 1


def test_a_link_that_ends_in_the_middle_of_a_frame_leaves_nothing(
    plane: LocalPlane, reference: Reference, asker: Asker
) -> None:
    assert plane.router is not None
    with authenticated(plane, plane.router.address, Role.ATTENTION) as sock:
        header = Header(Kind.QUESTION, layer=LAYER, num_rows=9, num_extra=plane.limits.num_experts, budget_ms=1000)
        sock.sendall(encode(header, plane.limits) + b"half")
    question = reference.question(2)
    reference.check(asker.ask(question), question)


def test_rows_for_an_expert_that_is_not_held_and_for_a_dead_incarnation_get_a_nack(plane: LocalPlane) -> None:
    replica, server = next((r, s) for r, s in plane.groups.items() if r.group == 1)
    hidden, per_group = plane.limits.hidden_size, plane.limits.num_experts // 4
    sock = authenticated(plane, server.address, Role.ROUTER)
    link = BlockingLink(sock, plane.limits)
    held = per_group  # the first expert of group 1
    cases = {
        "not held": (0, replica.incarnation, LAYER),
        "dead incarnation": (held, replica.incarnation + 1, LAYER),
        "no such layer": (held, replica.incarnation, 0),
    }
    before = server.counts["nacks"]
    for seq, (expert, incarnation, layer) in enumerate(cases.values(), start=1):
        pairs = np.array([[0], [expert], [0]], dtype=np.int32)
        header = Header(Kind.ROWS, layer=layer, num_rows=1, num_extra=1, seq=seq, incarnation=incarnation)
        link.send(header, (bytes(hidden * 4), pairs.tobytes()), deadline_s=time.monotonic() + 5)
        answer, _ = link.receive(deadline_s=time.monotonic() + 5)
        assert (answer.kind, answer.seq, answer.incarnation) == (Kind.NACK, seq, replica.incarnation)
    assert server.counts["nacks"] == before + 3
    link.close()


def test_many_askers_at_once_each_get_their_own_answer(plane: LocalPlane, reference: Reference) -> None:
    askers = [Asker(plane) for _ in range(8)]
    for turn in range(5):
        questions = [reference.question(1 + i, seed=turn) for i in range(len(askers))]
        for asker, question in zip(askers, questions):
            asker.send(question)
        for asker, question in zip(reversed(askers), reversed(questions)):
            answer = asker.receive()
            assert isinstance(answer, torch.Tensor)
            reference.check(answer, question)
    for asker in askers:
        asker.close()
    assert plane.router is not None
    dispatcher = plane.router.dispatcher
    wait_until(lambda: not any(dispatcher._rows_at.values()) and not dispatcher._jobs)


def test_a_copy_that_leaves_answers_what_it_was_asked_and_then_loses_its_links(nano: Path) -> None:
    with LocalPlane(nano, dtype="float32", num_groups=4) as plane:
        plane.start()
        reference, asker = Reference(plane), Asker(plane)
        leaving = next(iter(plane.groups))
        server = plane.groups[leaving]
        compute, began = server._ffn, threading.Event()

        def compute_late(layer: int, x: torch.Tensor, pairs: Pairs, out: torch.Tensor | None = None) -> torch.Tensor:
            began.set()
            time.sleep(0.2)
            return compute(layer, x, pairs, out)

        server._ffn = compute_late
        question = reference.question(8, seed=1)
        asker.send(question)
        assert began.wait(10)
        plane.start_group(leaving.group)
        plane.retire(leaving)
        answer = asker.receive()
        assert isinstance(answer, torch.Tensor)
        reference.check(answer, question)
        assert server.counts["batches"] == 1
        assert plane.router is not None
        assert plane.router.dispatcher.counts["reroutes"] == 0
        asker.send(question)
        assert isinstance(asker.receive(), torch.Tensor)
        asker.close()


def test_an_address_in_the_placement_that_is_nonsense_does_not_end_the_router(
    plane: LocalPlane, reference: Reference, asker: Asker
) -> None:
    assert plane.router is not None
    nonsense = tuple(
        Replica(member_id=f"x{i}", group=0, address=address, incarnation=i)
        for i, address in enumerate(["", "tcp:nowhere", "tcp:" + "a" * 300 + ":1", "unix:" + "a" * 300, "tcp:::x"])
    )
    version = plane.router.dispatcher.placement.version
    placement = Placement(version=version + 1, num_groups=4, replicas=(*plane.groups, *nonsense))
    plane.router.set_placement(placement)
    wait_until(lambda: plane.router is not None and plane.router.dispatcher.placement.version == version + 1)
    time.sleep(0.3)
    question = reference.question(3)
    reference.check(asker.ask(question), question)
    plane._version = version + 1
    plane._publish()


def test_a_hello_of_the_right_length_and_the_wrong_secret_is_refused(plane: LocalPlane) -> None:
    assert plane.router is not None
    before = plane.router.refused["handshake"]
    with raw(plane.router.address) as sock:
        sock.sendall(bytes(HELLO_BYTES))
        assert closed_by_peer(sock)
    assert plane.router.refused["handshake"] == before + 1
