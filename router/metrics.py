"""What a router counts: where the gate sends tokens, how evenly, and what became of the rows.

Counts are exact, of every token. The affinities of the balance factors are not among what the gate hands out, so they
are taken from a sample of its logits: one question in SAMPLE_EVERY, and of that at most SAMPLE_TOKENS.
"""

from collections import Counter, deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Metric

from experts.metrics import LINKS_REFUSED, PLACEMENT_VERSION, REFUSALS, Histogram, Pace, counter, gauge, histogram
from experts.placement import Replica
from experts.shape import MoEShape
from experts.wire import DType

if TYPE_CHECKING:
    from router.dispatch import Gate
    from router.server import RouterServer

WINDOW_S = 60.0  # of the gauges
MARK_EVERY_S = 5.0
SAMPLE_EVERY = 67  # a prime, so that all layers have their turn whatever their number (but for a multiple of it)
SAMPLE_TOKENS = 64

ROUTED_TOKENS = counter("expertmesh_routed_tokens_total", "tokens", "Tokens that the gate has routed.", ("layer",))
ROUTED_ROWS = counter(
    "expertmesh_routed_rows_total",
    "rows",
    "Rows that the gate asked of an expert group, dropped ones included.",
    ("group", "layer"),
)
FANOUT = histogram("expertmesh_fanout_groups", "groups", "Expert groups that a token visits in a layer.")
BALANCE_FACTOR = gauge(
    "expertmesh_balance_factor",
    "1",
    "DeepSeek-V2's balance sums over the last minute, by level (expert, device, communication); 1 is perfect.",
    ("layer", "level"),
)
BALANCEDNESS = gauge(
    "expertmesh_balancedness",
    "1",
    "Mean load over maximum load in the last minute, of experts by tokens and of groups by rows; 1 is perfect.",
    ("layer", "level"),
)
DISPATCH_SECONDS = histogram(
    "expertmesh_dispatch_seconds",
    "seconds",
    "From sending rows to the copy that was asked last until the first answer is here.",
    ("group",),
)
COMBINE_SECONDS = histogram(
    "expertmesh_combine_seconds",
    "seconds",
    "Adding the partial sums of one question and rounding them to the model's type.",
)
ROWS_IN_FLIGHT = gauge(
    "expertmesh_rows_in_flight",
    "rows",
    "Rows that were sent to a copy of an expert group, by the copy's id, and are not answered yet.",
    ("group", "copy"),
)
PARKED_ROWS = gauge("expertmesh_parked_rows", "rows", "Rows that wait for a live copy of their expert group.")
OPEN_QUESTIONS = gauge(
    "expertmesh_open_questions", "questions", "Questions that engines have asked and the router has not answered yet."
)
REROUTES = counter(
    "expertmesh_reroutes_total",
    "frames",
    "Frames whose rows went to another copy, or wait for one, by cause: link_lost, nack, silence.",
    ("cause",),
)
LATE_ANSWERS = counter(
    "expertmesh_late_answers_total",
    "frames",
    "Answers of expert replicas that came after another copy's, or after the question had ended.",
)
FAILED_QUESTIONS = counter(
    "expertmesh_failed_questions_total", "questions", "Questions that could not be answered before their deadline."
)
DROPPED_ROWS = counter(
    "expertmesh_dropped_rows_total",
    "rows",
    "Rows left out because of router.capacity_factor: tokens dropped, once for each group that lacks them.",
)
# Cause -> the dispatcher's own name for it.
_CAUSES = {"link_lost": "reroutes", "nack": "nacks", "silence": "timeouts"}


class LayerSums(NamedTuple):
    """Sums over tokens, by MoE layer; float64, in which whole numbers are exact up to 2^53."""

    tokens: NDArray[np.float64]  # [num_layers]
    selected: NDArray[np.float64]  # [num_layers, num_experts] tokens that select each expert
    rows: NDArray[np.float64]  # [num_layers, num_groups] tokens that visit each group
    sampled: NDArray[np.float64]  # [num_layers] tokens that the sample stands for
    scores: NDArray[np.float64]  # [num_layers, num_experts] their affinities; those of one token add up to 1


