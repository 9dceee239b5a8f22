"""A question under way: its rows at each expert group, who owes an answer, and the sum as far as it is there."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from experts.compiled import compiled
from experts.placement import Replica
from experts.room import Room
from experts.wire import Header
from router.plan import GroupRows
from router.plan_kernels import add_rows

Asker = TypeVar("Asker")


class Failure(NamedTuple):
    """A question that can not be answered in time, and why, in a sentence for the client."""

    seq: int
    reason: str


@dataclass(slots=True, kw_only=True, eq=False)
class Job(Generic[Asker]):
    """One question: a layer of one step of one attention replica."""

    asker: Asker
    header: Header
    room: Room  # holds all arrays of the job, until its asker's next question
    x: NDArray[np.generic]  # [num_tokens, hidden_size]; uint16 holds the bits of bfloat16
    y: NDArray[np.float32]  # [num_tokens, hidden_size]: the partial sums of the first `added` errands, added in order
    deadline_s: float
    errands: list["Errand[Asker]"] = field(default_factory=list)
    added: int = 0
    dropped_rows: int = 0  # rows beyond their groups' budgets, which are not in the answer

    @property
    def is_complete(self) -> bool:
        return self.added == len(self.errands)


@dataclass(slots=True, kw_only=True, eq=False)
class Errand(Generic[Asker]):
    """The rows of one job at one expert group, and the replicas that are asked: another one for each that is late.

    Whoever answers first is believed, since every copy computes the same bits.
    """

    job: Job[Asker]
    rows: GroupRows
    asked: dict[int, Replica] = field(default_factory=dict)  # by seq: who owes an answer
    asked_s: float = 0.0  # when the last one was asked, or when none was found
    refused_by: set[tuple[str, int]] = field(default_factory=set)  # (member id, incarnation) that answered NACK
    answered: bool = False
    partial: NDArray[np.float32] | None = None  # [num_rows, hidden_size], where it came before its turn
    gathered: NDArray[np.generic] | None = None  # what x() has copied: once, however many copies are asked

    def x(self) -> NDArray[np.generic]:
        """[num_rows, hidden_size]. A gather copies; a group that every token visits gets the step's own buffer."""
        x, tokens = self.job.x, self.rows.tokens
        if len(tokens) == len(x):
            return x
        if self.gathered is None:
            self.gathered = self.job.room.take((len(tokens), x.shape[1]), x.dtype)
            x.take(tokens, axis=0, out=self.gathered, mode="clip")  # tokens exist; checking them would copy twice
        return self.gathered


def combine(errand: Errand[Asker], partial: NDArray[np.float32]) -> None:
    """Adds an errand's partial sums to those of its job, in the order of the groups: a sum's bits depend on it.

    partial: [num_rows, hidden_size], copied where those of an earlier group are missing.
    """
    job = errand.job
    errand.answered = True
    if job.errands[job.added] is not errand:
        errand.partial = kept = job.room.take(partial.shape, np.float32)
        kept[...] = partial
        return
    _add(job, errand, partial)
    while not job.is_complete and (waiting := job.errands[job.added]).partial is not None:
        _add(job, waiting, waiting.partial)


def _add(job: Job[Asker], errand: Errand[Asker], partial: NDArray[np.float32]) -> None:
    job.added += 1
    if len(partial) == len(job.y):
        job.y += partial
    else:
        compiled(add_rows)(job.y, errand.rows.tokens, partial)


def failure_of(job: Job[Asker], parked: Collection[int]) -> Failure:
    """Of a job whose deadline is over. parked: the groups for which no copy could be asked."""
    waited = f"within {round(job.header.budget_ms / 1000, 1):g} s"
    if parked:
        return Failure(job.header.seq, f"no live copy of expert group {_numbers(parked)} {waited}; try again")
    missing = [errand.rows.group for errand in job.errands if not errand.answered]
    return Failure(job.header.seq, f"expert group {_numbers(missing)} did not answer {waited}; try again")


def _numbers(groups: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(groups)))
