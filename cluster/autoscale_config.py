"""Settings of the autoscaling of expert groups."""

from typing import Self

from pydantic import Field, model_validator

from experts.config import Settings


class AutoscaleConfig(Settings):
    """When an expert group gets copies, and when it gives them back. Shares are of one copy's wall time.

    A group keeps its number of copies n while its load lies between down_busy_share * (n - 1) and
    up_busy_share * n; the gap between the two is what keeps a steady load from causing any change.
    """

    min_replicas: int = Field(default=1, ge=1)  # copies of a group that are always there
    max_replicas: int = Field(default=1, ge=1)  # copies of a group at most; equal to min_replicas: no autoscaling
    target_busy_share: float = Field(default=0.7, gt=0, lt=1)  # how busy each copy should be
    up_busy_share: float = Field(default=0.8, gt=0, lt=1)  # busier copies than this get help
    down_busy_share: float = Field(default=0.6, gt=0, lt=1)  # one copy goes where the others would stay below this
    up_delay_s: float = Field(default=30.0, ge=0)  # how long it must have been too much
    down_delay_s: float = Field(default=120.0, ge=0)  # how long it must have been too little, for each copy that goes
    window_s: float = Field(default=20.0, gt=0)  # time constant of the averages that a replica reports
    late_after_s: float = Field(default=10.0, gt=0)  # a replica silent for so long has an unknown load

    @property
    def enabled(self) -> bool:
        return self.max_replicas > self.min_replicas

    def bounded(self, num_replicas: int) -> int:
        return min(max(num_replicas, self.min_replicas), self.max_replicas)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas})")
        if not self.down_busy_share <= self.target_busy_share <= self.up_busy_share:
            raise ValueError(
                f"down_busy_share ({self.down_busy_share}) must not be above target_busy_share "
                f"({self.target_busy_share}), nor that above up_busy_share ({self.up_busy_share})"
            )
        if self.down_busy_share == self.up_busy_share:
            raise ValueError(
                f"down_busy_share and up_busy_share are both {self.up_busy_share}: the smallest change of the load "
                "would start and stop copies for ever"
            )
        return self
