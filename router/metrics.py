"""What a router counts: where the gate sends tokens, how evenly, and what became of the rows."""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from prometheus_client import Metric

from experts.counting import LINKS_REFUSED, PLACEMENT_VERSION, REFUSALS, Histogram, counter, gauge, histogram, taken
from experts.placement import Replica
from router.routing_counts import RoutingCounts, balance_factors_of, balancedness_of

if TYPE_CHECKING:
    from router.server import RouterServer

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
    "Adding the last partial sums of a question and rounding all to the model's type; others were added as they came.",
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
    "Frames whose rows went to another copy, or wait for one, by cause: link_lost, nack, slow, silence.",
    ("cause",),
)
PROBES = counter(
    "expertmesh_probes_total",
    "frames",
    "Frames that were sent to a slow copy as well, to find out whether it is quick again.",
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
_CAUSES = {"link_lost": "reroutes", "nack": "nacks", "slow": "hedges", "silence": "timeouts"}


class RouterMetrics:
    """Of one router: what the gate decided, and what its server and dispatcher have noted and counted by themselves.

    `fold` is called on one thread, `collect` on any.
    """

    def __init__(self, routing: RoutingCounts, server: "RouterServer") -> None:
        self._routing = routing
        self._server = server
        self._dispatch = [Histogram() for _ in range(routing.num_groups)]
        self._combine = Histogram()

    def fold(self, now_s: float) -> None:
        """Counts what was noted since the last time; to be called every second at least, on one thread."""
        for times, notes in zip(self._dispatch, self._server.dispatcher.dispatch_notes, strict=True):
            for seconds in taken(notes):
                times.observe_all(seconds)
        for seconds in taken(self._server.combine_notes):
            self._combine.observe_all(seconds)
        self._routing.fold()
        self._routing.move_window(now_s)

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
        yield PROBES.one(counts["probes"])
        yield LATE_ANSWERS.one(counts["late_answers"])
        yield FAILED_QUESTIONS.one(counts["failures"])
        yield DROPPED_ROWS.one(counts["dropped_rows"])
        yield PLACEMENT_VERSION.one(dispatcher.placement.version)


def _short(replica: Replica) -> str:
    """The replica's id, as it is in its own samples."""
    return replica.member_id.rpartition("#")[2]
