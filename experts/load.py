"""The load of one expert replica: how busy its data plane is, and how much expert arithmetic it does per second.

Both are averages that forget: what was a window ago counts for 1/e of what is now. Pure: the caller owns the clock.
"""

import math
from dataclasses import dataclass

# Under these names a replica reports its load to Serve, and the policy finds it there.
BUSY_SHARE = "busy_share"
FLOPS_PER_S = "flops_per_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """What one replica says of itself."""

    busy_share: float  # 0 to 1: of the wall time, how much the data plane has worked
    flops_per_s: float  # of expert FFNs: rows times the experts that each of them uses here

    def stats(self) -> dict[str, float]:
        """In the form of Serve's `record_autoscaling_stats`."""
        return {BUSY_SHARE: self.busy_share, FLOPS_PER_S: self.flops_per_s}


class LoadMeter:
    """Averages of one replica: one thread adds what it has done, any other may read.

    A replica that has just started reads 0 and rises within a window, just as the load of the copies that it relieves
    falls: so the sum over a group stays what it was, however many share it.
    """

    def __init__(self, *, flops_per_pair: float, window_s: float, now_s: float) -> None:
        """flops_per_pair: of one row in one expert (see `pair_flops`). window_s: time constant of the averages."""
        if not window_s > 0:
            raise ValueError(f"{window_s=} must be above 0")
        self._flops_per_pair = flops_per_pair
        self._window_s = window_s
        # One tuple, replaced as a whole, so that a reader never sees half of an update:
        # the time up to which it counts, busy share, flops per second.
        self._state = now_s, 0.0, 0.0

    def add(self, begin_s: float, end_s: float, num_pairs: int) -> None:
        """The data plane has worked from begin_s to end_s, and computed num_pairs pairs in that time.

        Intervals come in order; what overlaps the one before counts once.
        """
        last_s, busy_share, flops_per_s = self._state
        if begin_s < last_s:
            begin_s = last_s
        if end_s < begin_s:
            end_s = begin_s
        idle = math.exp((last_s - begin_s) / self._window_s)
        worked = math.exp((begin_s - end_s) / self._window_s)
        self._state = (
            end_s,
            busy_share * idle * worked + 1.0 - worked,
            flops_per_s * idle * worked + num_pairs * self._flops_per_pair / self._window_s,
        )

    def read(self, now_s: float) -> ReplicaLoad:
        """The load at now_s; without work it falls towards 0. Changes nothing.

        An interval that has not ended yet is not in it.
        """
        last_s, busy_share, flops_per_s = self._state
        idle = math.exp(min(last_s - now_s, 0.0) / self._window_s)
        return ReplicaLoad(busy_share=busy_share * idle, flops_per_s=flops_per_s * idle)


def pair_flops(*, hidden_size: int, moe_intermediate_size: int) -> float:
    """Of one row in one expert: three matrices, and a multiplication and an addition for each of their weights."""
    return 6.0 * hidden_size * moe_intermediate_size
