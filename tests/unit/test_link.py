"""Links and the loop that serves them: every wait ends, bytes arrive in order, and a stuck peer is let go."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experts import loop as loop_module
from experts.errors import ConfigError, HandshakeError, LinkError
from experts.handshake import Identity, Role, fresh_incarnation
from experts.link import BlockingLink, Conn, connect, listen
from experts.loop import DataPlaneLoop
from experts.wire import Header, Kind, Limits

SECRET, MODEL = bytes(range(32)), bytes(32)
LIMITS = Limits(max_rows=64, hidden_size=256, num_experts=8, top_k=2)
ME = Identity(role=Role.ATTENTION, member_id="test", incarnation=1, fingerprint=MODEL)


class Echo(DataPlaneLoop):
    """Answers a FAILURE frame with the same text, `times` times."""

    def __init__(self, address: str, *, times: int = 1) -> None:
        super().__init__(
            address=address,
            secret=SECRET,
            fingerprint=MODEL,
            incarnation=fresh_incarnation(),
            group=-1,
            roles=frozenset({Role.ATTENTION}),
            limits=LIMITS,
            name="echo",
        )
        self.times = times
        self.opened = self.closed = 0

    def on_open(self, conn: Conn) -> None:
        self.opened += 1

    def on_close(self, conn: Conn) -> None:
        self.closed += 1

    def on_frame(self, conn: Conn, header: Header, payload: memoryview) -> None:
        if bytes(payload) == b"crash":
            raise RuntimeError("a bug in a subclass")
        for _ in range(self.times):
            self.send(conn, header, payload)


@pytest.fixture(params=["unix", "tcp"])
def echo(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Echo]:
    echo = Echo(f"unix:{tmp_path}/e" if request.param == "unix" else "tcp:127.0.0.1:0")
    echo.start()
    yield echo
    echo.stop()
    assert not echo.is_alive() and not echo._conns and not echo._shaking and not echo._writing


@pytest.fixture
def silent() -> Iterator[tuple[str, socket.socket]]:
    """A server that accepts into its backlog and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"tcp:127.0.0.1:{server.getsockname()[1]}", server


def open_link(echo: Echo) -> BlockingLink:
    return BlockingLink(connect(echo.address, SECRET, ME, timeout_s=5)[0], LIMITS)


def say(link: BlockingLink, text: bytes, *, seq: int = 0) -> None:
    link.send(Header(Kind.FAILURE, num_extra=len(text), seq=seq), (text,), deadline_s=time.monotonic() + 5)


def hear(link: BlockingLink) -> bytes:
    return bytes(link.receive(deadline_s=time.monotonic() + 5)[1])


