"""What engines, gateways and the controller count; experts/metrics.py and router/metrics.py have the others.

An engine process and a gateway process have one of each for the process, as they have one step: `ENGINE`, `GATEWAY`.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from types import TracebackType
from typing import Literal, Self, get_args

from prometheus_client import Metric

from cluster.request_log import RECORD, Detail, Record
from experts.counting import MAX_NOTES, PLACEMENT_VERSION, Histogram, counter, gauge, histogram
from experts.placement import Member, Placement

ScaleDirection = Literal["up", "down"]
ScaleReason = Literal["busy", "idle", "bounds"]  # those of cluster/autoscale.py that change a target
SURFACES = ("http", "grpc")
# How a request ends; all but the first two are of cluster/gateway_errors.py.
OUTCOMES = (
    "ok",
    "cancelled",
    "model_not_found",
    "context_length_exceeded",
    "body_too_large",
    "slow_body",
    "headers_too_large",
    "invalid_api_key",
    "method_not_allowed",
    "not_found",
    "invalid_value",
    "refused",
    "deadline_exceeded",
    "overloaded",
    "unavailable",
    "internal_error",
)
REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

STEP_SECONDS = histogram(
    "expertmesh_step_seconds", "seconds", "One step of an engine, from being scheduled until its tokens are taken."
)
STEP_TOKENS = counter(
    "expertmesh_step_tokens_total", "tokens", "Tokens that steps have computed, those of prompts included."
)
POISONED_STEPS = counter(
    "expertmesh_poisoned_steps_total",
    "steps",
    "Steps that could not be computed in time, whose requests ended with an error.",
)
ANSWER_WAIT_SECONDS = histogram(
    "expertmesh_answer_wait_seconds",
    "seconds",
    "An engine's wait for the routed experts of one layer, once its own work on the layer is done.",
)
QUESTION_RETRIES = counter(
    "expertmesh_question_retries_total",
    "questions",
    "Questions that an engine sent over a new link, since the one to its router had broken.",
)
ENGINE_REQUESTS = gauge(
    "expertmesh_engine_requests", "requests", "Requests at an engine, by state: running, waiting.", ("state",)
)
KV_BLOCKS = gauge(
    "expertmesh_kv_blocks",
    "blocks",
    "Blocks of an engine's KV cache, by state: used by requests, or free (with or without a cached prefix).",
    ("state",),
)
GATEWAY_TASKS = gauge("expertmesh_gateway_tasks", "tasks", "Tasks on a gateway's event loop.")
OPEN_REQUESTS = gauge("expertmesh_open_requests", "requests", "Requests that the process has in hand.")
REQUESTS = counter(
    "expertmesh_requests_total",
    "requests",
    "Generations that have ended, by surface (http, grpc) and outcome: ok, cancelled, or the error's code.",
    ("surface", "outcome"),
)
FIRST_TOKEN_SECONDS = histogram(
    "expertmesh_time_to_first_token_seconds", "seconds", "From a checked request to its first token, of streams."
)
INTER_TOKEN_SECONDS = histogram(
    "expertmesh_inter_token_seconds", "seconds", "Between two outputs of a stream that bring tokens."
)
FAILOVERS = counter(
    "expertmesh_failovers_total",
    "requests",
    "Losses of an attention replica, by what became of a request there: continued on another one, or given_up.",
    ("outcome",),
)
MEMBERS = gauge(
    "expertmesh_members", "members", "Members with a lease, by kind: experts, router, attention.", ("kind",)
)
GROUP_COPIES = gauge(
    "expertmesh_group_copies", "replicas", "Live copies of an expert group in the placement.", ("group",)
)
SCALE_DECISIONS = counter(
    "expertmesh_scale_decisions_total",
    "decisions",
    "Changes of an expert group's target, by direction (up, down) and reason (busy, idle, bounds).",
    ("group", "direction", "reason"),
)


class EngineMetrics:
    """Of one engine process; written by the thread that runs its steps."""

    def __init__(self) -> None:
        self.question_retries = 0
        self.wait_notes: deque[float] = deque(maxlen=MAX_NOTES)  # seconds that layers have waited in this step
        self.requests: Callable[[], tuple[int, int]] = lambda: (0, 0)  # running, waiting; the scheduler knows
        self.kv_blocks: Callable[[], tuple[int, int]] = lambda: (0, 0)  # used, free; the scheduler knows
        self._begun_s = 0.0
        self._steps = Histogram()
        self._tokens = 0
        self._poisoned = 0
        self._waits = Histogram()

    def begin_step(self) -> None:
        self._begun_s = time.monotonic()

    def end_step(self, num_tokens: int, *, poisoned: bool) -> None:
        """A step without tokens was none."""
        while self.wait_notes:
            self._waits.observe(self.wait_notes.popleft())
        if num_tokens:
            self._steps.observe(time.monotonic() - self._begun_s)
            self._tokens += num_tokens
            self._poisoned += poisoned

    def collect(self) -> Iterable[Metric]:
        running, waiting = self.requests()
        yield STEP_SECONDS.one(self._steps)
        yield STEP_TOKENS.one(self._tokens)
        yield POISONED_STEPS.one(self._poisoned)
        yield ANSWER_WAIT_SECONDS.one(self._waits)
        yield QUESTION_RETRIES.one(self.question_retries)
        yield ENGINE_REQUESTS.by_label({"running": running, "waiting": waiting})
        used, free = self.kv_blocks()
        yield KV_BLOCKS.by_label({"used": used, "free": free})


class AttentionMetrics:
    """Of one attention replica's own process; its engine is another one."""

    def __init__(self, open_requests: Callable[[], int]) -> None:
        self._open_requests = open_requests

    def collect(self) -> Iterable[Metric]:
        yield OPEN_REQUESTS.one(self._open_requests())


