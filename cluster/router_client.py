"""The engine's side of the link to its router: one question at a time, asked again over a new link if one breaks."""

import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.metrics import ENGINE, EngineMetrics
from cluster.step import Step, Trip
from cluster.vllm_rounding import kernel_truncates
from experts.errors import LinkError
from experts.handshake import Identity
from experts.link import BlockingLink, connect
from experts.server import TORCH_DTYPES, WIRE_DTYPES
from experts.wire import Header, Kind, Limits

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
RECONNECT_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterAddress:
    """Where the router of this node listens, and how to prove that we may ask it."""

    address: str
    secret: bytes
    identity: Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    header: Header
    x: memoryview
    logits: memoryview


class RouterClient:
    """Asks the router for the routed experts' sum of one layer. Never raises: what fails poisons the step."""

    def __init__(
        self,
        router: RouterAddress,
        limits: Limits,
        step: Step,
        *,
        step_timeout_s: float,
        metrics: EngineMetrics = ENGINE,
    ) -> None:
        self._router = router
        self._limits = limits
        self._step = step
        self._step_timeout_s = step_timeout_s
        self._metrics = metrics
        self._link: BlockingLink | None = None
        self._seq = 0
        self._asked: _Question | None = None

    def connect(self, *, timeout_s: float) -> None:
        """Reaches the router, or raises LinkError with the last reason after `timeout_s`; for an engine's start."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                return self._open(deadline_s)
            except LinkError as error:
                if time.monotonic() + RECONNECT_S > deadline_s:
                    raise LinkError(f"no router within {timeout_s:g} s: {error}") from None
                time.sleep(RECONNECT_S)

    def ask(self, layer: int, x: Tensor, logits: Tensor, *, scale: float) -> None:
        """Sends a layer's question; `answer` must follow.

        x: [num_tokens, hidden_size]; logits: [num_tokens, num_experts], any float dtype of the wire.
        scale: factor on the routing weights.
        """
        self._asked = None
        if self._step.poisoned:
            return
        self._seq += 1
        deadline_s = self._step.deadline_s(self._step_timeout_s)
        header = Header(
            Kind.QUESTION,
            dtype=WIRE_DTYPES[x.dtype],
            logits_dtype=WIRE_DTYPES[logits.dtype],
            layer=layer,
            num_rows=x.shape[0],
            num_extra=logits.shape[1],
            scale=scale,
            truncate=kernel_truncates(x.dtype),
            seq=self._seq,
        )
        self._asked = _Question(header=header, x=_view(x), logits=_view(logits))
        try:
            self._send(deadline_s)
        except LinkError:
            self._lose_link()  # answer() opens another one and asks again

    def answer(self, like: Tensor) -> Tensor:
        """The routed experts' sum for what was asked, a fresh tensor like `like`; zeros where the step is poisoned."""
        result = None
        if self._asked is not None:
            begun_s = time.monotonic()
            result = self._wait()
            self._metrics.wait_notes.append(time.monotonic() - begun_s)
        self._asked = None
        if result is None:
            return torch.zeros_like(like)
        header, payload = result
        # Copied: vLLM scales the result in place, and the reader's buffer is written again.
        y = torch.frombuffer(payload, dtype=TORCH_DTYPES[header.dtype]).view(like.shape)
        return y.clone() if like.device.type == "cpu" else y.to(like.device)

    def _wait(self) -> tuple[Header, memoryview] | None:
        deadline_s = self._step.deadline_s(self._step_timeout_s)
        last_error = "no answer"
        while time.monotonic() < deadline_s:
            try:
                if self._link is None:
                    self._open(deadline_s)
                    self._send(deadline_s)
                    self._metrics.question_retries += 1
                return self._receive(deadline_s)
            except TimeoutError:
                self._lose_link()  # a late answer must not meet the next question
            except LinkError as error:
                last_error = str(error)
                self._lose_link()
                time.sleep(RECONNECT_S)
        self._lose_link()  # the next question must not meet this one, which may still be open at the router
        self._step.poison(f"the router did not answer within {self._step_timeout_s:g} s ({last_error}); try again")
        return None

    def _receive(self, deadline_s: float) -> tuple[Header, memoryview] | None:
        assert self._link is not None and self._asked is not None
        asked = self._asked.header
        while True:
            header, payload = self._link.receive(deadline_s=deadline_s)
            if header.seq != asked.seq:
                continue  # an answer to a question that was asked again
            if header.kind is Kind.FAILURE:
                self._step.poison(bytes(payload).decode("utf-8", "replace"))
                return None
            if header.kind is not Kind.ANSWER or header.num_rows != asked.num_rows or header.dtype is not asked.dtype:
                raise LinkError(f"the router answered with {header.kind.name} of {header.num_rows} rows")
            self._step.dropped_rows += header.num_extra
            return header, payload

    def _open(self, deadline_s: float) -> None:
        timeout_s = min(CONNECT_TIMEOUT_S, max(deadline_s - time.monotonic(), 0.01))
        sock, _ = connect(self._router.address, self._router.secret, self._router.identity, timeout_s=timeout_s)
        self._link = BlockingLink(sock, self._limits)

    def _send(self, deadline_s: float) -> None:
        if self._link is None:
            raise LinkError("no link")
        assert self._asked is not None
        # The router gives up first, and says why.
        header = self._asked.header._replace(budget_ms=max(int((deadline_s - time.monotonic()) * 900), 1))
        self._link.send(header, (self._asked.x, self._asked.logits), deadline_s=deadline_s)

    def _lose_link(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None


class TracedRouterClient(RouterClient):
    """The same, and it writes down the trips of the steps that are traced."""

    _begun_ns = _sent_ns = 0  # of the newest question, on time.time_ns()

    def ask(self, layer: int, x: Tensor, logits: Tensor, *, scale: float) -> None:
        if self._step.trips is None:
            super().ask(layer, x, logits, scale=scale)
            return
        self._begun_ns = time.time_ns()
        super().ask(layer, x, logits, scale=scale)
        self._sent_ns = time.time_ns()

    def answer(self, like: Tensor) -> Tensor:
        trips, asked = self._step.trips, self._asked
        y = super().answer(like)
        if trips is not None and asked is not None:
            trip = Trip(
                layer=asked.header.layer,
                num_rows=asked.header.num_rows,
                begun_ns=self._begun_ns,
                ended_ns=time.time_ns(),
                dispatch_s=(self._sent_ns - self._begun_ns) / 1e9,
                wait_s=self._metrics.wait_notes[-1],
            )
            trips.append(trip)
        return y


def _view(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; 16-bit floats as integers, since numpy has no bfloat16."""
    host = tensor.detach().to("cpu").contiguous()
    if host.dtype is torch.bfloat16:
        host = host.view(torch.uint16)
    return host.numpy().data.cast("B")
