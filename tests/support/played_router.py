"""The engine's side of a link without an engine, and a router that is played by hand, frame by frame."""

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from local_plane import LocalPlane
from peers import LAYER, Question, identity_for

from cluster.router_client import RouterAddress, RouterClient
from cluster.step import Step
from experts.handshake import Role, ServerSide, read_secret
from experts.link import BlockingLink, listen
from experts.wire import Header

Scene = Callable[[BlockingLink], None]


class Engine:
    """A client and the step that it poisons."""

    def __init__(self, plane: LocalPlane, step: Step, *, step_timeout_s: float, address: str | None = None) -> None:
        router = RouterAddress(
            address=address or plane.model.router_address,
            secret=read_secret(plane.model.secret_file),
            identity=identity_for(plane, Role.ATTENTION),
        )
        self.step = step
        self.client = RouterClient(router, plane.limits, step, step_timeout_s=step_timeout_s)

    def layer(self, question: Question, layer: int = LAYER) -> torch.Tensor:
        self.client.ask(layer, question.x, question.logits, scale=1.0)
        return self.client.answer(question.x)


class PlayedRouter(threading.Thread):
    """Accepts links one after the other, and plays one scene on each."""

    def __init__(self, plane: LocalPlane, folder: Path, scenes: list[Scene]) -> None:
        super().__init__(daemon=True)
        self._plane, self._scenes = plane, scenes
        self._listener, self.address = listen(f"unix:{folder}/r")
        self._listener.settimeout(5)
        self.start()

    def run(self) -> None:
        for scene in self._scenes:
            sock, _ = self._listener.accept()
            scene(self._shake(sock))
            sock.close()
        self._listener.close()

    def _shake(self, sock: socket.socket) -> BlockingLink:
        identity = identity_for(self._plane, Role.ROUTER)
        server = ServerSide(
            read_secret(self._plane.model.secret_file),
            fingerprint=identity.fingerprint,
            incarnation=1,
            group=-1,
            roles=frozenset({Role.ATTENTION}),
        )
        sock.sendall(server.greeting)
        _, welcome = server.answer(sock.recv(1000))
        sock.sendall(welcome)
        return BlockingLink(sock, self._plane.limits)


def answer_with(link: BlockingLink, header: Header, value: float) -> None:
    hidden = 64
    body = torch.full((header.num_rows, hidden), value).numpy().tobytes()
    link.send(header, (body,), deadline_s=time.monotonic() + 2)


def question_on(link: BlockingLink) -> Header:
    return link.receive(deadline_s=time.monotonic() + 4)[0]
