"""A question under way: its rows at each expert group, who owes an answer, and the sum once all are there."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from experts.compiled import compiled
from experts.placement import Replica
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
    x: NDArray[np.generic]  # [num_tokens, hidden_size]; uint16 holds the bits of bfloat16
    deadline_s: float
    errands: list["Errand[Asker]"] = field(default_factory=list)
    waiting: int = 0  # errands without a partial sum
    dropped_rows: int = 0  # rows beyond their groups' budgets, which are not in the answer


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
    partial: NDArray[np.float32] | None = None  # [num_rows, hidden_size]

    def x(self) -> NDArray[np.generic]:
        """[num_rows, hidden_size]. A gather copies; a group that every token visits gets the step's own buffer."""
        x = self.job.x
        return x if len(self.rows.tokens) == len(x) else x[self.rows.tokens]


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


def failure_of(job: Job[Asker], parked: Collection[int]) -> Failure:
    """Of a job whose deadline is over. parked: the groups for which no copy could be asked."""
    waited = f"within {round(job.header.budget_ms / 1000, 1):g} s"
    if parked:
        return Failure(job.header.seq, f"no live copy of expert group {_numbers(parked)} {waited}; try again")
    missing = [errand.rows.group for errand in job.errands if errand.partial is None]
    return Failure(job.header.seq, f"expert group {_numbers(missing)} did not answer {waited}; try again")


def _numbers(groups: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(groups)))