class RoutingCounts:
    """Counts what a gate decides. `sums` and `in_window` may be called on any thread, all else on the data plane's."""

    def __init__(self, shape: MoEShape, *, num_groups: int, sample_every: int = SAMPLE_EVERY) -> None:
        self.layers = shape.moe_layers
        self.fanout = np.zeros(num_groups + 1, dtype=np.int64)  # tokens by the number of groups that they visit
        self.num_groups = num_groups
        # A model group lies within one expert group, so a token visits no more expert groups than model groups.
        self.max_groups = min(shape.topk_group if shape.num_model_groups > 1 else shape.top_k, num_groups)
        self._shape = shape
        self._index = {layer: i for i, layer in enumerate(self.layers)}
        # All sums side by side, so that a mark of the window is one copy.
        self._sheet = np.zeros((len(self.layers), 2 + 2 * shape.num_experts + num_groups))
        self._sums = self._parts(self._sheet)
        self._notes: list[tuple[int, NDArray[np.int32]]] = []
        self._pace = Pace()
        self._sample_every = sample_every
        self._until_sample = 1
        self._marks = deque([(float("-inf"), self._sheet.copy())])

    def counted(self, gate: "Gate") -> "Gate":
        """The same gate, whose decisions are counted: topk_idx must ascend within a token, and never change again."""

        def count_and_route(
            layer: int, logits: NDArray[np.generic], dtype: DType, scale: float
        ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
            routing = gate(layer, logits, dtype, scale)
            self._notes.append((layer, routing[0]))
            self._until_sample -= 1
            if not self._until_sample:
                self._sample(layer, logits)
            return routing

        return count_and_route

    def tick(self, now_s: float) -> None:
        """To be called every few hundredths of a second: counts what was noted, and moves the window on."""
        if self._pace.is_due(len(self._notes), now_s):
            self.fold()
        if now_s - self._marks[-1][0] >= MARK_EVERY_S:
            self._marks.append((now_s, self._sheet.copy()))
            while self._marks[1][0] <= now_s - WINDOW_S:
                self._marks.popleft()

    def fold(self) -> None:
        """Counts what was noted since the last time."""
        if not self._notes:
            return
        notes, self._notes = self._notes, []
        num_layers, num_experts, num_groups = len(self.layers), self._shape.num_experts, self.num_groups
        # One row for each choice and not for each token: numpy is several times faster along tokens.
        chosen = np.concatenate([topk_idx for _, topk_idx in notes]).T.copy()  # [top_k, num_tokens]
        layer = np.repeat([self._index[layer] for layer, _ in notes], [len(topk_idx) for _, topk_idx in notes])
        group = chosen // (num_experts // num_groups)
        another = group[1:] != group[:-1]  # experts ascend: another group than before is one more that is visited
        later = (layer * num_groups + group[1:]).ravel().take(np.flatnonzero(another))
        self._sums.tokens[:] += np.bincount(layer, minlength=num_layers)
        self._sums.selected[:] += _count(layer * num_experts + chosen, (num_layers, num_experts))
        self._sums.rows[:] += _count(layer * num_groups + group[0], (num_layers, num_groups))
        self._sums.rows[:] += _count(later, (num_layers, num_groups))
        self.fanout += np.bincount(1 + another.sum(axis=0, dtype=np.int32), minlength=num_groups + 1)

    @property
    def sums(self) -> LayerSums:
        """Since the router's start."""
        return self._parts(self._sheet.copy())

    @property
    def in_window(self) -> LayerSums:
        """In the last WINDOW_S, or up to MARK_EVERY_S more; since the start where that is less."""
        return self._parts(self._sheet - self._marks[0][1])

    def _sample(self, layer: int, logits: NDArray[np.generic]) -> None:
        self._until_sample = self._sample_every
        stride = -(-len(logits) // SAMPLE_TOKENS)
        scores = affinities(logits[::stride], scoring=self._shape.scoring)
        scores = scores[np.isfinite(scores).all(axis=1)]  # a token without finite scores has none
        if len(scores):
            # Every question counts by its tokens, not by how many of them were looked at.
            i = self._index[layer]
            self._sums.sampled[i] += len(logits)
            self._sums.scores[i] += scores.sum(axis=0, dtype=np.float64) * (len(logits) / len(scores))

    def _parts(self, sheet: NDArray[np.float64]) -> LayerSums:
        num_experts, num_groups = self._shape.num_experts, self.num_groups
        rows_end = 2 + num_experts + num_groups
        return LayerSums(
            tokens=sheet[:, 0],
            sampled=sheet[:, 1],
            selected=sheet[:, 2 : 2 + num_experts],
            rows=sheet[:, 2 + num_experts : rows_end],
            scores=sheet[:, rows_end:],
        )


class RouterMetrics:
    """Of one router: what the gate decided, and what its server and dispatcher have counted by themselves."""

    def __init__(self, routing: RoutingCounts, server: "RouterServer") -> None:
        self._routing = routing
        self._server = server
        self._dispatch = [Histogram() for _ in range(routing.num_groups)]
        self._combine = Histogram()

    def tick(self, now_s: float) -> None:
        """To be called on the data plane's thread, every few hundredths of a second."""
        self._routing.tick(now_s)
        dispatched, combined = self._server.dispatcher.dispatch_notes, self._server.combine_notes
        while dispatched:
            group, seconds = dispatched.popleft()
            self._dispatch[group].observe(seconds)
        while combined:
            self._combine.observe(combined.popleft())

    def collect(self) -> Iterable[Metric]:
        yield from self._routed()
        yield from self._balance()
        yield from self._dispatched()
        yield COMBINE_SECONDS.one(self._combine)
        yield LINKS_REFUSED.by_label(dict(self._server.refused), REFUSALS)

    def _routed(self) -> Iterable[Metric]:
        routing, sums = self._routing, self._routing.sums
        yield ROUTED_TOKENS.family(((layer,), tokens) for layer, tokens in zip(routing.layers, sums.tokens.tolist()))
        yield ROUTED_ROWS.family(
            ((group, layer), rows)
            for layer, by_group in zip(routing.layers, sums.rows.tolist())
            for group, rows in enumerate(by_group)
        )
        fanout = Histogram(range(1, routing.num_groups + 1))
        fanout.counts[:-1] = routing.fanout[1:].tolist()
        fanout.total = sum(groups * tokens for groups, tokens in enumerate(routing.fanout.tolist()))
        yield FANOUT.one(fanout)

    def _balance(self) -> Iterable[Metric]:
        sums = self._routing.in_window
        factors = balance_factors_of(sums, max_groups=self._routing.max_groups)
        evenness = {"expert": balancedness_of(sums.selected), "group": balancedness_of(sums.rows)}
        for spec, by_level in ((BALANCE_FACTOR, factors), (BALANCEDNESS, evenness)):
            yield spec.family(
                ((layer, level), value)
                for level, values in by_level.items()
                for layer, value in zip(self._routing.layers, values.tolist())
                if np.isfinite(value)  # a layer without tokens has no balance
            )

    def _dispatched(self) -> Iterable[Metric]:
        dispatcher = self._server.dispatcher
        yield DISPATCH_SECONDS.family(((group,), times) for group, times in enumerate(self._dispatch))
        in_flight = Counter({(replica.group, _short(replica)): 0 for replica in dispatcher.placement.replicas})
        for replica, num_rows in dispatcher.in_flight:
            in_flight[replica.group, _short(replica)] += num_rows
        yield ROWS_IN_FLIGHT.family(in_flight.items())
        yield PARKED_ROWS.one(dispatcher.parked_rows)
        yield OPEN_QUESTIONS.one(dispatcher.open_questions)
        counts = dispatcher.counts
        yield REROUTES.by_label({cause: counts[name] for cause, name in _CAUSES.items()})
        yield LATE_ANSWERS.one(counts["late_answers"])
        yield FAILED_QUESTIONS.one(counts["failures"])
        yield DROPPED_ROWS.one(counts["dropped_rows"])
        yield PLACEMENT_VERSION.one(dispatcher.placement.version)


def affinities(logits: NDArray[np.generic], *, scoring: str) -> NDArray[np.float32]:
    """[num_tokens, num_experts] that add up to 1 for a token, as the balance factors want them: softmax, or sigmoid
    over its sum (DeepSeek-V3, 2.1.2); NaN where logits are not finite.

    logits: float32, float16, or uint16 for the bits of bfloat16.
    """
    values = (logits.astype(np.uint32) << 16).view(np.float32) if logits.dtype == np.uint16 else logits
    values = values.astype(np.float32)
    with np.errstate(all="ignore"):
        if scoring == "softmax":
            scores = np.exp(values - values.max(axis=1, keepdims=True))
        else:
            scores = 1 / (1 + np.exp(-values))
        return scores / scores.sum(axis=1, keepdims=True)


def balance_factors_of(sums: LayerSums, *, max_groups: int) -> dict[str, NDArray[np.float64]]:
    """By level, [num_layers]: router/balance.py's three factors, from sums; NaN where a layer has no tokens.

    Equal to them where the sample is of all tokens.
    """
    num_layers, num_experts = sums.selected.shape
    num_groups = sums.rows.shape[1]
    with np.errstate(all="ignore"):
        f = sums.selected * (num_experts / sums.selected.sum(axis=1, keepdims=True))
        p = sums.scores / sums.sampled[:, None]
        f_communication = sums.rows * (num_groups / (max_groups * sums.tokens[:, None]))
    f_device = f.reshape(num_layers, num_groups, -1).mean(axis=2)
    p_device = p.reshape(num_layers, num_groups, -1).sum(axis=2)
    return {
        "expert": (f * p).sum(axis=1),
        "device": (f_device * p_device).sum(axis=1),
        "communication": (f_communication * p_device).sum(axis=1),
    }


def balancedness_of(load: NDArray[np.float64]) -> NDArray[np.float64]:
    """[num_layers]: mean over maximum of load [num_layers, n]; NaN where there is none."""
    with np.errstate(all="ignore"):
        return load.mean(axis=1) / load.max(axis=1)


def _count(slots: NDArray[np.integer], shape: tuple[int, int]) -> NDArray[np.int64]:
    return np.bincount(slots.ravel(), minlength=shape[0] * shape[1]).reshape(shape)


def _short(replica: Replica) -> str:
    """The replica's id, as it is in its own samples."""
    return replica.member_id.rpartition("#")[2]
