"""Dispatch and combine: the trip of a layer's rows to the expert groups and back, as events and what follows from them.

Nothing here waits, reads a clock or owns a socket: events come in with `now_s`, frames go out through a Transport.
Partial sums are added in float32, in the order of the groups, whichever copy computed them and whenever they came,
so the same question always has the same bits as its answer.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from experts.errors import FrameError
from experts.placement import Placement, Replica
from experts.wire import DType, Header, Kind
from router.compiled import compiled
from router.drop import drop_rows
from router.plan import GroupRows, count_rows, make_plan
from router.plan_kernels import add_rows
from router.transport import Transport

log = logging.getLogger(__name__)

Asker = TypeVar("Asker")

# (layer, raw logits [num_tokens, num_experts], their dtype, scale) -> topk_idx int32, topk_weights float32
Gate = Callable[[int, NDArray[np.generic], DType, float], tuple[NDArray[np.int32], NDArray[np.float32]]]


class Failure(NamedTuple):
    """A question that can not be answered in time, and why, in a sentence for the client."""

    seq: int
    reason: str


@dataclass(slots=True, kw_only=True, eq=False)
class Job(Generic[Asker]):
    """One question: a layer of one step of one attention replica."""

    asker: Asker
    header: Header
    x: NDArray[np.generic]  # [num_tokens, hidden_size]; uint16 holds the bits of bfloat16
    deadline_s: float
    errands: list["Errand[Asker]"] = field(default_factory=list)
    waiting: int = 0  # errands without a partial sum
    dropped_rows: int = 0  # rows beyond their groups' budgets, which are not in the answer


@dataclass(slots=True, kw_only=True, eq=False)
class Errand(Generic[Asker]):
    """The rows of one job at one expert group, and the replicas that are asked: another one after each silence.

    Whoever answers first is believed, since every copy computes the same bits.
    """

    job: Job[Asker]
    rows: GroupRows
    asked: dict[int, Replica] = field(default_factory=dict)  # by seq: who owes an answer
    asked_s: float = 0.0  # when the last one was asked, or when none was found
    refused_by: set[tuple[str, int]] = field(default_factory=set)  # (member id, incarnation) that answered NACK
    partial: NDArray[np.float32] | None = None  # [num_rows, hidden_size]


class Dispatcher(Generic[Asker]):
    """All questions of one router. Events return what is finished: (asker, answer or failure)."""

    def __init__(
        self,
        gate: Gate,
        transport: Transport,
        *,
        num_experts: int,
        num_groups: int,
        dispatch_timeout_s: float,
        capacity_factor: float | None = None,
    ) -> None:
        """capacity_factor: rows that a group may have in one question, in mean loads of a group; None: all of them."""
        self._gate = gate
        self._transport = transport
        self._num_experts = num_experts
        self._dispatch_timeout_s = dispatch_timeout_s
        self._capacity_factor = capacity_factor
        self.placement = Placement(version=0, num_groups=num_groups)
        self._jobs: dict[Asker, Job[Asker]] = {}
        self._asked: dict[int, Errand[Asker]] = {}  # by seq
        self._silent: set[tuple[str, int]] = set()  # (member id, incarnation) that has let a dispatch_timeout_s pass
        self._parked: list[Errand[Asker]] = []
        self._rows_at: Counter[tuple[str, int]] = Counter()  # rows in flight by (member id, incarnation)
        self._last_seq = 0
        self.counts: Counter[str] = Counter()

    # Events.

    def on_question(
        self, asker: Asker, header: Header, x: NDArray[np.generic], logits: NDArray[np.generic], *, now_s: float
    ) -> None:
        """Routes, plans and sends. x and logits must stay as they are until the answer. Raises FrameError."""
        if asker in self._jobs:
            raise FrameError("a second question before the first was answered")
        try:
            topk_idx, topk_weights = self._gate(header.layer, logits, header.logits_dtype, header.scale)
        except ValueError as error:  # such as a factor on a path that has none: the asker's fault, and its link's end
            raise FrameError(f"the gate refuses the question: {error}") from None
        plan, dropped_rows = self._plan(topk_idx, topk_weights)
        job = Job(
            asker=asker,
            header=header,
            x=x,
            deadline_s=now_s + header.budget_ms / 1000,
            waiting=len(plan),
            dropped_rows=dropped_rows,
        )
        job.errands = [Errand(job=job, rows=rows) for rows in plan]
        self._jobs[asker] = job
        for errand in job.errands:
            self._send(errand, now_s)

    def on_partial(self, replica: Replica, header: Header, partial: NDArray[np.float32]) -> Job[Asker] | None:
        """Keeps a copy of the partial sums. The job, once it was its last; `combine` gives its answer then."""
        errand = self._errand_of(replica, header)
        if errand is None:
            return None
        if partial.shape != (len(errand.rows.tokens), errand.job.x.shape[1]):
            raise FrameError(f"{replica.member_id} answered {len(errand.rows.tokens)} rows with {len(partial)}")
        self._settle(errand)
        errand.partial = partial.copy()
        errand.job.waiting -= 1
        return self._finish(errand.job) if not errand.job.waiting else None

    def on_nack(self, replica: Replica, header: Header, *, now_s: float) -> None:
        """The replica does not hold what the placement said: ask another copy."""
        errand = self._errand_of(replica, header)
        if errand is not None:
            self.counts["nacks"] += 1
            errand.refused_by.add(_key(replica))
            self._forget(header.seq)
            self._send(errand, now_s)

    def on_replica_down(self, replica: Replica, *, now_s: float) -> None:
        """Its link broke: its rows go to another copy at once."""
        for seq in [seq for seq, errand in self._asked.items() if errand.asked[seq] == replica]:
            errand = self._forget(seq)
            if errand is not None:
                self.counts["reroutes"] += 1
                self._send(errand, now_s)
        self._rows_at.pop(_key(replica), None)
        self._silent.discard(_key(replica))

    def on_replica_up(self, *, now_s: float) -> None:
        """A link to a replica is there: rows that found no copy are tried again."""
        parked, self._parked = self._parked, []
        for errand in parked:
            errand.refused_by.clear()
            self._send(errand, now_s)

    def on_placement(self, placement: Placement, *, now_s: float) -> None:
        """A newer snapshot; an older one is ignored."""
        if placement.version > self.placement.version:
            self.placement = placement
            for errand in self._asked.values():
                errand.refused_by.clear()  # who refused by the old snapshot may hold by the new one
            self.on_replica_up(now_s=now_s)

    def on_asker_gone(self, asker: Asker) -> None:
        """Nobody waits for the answer any more."""
        job = self._jobs.get(asker)
        if job is not None:
            self._finish(job)

    def on_tick(self, now_s: float) -> list[tuple[Asker, Failure]]:
        """What has to end because of the time; called every few hundredths of a second."""
        silent = [e for e in self._asked.values() if now_s - e.asked_s > self._dispatch_timeout_s]
        for errand in dict.fromkeys(silent):  # once each, however many copies it waits for
            self._ask_another(errand, now_s)
        if any(now_s - errand.asked_s > self._dispatch_timeout_s for errand in self._parked):
            self.on_replica_up(now_s=now_s)  # those who refused may have learned better without any event here
        late = [job for job in self._jobs.values() if now_s > job.deadline_s]
        return [(job.asker, self._give_up(job)) for job in late]

    # What follows from them.

    def _plan(self, topk_idx: NDArray[np.int32], topk_weights: NDArray[np.float32]) -> tuple[list[GroupRows], int]:
        """The rows to send, and how many were dropped for a group's budget; counts both."""
        num_groups = self.placement.num_groups
        plan = make_plan(topk_idx, topk_weights, num_experts=self._num_experts, num_groups=num_groups)
        self.counts["rows"] += count_rows(plan)
        if self._capacity_factor is None:
            return plan, 0
        plan, dropped_rows = drop_rows(plan, capacity_factor=self._capacity_factor, num_groups=num_groups)
        self.counts["dropped_rows"] += dropped_rows
        return plan, dropped_rows

    def _send(self, errand: Errand[Asker], now_s: float) -> None:
        """Asks the best copy that owes nothing for this errand; parks the rows where nobody is left to wait for."""
        rows, job = errand.rows, errand.job
        # A gather copies; a group that every token visits gets the step's own buffer.
        x = job.x if len(rows.tokens) == len(job.x) else job.x[rows.tokens]
        errand.asked_s = now_s
        for replica in self._copies(errand):
            self._last_seq += 1
            seq = self._last_seq
            header = Header(
                Kind.ROWS,
                dtype=job.header.dtype,
                layer=job.header.layer,
                num_rows=len(x),
                num_extra=rows.num_pairs,
                seq=seq,
                placement_version=self.placement.version,
                incarnation=replica.incarnation,
            )
            # Registered before it is sent: a transport that computes in place may answer within the call.
            errand.asked[seq] = replica
            self._asked[seq] = errand
            self._rows_at[_key(replica)] += len(x)
            if self._transport.send_rows(replica, header, (x.data.cast("B"), rows.pairs.data.cast("B"))):
                return
            if self._forget(seq) is None:
                return  # the send broke the link, and the event of that has sent the rows elsewhere already
        if not errand.asked:
            self._parked.append(errand)

    def _copies(self, errand: Errand[Asker]) -> Sequence[Replica]:
        """Copies of the errand's group that may be asked: those that answer first, then the least loaded."""
        all_copies = self.placement.of_group(errand.rows.group)
        if not errand.refused_by and not errand.asked and len(all_copies) == 1:
            return all_copies
        passed_over = errand.refused_by.union(map(_key, errand.asked.values()))
        copies = [r for r in all_copies if _key(r) not in passed_over]
        return sorted(copies, key=lambda replica: (_key(replica) in self._silent, self._rows_at[_key(replica)]))

    def _ask_another(self, errand: Errand[Asker], now_s: float) -> None:
        """Asks another copy after a silence; where there is none, those asked are waited for until the deadline."""
        self._silent.update(map(_key, errand.asked.values()))
        before = len(errand.asked)
        self._send(errand, now_s)
        self.counts["timeouts"] += len(errand.asked) > before

    def _errand_of(self, replica: Replica, header: Header) -> Errand[Asker] | None:
        """The errand that an answer belongs to; None for one that was answered by another copy, or given up."""
        self._silent.discard(_key(replica))
        errand = self._asked.get(header.seq)
        if errand is None or errand.asked[header.seq] != replica or header.incarnation != replica.incarnation:
            self.counts["late_answers"] += 1
            return None
        return errand

    def _forget(self, seq: int) -> Errand[Asker] | None:
        """Nobody owes an answer to `seq` any more. Its errand, or None where that was so already."""
        errand = self._asked.pop(seq, None)
        if errand is not None:
            self._rows_at[_key(errand.asked.pop(seq))] -= len(errand.rows.tokens)
        return errand

    def _settle(self, errand: Errand[Asker]) -> None:
        for seq in list(errand.asked):
            self._forget(seq)

    def _finish(self, job: Job[Asker]) -> Job[Asker]:
        del self._jobs[job.asker]
        for errand in job.errands:
            self._settle(errand)
        if self._parked:
            self._parked = [errand for errand in self._parked if errand.job is not job]
        return job

    def _give_up(self, job: Job[Asker]) -> Failure:
        missing = sorted(errand.rows.group for errand in job.errands if errand.partial is None)
        parked = {errand.rows.group for errand in self._parked if errand.job is job}
        self._finish(job)
        self.counts["failures"] += 1
        waited = f"within {round(job.header.budget_ms / 1000, 1):g} s"
        if parked:
            return Failure(job.header.seq, f"no live copy of expert group {_numbers(parked)} {waited}; try again")
        return Failure(job.header.seq, f"expert group {_numbers(missing)} did not answer {waited}; try again")


def combine(job: Job[Asker]) -> NDArray[np.float32]:
    """[num_tokens, hidden_size]: the sum of a finished job's partial sums, group by group."""
    y = np.zeros(job.x.shape, dtype=np.float32)
    for errand in job.errands:
        assert errand.partial is not None
        if len(errand.rows.tokens) == len(y):
            y += errand.partial
        else:
            compiled(add_rows)(y, errand.rows.tokens, errand.partial)
    return y


def _key(replica: Replica) -> tuple[str, int]:
    return replica.member_id, replica.incarnation


def _numbers(groups: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(groups)))