class GatewayMetrics:
    """Of one gateway; written on its event loop."""

    def __init__(self) -> None:
        self.first_token = Histogram(REQUEST_SECONDS)
        self.inter_token = Histogram(REQUEST_SECONDS)
        self.failovers: Callable[[], Mapping[str, int]] = dict  # by outcome; the gateway's engine knows
        self.log_detail: Detail = "facts"
        self.tasks: Callable[[], int] = lambda: 0  # on the event loop; the gateway knows
        self.refused_rpcs = 0  # overload, at once; counted on gRPC's thread
        self._open = 0
        self._outcomes: Counter[tuple[str, str]] = Counter()

    def request(self, surface: Literal["http", "grpc"]) -> "RequestCount":
        """A generation, counted when the `with` that it is given to ends."""
        return RequestCount(self, surface)

    def stream(self) -> "StreamClock":
        """A stream that begins now."""
        return StreamClock(self)

    def on_request(self) -> None:
        self._open += 1

    def on_request_end(self, surface: str, outcome: str) -> None:
        self._open -= 1
        self._outcomes[surface, outcome] += 1

    def collect(self) -> Iterable[Metric]:
        yield OPEN_REQUESTS.one(self._open)
        yield GATEWAY_TASKS.one(self.tasks())
        outcomes = {**dict.fromkeys(product(SURFACES, OUTCOMES), 0), **self._outcomes}
        outcomes["grpc", "overloaded"] += self.refused_rpcs
        yield REQUESTS.family(outcomes.items())
        yield FIRST_TOKEN_SECONDS.one(self.first_token)
        yield INTER_TOKEN_SECONDS.one(self.inter_token)
        yield FAILOVERS.by_label(self.failovers(), ("continued", "given_up"))


class RequestCount:
    """Counts one request as open while its `with` lasts, and then under its outcome, of which the log gets a line."""

    def __init__(self, metrics: GatewayMetrics, surface: str) -> None:
        self.outcome = "ok"  # whoever answers with an error sets its code
        self._metrics = metrics
        self._surface = surface

    def __enter__(self) -> Self:
        self._record = Record(surface=self._surface)
        RECORD.set(self._record)
        self._metrics.on_request()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, Exception):
            self.outcome = "cancelled"  # the client went away: asyncio and generators say so with such errors
        elif kind is not None and self.outcome == "ok":
            self.outcome = "internal_error"
        self._metrics.on_request_end(self._surface, self.outcome)
        self._record.write(self.outcome, self._metrics.log_detail)


class StreamClock:
    """The times of one stream's tokens."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._times = metrics.first_token
        self._later = metrics.inter_token
        self._last_s = time.monotonic()

    def on_tokens(self) -> None:
        """An output that brings tokens, however many."""
        now_s = time.monotonic()
        self._times.observe(now_s - self._last_s)
        self._times, self._last_s = self._later, now_s


class ControllerMetrics:
    """Of the controller; written on its event loop."""

    def __init__(self, num_groups: int) -> None:
        self._members: Counter[str] = Counter()
        self._placement = Placement(version=0, num_groups=num_groups)
        self._decisions: dict[tuple[int, str, str], int] = {}

    def on_sweep(self, members: Iterable[Member], placement: Placement) -> None:
        """What the controller knows now."""
        self._members = Counter(member.kind for member in members)
        self._placement = placement

    def on_scale_changes(self, group: int, changes: Mapping[str, int]) -> None:
        """How often a group's target was changed so far, by direction and reason, as in `up busy`.

        The numbers of a policy that begins anew begin at 0, which Prometheus takes for what it is.
        """
        for change, times in changes.items():
            direction, _, reason = change.partition(" ")
            self._decisions[group, direction, reason] = times

    def collect(self) -> Iterable[Metric]:
        members, placement = self._members, self._placement
        copies = Counter(replica.group for replica in placement.replicas)
        yield MEMBERS.by_label({kind: members[kind] for kind in ("experts", "router", "attention")})
        yield GROUP_COPIES.family(((group,), copies[group]) for group in range(placement.num_groups))
        yield PLACEMENT_VERSION.one(placement.version)
        none = product(range(placement.num_groups), get_args(ScaleDirection), get_args(ScaleReason))
        yield SCALE_DECISIONS.family({**dict.fromkeys(none, 0), **self._decisions}.items())


ENGINE = EngineMetrics()
GATEWAY = GatewayMetrics()
