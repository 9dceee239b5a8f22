"""Peers of the data plane for tests: honest ones, and ones that hold the secret and still send rubbish."""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from local_plane import LocalPlane
from torch import Tensor

from experts.checkpoint import open_checkpoint
from experts.compute import Pairs, expert_ffn_loop
from experts.handshake import Identity, Role, fresh_incarnation, read_secret
from experts.link import BlockingLink, connect
from experts.weights import load_group
from experts.wire import Header, Kind
from router.gate import route

LAYER = 1


def wait_until(holds: Callable[[], bool], *, timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.01)


def identity_for(plane: LocalPlane, role: Role, *, fingerprint: bytes | None = None) -> Identity:
    model = plane.model.fingerprint(open_checkpoint(plane.model.checkpoint))
    return Identity(role=role, member_id="test", incarnation=fresh_incarnation(), fingerprint=fingerprint or model)


def authenticated(plane: LocalPlane, address: str, role: Role) -> socket.socket:
    """A socket behind the handshake, blocking, 5 s."""
    secret = read_secret(plane.model.secret_file)
    sock, _ = connect(address, secret, identity_for(plane, role), timeout_s=5)
    sock.settimeout(5)
    return sock


def raw(address: str) -> socket.socket:
    """A socket on a Unix address, before any handshake."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(5)
    sock.connect(address.removeprefix("unix:"))
    return sock


def closed_by_peer(sock: socket.socket) -> bool:
    """Whether the peer has closed or reset the connection, after whatever it still had to say."""
    try:
        while sock.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    x: Tensor  # [num_tokens, hidden_size] float32
    logits: Tensor  # [num_tokens, num_experts] float32


class Asker:
    """An attention engine's end of a link, for one question at a time."""

    def __init__(self, plane: LocalPlane) -> None:
        assert plane.router is not None
        self.sock = authenticated(plane, plane.router.address, Role.ATTENTION)
        self.link = BlockingLink(self.sock, plane.limits)
        self.seq = 0

    def send(self, question: Question, *, layer: int = LAYER, budget_s: float = 5.0, scale: float = 1.0) -> None:
        self.seq += 1
        x, logits = question.x, question.logits
        header = Header(
            Kind.QUESTION,
            layer=layer,
            num_rows=len(x),
            num_extra=logits.shape[1],
            budget_ms=int(budget_s * 1000),
            scale=scale,
            seq=self.seq,
        )
        parts = (x.numpy().data.cast("B"), logits.numpy().data.cast("B"))
        self.link.send(header, parts, deadline_s=time.monotonic() + 5)

    def receive(self, *, timeout_s: float = 10.0) -> Tensor | str:
        """The answer, or the sentence of a failure."""
        header, payload = self.link.receive(deadline_s=time.monotonic() + timeout_s)
        assert header.seq == self.seq
        if header.kind is Kind.FAILURE:
            return bytes(payload).decode()
        assert header.kind is Kind.ANSWER
        return torch.frombuffer(payload, dtype=torch.float32).view(header.num_rows, -1).clone()

    def ask(self, question: Question) -> Tensor:
        self.send(question)
        answer = self.receive()
        assert isinstance(answer, Tensor), answer
        return answer

    def close(self) -> None:
        self.link.close()


class Reference:
    """What the answer must be: gate and plain loop over all experts of the checkpoint, in one place."""

    def __init__(self, plane: LocalPlane) -> None:
        checkpoint = open_checkpoint(plane.model.checkpoint)
        self.shape = checkpoint.shape
        self._weights = load_group(checkpoint, range(self.shape.num_experts), torch.float32)

    def question(self, num_tokens: int, seed: int = 0) -> Question:
        generator = torch.Generator().manual_seed(1000 * num_tokens + seed)
        return Question(
            x=torch.randn(num_tokens, self.shape.hidden_size, generator=generator),
            logits=torch.randn(num_tokens, self.shape.num_experts, generator=generator),
        )

    def answer(self, question: Question, *, layer: int = LAYER, scale: float = 1.0) -> Tensor:
        routing = route(question.logits, self.shape, scale=scale)
        rows = torch.arange(len(question.x), dtype=torch.int32).repeat_interleave(self.shape.top_k)
        pairs = Pairs(row=rows, expert=routing.topk_idx.flatten(), weight=routing.topk_weights.flatten())
        return expert_ffn_loop(question.x, self._weights[layer], pairs)

    def check(self, answer: Tensor, question: Question, *, layer: int = LAYER) -> None:
        torch.testing.assert_close(answer, self.answer(question, layer=layer), rtol=1e-5, atol=1e-5)
