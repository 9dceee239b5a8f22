"""Dispatch and combine: the trip of a layer's rows to the expert groups and back, as events and what follows from them.

Nothing here waits, reads a clock or owns a socket: events come in with `now_s`, frames go out through a Transport.
Partial sums are added in float32, in the order of the groups, whichever copy computed them and whenever they came,
so the same question always has the same bits as its answer.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from experts.counting import MAX_NOTES
from experts.errors import FrameError
from experts.placement import Placement, Replica
from experts.room import Room
from experts.wire import DType, Header, Kind
from router.drop import drop_rows
from router.jobs import Asker, Errand, Failure, Job, combine, failure_of
from router.pace import HEDGE_FLOOR_S, Paces
from router.plan import GroupRows, count_rows, make_plan
from router.transport import Transport

# (layer, raw logits [num_tokens, num_experts], their dtype, scale) -> topk_idx int32, topk_weights float32
Gate = Callable[[int, NDArray[np.generic], DType, float], tuple[NDArray[np.int32], NDArray[np.float32]]]


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
        self._rooms = defaultdict[Asker, Room](Room)  # of everybody who has asked, one question at a time
        self._asked: dict[int, Errand[Asker]] = {}  # by seq
        self._parked: list[Errand[Asker]] = []
        self._rows_at: Counter[tuple[str, int]] = Counter()  # rows in flight by (member id, incarnation)
        self._paces = [Paces() for _ in range(num_groups)]  # by group
        self._seqs = count(1)
        self.counts: Counter[str] = Counter()
        # By group, of every answer that was waited for: seconds since the last copy was asked.
        self.dispatch_notes: list[deque[float]] = [deque(maxlen=MAX_NOTES) for _ in range(num_groups)]

    # Events.

    def on_question(
        self, asker: Asker, header: Header, x: NDArray[np.generic], logits: NDArray[np.generic], *, now_s: float
    ) -> None:
        """Routes, plans and sends. Neither x nor logits is looked at again afterwards. Raises FrameError."""
        if asker in self._jobs:
            raise FrameError("a second question before the first was answered")
        try:
            topk_idx, topk_weights = self._gate(header.layer, logits, header.logits_dtype, header.scale)
        except ValueError as error:  # such as a factor on a path that has none: the asker's fault, and its link's end
            raise FrameError(f"the gate refuses the question: {error}") from None
        plan, dropped_rows = self._plan(topk_idx, topk_weights)
        room = self._rooms[asker]
        room.clear()  # whoever asks has the answer to the question before
        job = Job(
            asker=asker,
            header=header,
            room=room,
            x=room.take(x.shape, x.dtype),
            y=room.take(x.shape, np.float32),
            deadline_s=now_s + header.budget_ms / 1000,
            dropped_rows=dropped_rows,
        )
        job.x[...], job.y[...] = x, 0
        job.errands = [Errand(job=job, rows=rows) for rows in plan]
        self._jobs[asker] = job
        for errand in job.errands:
            self._send(errand, now_s)

    def on_partial(
        self, replica: Replica, header: Header, partial: NDArray[np.float32], *, now_s: float
    ) -> Job[Asker] | None:
        """Adds the partial sums, or keeps a copy until it is their turn. The job, once they were its last."""
        self._paces[replica.group].on_answer(_key(replica), header.seq, now_s=now_s)
        errand = self._errand_of(replica, header)
        if errand is None:
            return None
        if partial.shape != (len(errand.rows.tokens), errand.job.x.shape[1]):
            raise FrameError(f"{replica.member_id} answered {len(errand.rows.tokens)} rows with {len(partial)}")
        self.dispatch_notes[errand.rows.group].append(now_s - errand.asked_s)
        self._settle(errand)
        combine(errand, partial)
        return self._finish(errand.job) if errand.job.is_complete else None

    def on_nack(self, replica: Replica, header: Header, *, now_s: float) -> None:
        """The replica does not hold what the placement said: ask another copy."""
        self._paces[replica.group].on_void(_key(replica), header.seq)
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
        self._paces[replica.group].on_down(_key(replica))

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
            for group, paces in enumerate(self._paces):
                paces.keep({_key(replica) for replica in placement.of_group(group)})
            for errand in self._asked.values():
                errand.refused_by.clear()  # who refused by the old snapshot may hold by the new one
            self.on_replica_up(now_s=now_s)

    def on_asker_gone(self, asker: Asker) -> None:
        """Nobody waits for the answer any more."""
        job = self._jobs.get(asker)
        if job is not None:
            self._finish(job)
        self._rooms.pop(asker, None)

    def on_tick(self, now_s: float) -> list[tuple[Asker, Failure]]:
        """What has to end because of the time; called every few hundredths of a second."""
        old = [errand for errand in self._asked.values() if now_s - errand.asked_s > HEDGE_FLOOR_S]
        for errand in dict.fromkeys(old):  # once each, however many copies it waits for
            self._ask_another(errand, now_s)
        if any(now_s - errand.asked_s > self._dispatch_timeout_s for errand in self._parked):
            self.on_replica_up(now_s=now_s)  # those who refused may have learned better without any event here
        late = [job for job in self._jobs.values() if now_s > job.deadline_s]
        return [(job.asker, self._give_up(job)) for job in late]

    # What there is now, for any thread.

    @property
    def in_flight(self) -> list[tuple[Replica, int]]:
        """Copies in the placement, with the rows that each of them owes."""
        return [(replica, self._rows_at[_key(replica)]) for replica in self.placement.replicas]

    @property
    def parked_rows(self) -> int:
        return sum(len(errand.rows.tokens) for errand in list(self._parked))

    @property
    def open_questions(self) -> int:
        return len(self._jobs)

    def owes(self, replica: Replica) -> bool:
        """Whether rows are with this replica."""
        return self._rows_at[_key(replica)] > 0

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
        errand.asked_s = now_s
        copies, slow = self._copies(errand, now_s)
        if any(self._ask(errand, replica, now_s) for replica in copies):
            self._probe(errand, slow, now_s)
        elif not errand.asked:
            self._parked.append(errand)

    def _ask(self, errand: Errand[Asker], replica: Replica, now_s: float) -> bool:
        """False where there is no link to the replica: another one has to be asked."""
        rows, job, x, key = errand.rows, errand.job, errand.x(), _key(replica)
        seq = next(self._seqs)
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
        self._rows_at[key] += len(x)
        self._paces[rows.group].on_sent(key, seq, self._rows_at[key], now_s=now_s)
        if self._transport.send_rows(replica, header, (x.data.cast("B"), rows.pairs.data.cast("B"))):
            return True
        self._paces[rows.group].on_void(key, seq)
        # Forgotten already: the send broke the link, and the event of that has sent the rows elsewhere.
        return self._forget(seq) is None

    def _copies(self, errand: Errand[Asker], now_s: float) -> tuple[Sequence[Replica], Sequence[Replica]]:
        """Copies of the errand's group that may be asked, the least loaded first and slow ones last; the slow ones."""
        all_copies = self.placement.of_group(errand.rows.group)
        if not errand.refused_by and not errand.asked and len(all_copies) == 1:
            return all_copies, ()
        keys = list(map(_key, all_copies))
        slow = self._paces[errand.rows.group].slow(keys, now_s=now_s)
        passed_over = errand.refused_by.union(map(_key, errand.asked.values()))
        copies = [replica for key, replica in zip(keys, all_copies, strict=True) if key not in passed_over]
        copies.sort(key=lambda replica: (_key(replica) in slow, self._rows_at[_key(replica)]))
        return copies, [replica for replica in copies if _key(replica) in slow] if slow else ()

    def _probe(self, errand: Errand[Asker], slow: Sequence[Replica], now_s: float) -> None:
        """Asks a slow copy, too, now and then: finding out whether it is quick again costs the errand no time."""
        for replica in slow:
            is_due = self._paces[errand.rows.group].is_probe_due(_key(replica), now_s=now_s)
            # Without anybody asked the errand is answered, or parked, already.
            if is_due and errand.asked and replica not in errand.asked.values():
                self.counts["probes"] += self._ask(errand, replica, now_s)

    def _ask_another(self, errand: Errand[Asker], now_s: float) -> None:
        """Asks one more copy after a silence, and sooner where a quick one would have answered long ago.

        Where there is none, those asked are waited for until the deadline.
        """
        timed_out = now_s - errand.asked_s > self._dispatch_timeout_s
        if timed_out or self._may_hedge(errand, now_s):
            before = len(errand.asked)
            self._send(errand, now_s)
            self.counts["timeouts" if timed_out else "hedges"] += len(errand.asked) > before

    def _may_hedge(self, errand: Errand[Asker], now_s: float) -> bool:
        """Whether all that are asked are overdue, and a copy is left that is not slow itself."""
        paces, group = self._paces[errand.rows.group], [_key(r) for r in self.placement.of_group(errand.rows.group)]
        if not all(paces.is_overdue(_key(r), seq, group, now_s=now_s) for seq, r in errand.asked.items()):
            return False
        copies, slow = self._copies(errand, now_s)
        return len(copies) > len(slow)

    def _errand_of(self, replica: Replica, header: Header) -> Errand[Asker] | None:
        """The errand that an answer belongs to; None for one that was answered by another copy, or given up."""
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
        parked = {errand.rows.group for errand in self._parked if errand.job is job}
        self._finish(job)
        self.counts["failures"] += 1
        return failure_of(job, parked)


def _key(replica: Replica) -> tuple[str, int]:
    return replica.member_id, replica.incarnation
