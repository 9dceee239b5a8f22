"""Settings of the attention replicas and of the gateway."""

from pydantic import Field

from experts.config import Settings


class AttentionConfig(Settings):
    replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)  # above `replicas`: Serve scales between the two
    target_open_requests: float = Field(default=32.0, gt=0)  # per replica, where Serve scales
    threads: int = Field(default=1, ge=1)  # compute threads of an engine
    kv_cache_mib: int = Field(default=128, ge=1)  # latent KV cache of an engine
    max_num_seqs: int = Field(default=64, ge=1)  # requests that one engine computes at a time
    max_queued_requests: int = Field(default=1024, ge=1)  # past the ones in work; more are refused with 429
    step_timeout_s: float = Field(default=20.0, gt=0)  # a step that has no answer by then ends its requests
    start_timeout_s: float = Field(default=180.0, gt=0)  # how long an engine waits for its router when it starts
    drain_timeout_s: float = Field(default=600.0, ge=0)  # a replica that is to go may finish its streams for so long
    num_cpus: float = Field(default=0.1, ge=0)
    num_gpus: float = Field(default=0, ge=0)

    @property
    def most_replicas(self) -> int:
        return max(self.replicas, self.max_replicas)


class GatewayConfig(Settings):
    replicas: int = Field(default=1, ge=1)
    http_host: str = "127.0.0.1"
    http_port: int = Field(default=8000, ge=1, le=65535)
    grpc_port: int = Field(default=9000, ge=1, le=65535)
    request_timeout_s: float = Field(default=600.0, gt=0, le=3600)
    max_ongoing_requests: int = Field(default=1000, ge=1)
    drain_timeout_s: float = Field(default=600.0, ge=0)
    num_cpus: float = Field(default=0.1, ge=0)
