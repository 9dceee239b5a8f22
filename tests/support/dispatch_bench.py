"""A dispatcher with a clock of its own and replicas that compute in place, lose, refuse, break and come back."""

import random
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import silu

from experts.compute import Pairs, expert_ffn_loop
from experts.link import Bytes
from experts.placement import Placement, Replica
from experts.shape import MoEShape
from experts.weights import LayerWeights
from experts.wire import DType, Header, Kind
from router.dispatch import Dispatcher
from router.gate import route
from router.jobs import Failure
from router.transport import Answer, Expert, FaultyTransport

Rows = NDArray[np.float32]


class Bench:
    """Askers are names; answers and failures are collected by them."""

    def __init__(
        self,
        shape: MoEShape,
        *,
        num_groups: int,
        seed: int = 0,
        doubled: float = 0.0,
        capacity_factor: float | None = None,
    ) -> None:
        self.shape = shape
        self.num_groups = num_groups
        self.now_s = 100.0
        self.answers: dict[str, Rows] = {}
        self.failures: dict[str, Failure] = {}
        self.replicas: list[Replica] = []
        self.live: set[Replica] = set()
        self.breaking: set[Replica] = set()  # whose link breaks at the next send
        self.refusing: set[str] = set()  # member ids that answer NACK
        self.lossy: dict[str, float] = {}  # member id -> share of answers that never come
        self.sent: list[str] = []  # member ids in the order in which they were asked
        generator = torch.Generator().manual_seed(7)
        inner, hidden = shape.moe_intermediate_size, shape.hidden_size
        self.weights = LayerWeights(
            w13=torch.randn(shape.num_experts, 2 * inner, hidden, generator=generator),
            w2=torch.randn(shape.num_experts, hidden, inner, generator=generator),
        )
        self.bias = torch.randn(shape.num_experts, generator=generator) if shape.uses_bias else None
        self._random = random.Random(seed)
        self._faulty = FaultyTransport({}, hidden_size=hidden, seed=seed, doubled=doubled)
        self.dispatcher: Dispatcher[str] = Dispatcher(
            self._gate,
            self,
            num_experts=shape.num_experts,
            num_groups=num_groups,
            dispatch_timeout_s=1.0,
            capacity_factor=capacity_factor,
        )

    # Replicas.

    def copies(self, number: int) -> None:
        """`number` live copies of every group."""
        for group in range(self.num_groups):
            for copy in range(number):
                self.add(group, f"g{group}.{copy}")
        self.publish()

    def add(self, group: int, name: str) -> Replica:
        replica = Replica(member_id=name, group=group, address=f"unix:/{name}", incarnation=1000 + len(self.replicas))
        self.replicas.append(replica)
        self.live.add(replica)
        self._faulty.experts[name] = self._expert()
        return replica

    def publish(self, *, without: frozenset[Replica] = frozenset()) -> None:
        """The next placement version."""
        named = tuple(replica for replica in self.replicas if replica not in without)
        version = self.dispatcher.placement.version + 1
        self.dispatcher.on_placement(
            Placement(version=version, num_groups=self.num_groups, replicas=named), now_s=self.now_s
        )

    def down(self, replica: Replica) -> None:
        """Its link breaks, and with it everything that is on the way."""
        if replica in self.live:
            self.live.discard(replica)
            kept = [answer for answer in self._faulty.answers if answer.replica != replica]
            self._faulty.answers.clear()
            self._faulty.answers.extend(kept)
            self.dispatcher.on_replica_down(replica, now_s=self.now_s)

    def up(self, replica: Replica) -> None:
        self.live.add(replica)
        self.dispatcher.on_replica_up(now_s=self.now_s)

    # Questions and answers.

    def ask(self, asker: str, x: Rows, logits: Rows, *, scale: float = 1.0, budget_s: float = 10.0) -> None:
        header = Header(
            Kind.QUESTION,
            num_rows=len(x),
            num_extra=logits.shape[1],
            budget_ms=int(budget_s * 1000),
            scale=scale,
            seq=5,
        )
        self.dispatcher.on_question(asker, header, x, logits, now_s=self.now_s)

    def deliver(self) -> bool:
        """One answer arrives; False where none is on its way."""
        answer = self._faulty.take()
        if answer is None:
            return False
        self.arrive(answer)
        return True

    def arrive(self, answer: Answer) -> None:
        if self._random.random() < self.lossy.get(answer.replica.member_id, 0.0):
            return
        if answer.partial is None:
            self.dispatcher.on_nack(answer.replica, answer.header, now_s=self.now_s)
            return
        job = self.dispatcher.on_partial(answer.replica, answer.header, answer.partial, now_s=self.now_s)
        if job is not None:
            assert job.asker not in self.answers
            self.answers[job.asker] = job.y.copy()

    def deliver_all(self) -> None:
        while self.deliver():
            pass

    def held(self) -> list[Answer]:
        """Takes what is on its way, to let it arrive later."""
        answers = list(self._faulty.answers)
        self._faulty.answers.clear()
        return answers

    def tick(self, seconds: float) -> None:
        self.now_s += seconds
        self.failures |= dict(self.dispatcher.on_tick(self.now_s))

    def check_nothing_is_left(self) -> None:
        """No rows in flight, no question, nothing parked."""
        dispatcher = self.dispatcher
        assert not dispatcher._jobs and not dispatcher._asked and not dispatcher._parked
        assert not any(dispatcher._rows_at.values())

    def rows_at(self, replica: Replica) -> int:
        return self.dispatcher._rows_at[replica.member_id, replica.incarnation]

    # Transport, for the dispatcher.

    def send_rows(self, replica: Replica, header: Header, parts: Sequence[Bytes]) -> bool:
        if replica in self.breaking and replica in self.live:
            self.breaking.discard(replica)
            self.down(replica)  # as a loop does: the event comes before the send has returned
            return False
        if replica not in self.live:
            return False
        self.sent.append(replica.member_id)
        if replica.member_id in self.refusing:
            nack = Header(Kind.NACK, layer=header.layer, seq=header.seq, incarnation=replica.incarnation)
            self._faulty.answers.append(Answer(replica, nack, None))
            return True
        return self._faulty.send_rows(replica, header, parts)

    def _gate(
        self, layer: int, logits: NDArray[np.generic], dtype: DType, scale: float
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        routing = route(torch.from_numpy(logits), self.shape, bias=self.bias, scale=scale)
        return routing.topk_idx.numpy(), routing.topk_weights.numpy()

    def _expert(self) -> Expert:
        def compute(layer: int, x: Rows, pairs: NDArray[np.int32]) -> Rows:
            row, expert, weight = torch.from_numpy(pairs.copy())
            flat = Pairs(row=row, expert=expert, weight=weight.view(torch.float32))
            return expert_ffn_loop(torch.from_numpy(x.copy()), self.weights, flat).numpy()

        return compute


def dense_answer(bench: Bench, x: Rows, logits: Rows, *, scale: float) -> NDArray[np.float64]:
    """Every expert computes every token in float64; its weight is 0 where it was not chosen."""
    routing = route(torch.from_numpy(logits), bench.shape, bias=bench.bias, scale=scale)
    dense = torch.zeros(len(x), bench.shape.num_experts, dtype=torch.float64)
    dense.scatter_(1, routing.topk_idx.long(), routing.topk_weights.double())
    tokens = torch.from_numpy(x).double()
    y = torch.zeros_like(tokens)
    for expert in range(bench.shape.num_experts):
        gate, up = (tokens @ bench.weights.w13[expert].double().T).chunk(2, dim=1)
        y += dense[:, expert, None] * ((silu(gate) * up) @ bench.weights.w2[expert].double().T)
    return y.numpy()


def x_of(num_tokens: int, shape: MoEShape, seed: int) -> Rows:
    return np.random.default_rng([seed, 1]).standard_normal((num_tokens, shape.hidden_size), dtype=np.float32)


def logits_of(num_tokens: int, shape: MoEShape, seed: int) -> Rows:
    return np.random.default_rng([seed, 2]).standard_normal((num_tokens, shape.num_experts), dtype=np.float32)