def wait_for(holds: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_frames_come_back_over_unix_and_tcp(echo: Echo) -> None:
    link = open_link(echo)
    for text in (b"", b"x", b"y" * 2048):
        say(link, text)
        assert hear(link) == text
    link.close()
    wait_for(lambda: echo.closed == 1)
    assert echo.opened == 1


def test_a_tcp_address_is_given_back_with_its_real_port() -> None:
    server, address = listen("tcp:127.0.0.1:0")
    assert address == f"tcp:127.0.0.1:{server.getsockname()[1]}"
    server.close()


def test_a_socket_file_that_was_left_behind_is_replaced_and_private(tmp_path: Path) -> None:
    for _ in range(2):
        server, _ = listen(f"unix:{tmp_path}/s")
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
        server.close()  # the file stays


@pytest.mark.parametrize("address", ["unix:/" + "x" * 200, "http:localhost:1", "tcp:localhost", ""])
def test_an_address_that_cannot_be_listened_on_is_a_config_error(address: str) -> None:
    with pytest.raises(ConfigError):
        listen(address)


@pytest.mark.parametrize(
    "address", ["", "unix:/no/such", "tcp:nowhere", "tcp:127.0.0.1:1", "tcp:" + "a" * 300 + ":1", "unix:/" + "x" * 200]
)
def test_an_address_that_cannot_be_reached_is_a_link_error_that_names_it(address: str) -> None:
    with pytest.raises(LinkError) as caught:
        connect(address, SECRET, ME, timeout_s=1)
    assert str(caught.value).startswith(address)


def test_a_server_that_says_nothing_is_given_up_in_time(silent: tuple[str, socket.socket]) -> None:
    began_s = time.monotonic()
    with pytest.raises(LinkError, match="no handshake"):
        connect(silent[0], SECRET, ME, timeout_s=0.2)
    assert time.monotonic() - began_s < 1


def test_a_foreign_server_is_a_handshake_error(silent: tuple[str, socket.socket]) -> None:
    def greet() -> None:
        sock, _ = silent[1].accept()
        sock.sendall(b"SSH-2.0-OpenSSH_9.6".ljust(100))
        sock.recv(1)
        sock.close()

    thread = threading.Thread(target=greet)
    thread.start()
    with pytest.raises(HandshakeError):
        connect(silent[0], SECRET, ME, timeout_s=5)
    thread.join()


def test_the_wrong_secret_is_refused_and_counted(echo: Echo) -> None:
    with pytest.raises(LinkError, match="another secret"):
        connect(echo.address, bytes(32), ME, timeout_s=5)
    assert echo.refused == {"handshake": 1} and not echo.opened


def test_a_receive_ends_at_its_deadline_with_a_timeout(echo: Echo) -> None:
    link = open_link(echo)
    began_s = time.monotonic()
    with pytest.raises(TimeoutError):
        link.receive(deadline_s=began_s + 0.1)
    assert time.monotonic() - began_s < 1
    link.close()


def test_a_send_to_a_peer_that_does_not_read_ends_at_its_deadline() -> None:
    ours, theirs = socket.socketpair()
    link = BlockingLink(ours, LIMITS)
    began_s = time.monotonic()

    def send_for_ever() -> None:
        while True:
            link.send(Header(Kind.ANSWER, num_rows=64), (bytes(64 * 256 * 4),), deadline_s=began_s + 0.2)

    with pytest.raises(LinkError):
        send_for_ever()
    assert time.monotonic() - began_s < 1
    theirs.close()
    link.close()


def test_a_closed_peer_is_a_link_error() -> None:
    ours, theirs = socket.socketpair()
    link = BlockingLink(ours, LIMITS)
    theirs.close()
    with pytest.raises(LinkError):
        link.receive(deadline_s=time.monotonic() + 1)
    link.close()


def test_what_the_socket_does_not_take_at_once_is_queued_and_arrives_in_order(echo: Echo) -> None:
    echo.times = 40
    link = open_link(echo)
    for seq in range(60):  # 60 * 40 * 2 KiB: far beyond any socket buffer
        say(link, bytes([seq]) * 2000, seq=seq)
    for seq in range(60):
        for _ in range(40):
            header, payload = link.receive(deadline_s=time.monotonic() + 10)
            assert header.seq == seq and payload == bytes([seq]) * 2000
    link.close()


def test_a_queue_keeps_its_own_copy_of_what_it_could_not_send() -> None:
    ours, theirs = socket.socketpair()
    conn = Conn(ours, LIMITS, name="test")
    body = bytearray(b"a" * 64 * 256 * 4)
    while not conn.wants_write:
        conn.send(Header(Kind.ANSWER, num_rows=64), (memoryview(body),))
    conn.send(Header(Kind.ANSWER, num_rows=64), (memoryview(body),))
    body[:] = b"b" * len(body)
    link = BlockingLink(theirs, LIMITS)
    for _ in range(2):
        while conn.wants_write:
            conn.flush()
            _, payload = link.receive(deadline_s=time.monotonic() + 5)
            assert set(bytes(payload)) == {ord("a")}
    link.close()
    conn.close()


def test_a_peer_that_never_reads_is_let_go(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "STALL_TIMEOUT_S", 0.3)
    echo.times = 12_000  # 24 MB: more than TCP's buffers on both ends take
    stuck, fine = open_link(echo), open_link(echo)
    say(stuck, b"x" * 2048)
    wait_for(lambda: echo.refused["stalled"] == 1)
    echo.times = 1
    say(fine, b"still here")
    assert hear(fine) == b"still here"
    stuck.close()
    fine.close()


def test_a_slow_reader_that_goes_on_reading_counts_as_moving() -> None:
    ours, theirs = socket.socketpair()
    conn = Conn(ours, LIMITS, name="test")
    while not conn.wants_write:
        conn.send_bytes([bytes(100_000)])
    stuck_s = conn.moved_s
    conn.flush()
    assert conn.moved_s == stuck_s  # nothing was taken
    time.sleep(0.01)
    while conn.wants_write:
        theirs.recv(1 << 20)
        conn.flush()
    assert conn.moved_s > stuck_s
    theirs.close()
    conn.close()


def test_a_proof_that_does_not_come_is_given_up(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "HANDSHAKE_TIMEOUT_S", 0.1)
    scheme, _, rest = echo.address.partition(":")
    with socket.socket(socket.AF_UNIX if scheme == "unix" else socket.AF_INET) as sock:
        sock.connect(rest if scheme == "unix" else ("127.0.0.1", int(rest.rpartition(":")[2])))
        wait_for(lambda: echo.refused["handshake"] == 1)
    assert not echo.opened and not echo.closed


def test_a_frame_that_finds_a_bug_of_ours_ends_its_own_link_only(echo: Echo) -> None:
    link, other = open_link(echo), open_link(echo)
    say(link, b"crash")
    with pytest.raises(LinkError):
        hear(link)
    say(other, b"still here")
    assert hear(other) == b"still here"
    assert echo.refused["internal"] == 1
    link.close()
    other.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loop_that_dies_of_a_bug_resets_its_links_at_once(tmp_path: Path) -> None:
    echo = Echo(f"unix:{tmp_path}/e")
    echo.start()
    link, other = open_link(echo), open_link(echo)
    echo.post(lambda: {}["a bug"])
    with pytest.raises(LinkError):
        hear(other)
    echo.join(5)
    assert not echo.is_alive()  # what a health check sees
    with pytest.raises(LinkError):
        connect(echo.address, SECRET, ME, timeout_s=1)
    link.close()
    other.close()


def test_posting_to_a_loop_that_is_stuck_or_stopped_never_blocks(echo: Echo) -> None:
    done: list[int] = []
    echo.post(lambda: time.sleep(1.0))
    began_s = time.monotonic()
    for index in range(5000):
        echo.post(lambda index=index: done.append(index))
    assert time.monotonic() - began_s < 1.0 or len(done) == 5000
    wait_for(lambda: len(done) == 5000)
    assert done == sorted(done)
    echo.stop()
    echo.post(lambda: done.clear())
    assert done
