"""How rows reach expert replicas: one small protocol, and its implementations that need no socket.

The socket implementation is router/server.py. `InProcessTransport` computes where it stands;
`FaultyTransport` delays, reorders, loses and cuts, from a seed, for tests.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from experts.link import Bytes
from experts.placement import Replica
from experts.wire import Header, Kind

# (layer, x [num_rows, hidden] float32, pairs [3, num_pairs] int32) -> partial sums [num_rows, hidden] float32
Expert = Callable[[int, NDArray[np.float32], NDArray[np.int32]], NDArray[np.float32]]


class Transport(Protocol):
    """Carries one frame to one replica; answers come back as events of whoever owns the links."""

    def send_rows(self, replica: Replica, header: Header, parts: Sequence[Bytes]) -> bool:
        """False where there is no live link to `replica` now; the caller chooses another copy."""
        ...


class Answer:
    """What comes back for one frame: the replica's header and partial sums, or a NACK without any."""

    def __init__(self, replica: Replica, header: Header, partial: NDArray[np.float32] | None) -> None:
        self.replica, self.header, self.partial = replica, header, partial


class InProcessTransport:
    """Replicas that are plain functions of float32 rows, by member id; answers wait until they are taken."""

    def __init__(self, experts: dict[str, Expert], *, hidden_size: int) -> None:
        self.experts = experts
        self.hidden_size = hidden_size
        self.answers: deque[Answer] = deque()

    def send_rows(self, replica: Replica, header: Header, parts: Sequence[Bytes]) -> bool:
        expert = self.experts.get(replica.member_id)
        if expert is None:
            return False
        x = np.frombuffer(parts[0], dtype=np.float32).reshape(-1, self.hidden_size)
        pairs = np.frombuffer(parts[1], dtype=np.int32).reshape(3, -1)
        answer = Header(
            Kind.PARTIAL,
            layer=header.layer,
            num_rows=len(x),
            seq=header.seq,
            placement_version=header.placement_version,
            incarnation=replica.incarnation,
        )
        self.answers.append(Answer(replica, answer, expert(header.layer, x, pairs)))
        return True

    def take(self) -> Answer | None:
        """The next answer that arrives, or None."""
        return self.answers.popleft() if self.answers else None


class FaultyTransport(InProcessTransport):
    """Delivers in any order, sometimes twice, and loses some answers.

    lost: the share of answers that never come; doubled: the share that comes a second time, later.
    """

    def __init__(
        self, experts: dict[str, Expert], *, hidden_size: int, seed: int, lost: float = 0.0, doubled: float = 0.0
    ) -> None:
        super().__init__(experts, hidden_size=hidden_size)
        self._random = random.Random(seed)  # noqa: S311  (faults, not secrets)
        self.cut: set[str] = set()  # member ids that cannot be reached now
        self._lost = lost
        self._doubled = doubled

    def send_rows(self, replica: Replica, header: Header, parts: Sequence[Bytes]) -> bool:
        return replica.member_id not in self.cut and super().send_rows(replica, header, parts)

    def take(self) -> Answer | None:
        while self.answers:
            self.answers.rotate(self._random.randrange(len(self.answers)))
            answer = self.answers.popleft()
            if self._random.random() < self._lost:
                continue
            if self._random.random() < self._doubled:
                self.answers.append(answer)
            return answer
        return None
