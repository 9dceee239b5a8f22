"""Settings of the model and of the expert groups, as they stand in a deployment's config file."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """A section of the config file: read once, never changed, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Settings):
    checkpoint: str = "embedded"  # a folder, or the checkpoint that comes with the package
    served_name: str | None = Field(default=None, min_length=1, max_length=128)  # None: the folder's name
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: what the checkpoint is stored in
    max_model_len: int = Field(default=1024, ge=16)  # tokens of prompt and answer together


class ExpertsConfig(Settings):
    groups: int = Field(default=4, ge=1)  # D; must divide the checkpoint's n_group
    replicas: int = Field(default=1, ge=1)  # copies of each group
    threads: int = Field(default=1, ge=1)  # compute threads of a replica
    niceness: int = Field(default=5, ge=0, le=19)  # of a replica that serves, as attention.niceness
    compute: Literal["auto", "loop", "kernel", "grouped"] = "auto"
    num_cpus: float = Field(default=0.1, ge=0)  # what a replica books from Ray
    num_gpus: float = Field(default=0, ge=0)
    max_replicas_per_node: int | None = Field(default=None, ge=1)  # of one group; None: as many as there is room for
    listen: Literal["unix", "tcp"] = "unix"  # tcp where routers and experts are on different nodes
    lease_s: float = Field(default=5.0, gt=0)  # a member that has been silent for this long is gone
