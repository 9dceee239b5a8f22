"""Settings of the router service."""

from pydantic import Field

from experts.config import Settings


class RouterConfig(Settings):
    replicas: int = Field(default=1, ge=1)  # one per Ray node that hosts attention
    dispatch_timeout_s: float = Field(default=2.0, gt=0)  # silence after which another copy is asked
    capacity_factor: float | None = Field(default=None, gt=0)  # rows a group may have, in mean loads; None: all
    num_cpus: float = Field(default=0.1, ge=0)
    max_replicas_per_node: int | None = Field(default=None, ge=1)  # None: as many as there is room for
