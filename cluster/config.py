"""Settings of the attention replicas and of the gateway."""

import ipaddress
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from experts.config import Settings


class AttentionConfig(Settings):
    replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)  # above `replicas`: Serve scales between the two
    target_open_requests: float = Field(default=32.0, gt=0)  # per replica, where Serve scales
    threads: int = Field(default=1, ge=1)  # compute threads of an engine
    niceness: int = Field(default=5, ge=0, le=19)  # of an engine's process: where cores are short, gateways go first
    kv_cache_mib: int = Field(default=128, ge=1)  # latent KV cache of an engine
    max_num_seqs: int = Field(default=64, ge=1)  # requests that one engine computes at a time
    max_num_batched_tokens: int | None = Field(default=None, ge=1)  # of one step; None: see DeploymentConfig.max_rows
    max_queued_requests: int = Field(default=1024, ge=1)  # past the ones in work; more are refused with 429
    step_timeout_s: float = Field(default=20.0, gt=0)  # a step that has no answer by then ends its requests
    start_timeout_s: float = Field(default=180.0, gt=0)  # how long an engine waits for its router when it starts
    drain_timeout_s: float = Field(default=600.0, ge=0)  # a replica that is to go may finish its streams for so long
    num_cpus: float = Field(default=0.1, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    max_replicas_per_node: int | None = Field(default=None, ge=1)  # None: as many as there is room for

    @property
    def most_replicas(self) -> int:
        return max(self.replicas, self.max_replicas)


class GatewayConfig(Settings):
    replicas: int = Field(default=1, ge=1)
    http_host: str = "127.0.0.1"
    http_port: int = Field(default=8000, ge=1, le=65535)
    grpc_host: str = "127.0.0.1"
    grpc_port: int = Field(default=9000, ge=1, le=65535)
    auth: Literal["keys", "none"] = "keys"  # none: only where both hosts are loopback
    keys_file: str | None = None  # one key a line, mode 600; those of EXPERTMESH_API_KEYS count, too
    tls_cert_file: str | None = None  # PEM; with it both doors speak TLS only
    tls_key_file: str | None = None
    tls_client_ca_file: str | None = None  # clients must show a certificate of it
    request_timeout_s: float = Field(default=600.0, gt=0, le=3600)
    max_open_requests: int = Field(default=256, ge=1)  # generations of one replica; more are refused with 429
    log_requests: Literal["off", "facts", "prompts"] = "facts"
    max_body_bytes: int = Field(default=4 << 20, ge=1 << 10, le=1 << 30)  # of an HTTP body, or a gRPC message
    drain_timeout_s: float = Field(default=600.0, ge=0)
    num_cpus: float = Field(default=0.1, ge=0)
    max_replicas_per_node: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _is_open_to_nobody(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file belong together: give both, or none")
        if self.tls_client_ca_file is not None and self.tls_cert_file is None:
            raise ValueError("tls_client_ca_file needs tls_cert_file and tls_key_file")
        for name in ("http_host", "grpc_host"):
            host = getattr(self, name)
            if self.auth == "none" and not _is_loopback(host):
                raise ValueError(f"auth is none, and {name} is {host}: without keys only loopback is served")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayModel:
    """What is served, as a gateway must know it."""

    checkpoint: str  # folder with config.json and the tokenizer's files; weights are not read
    served_name: str
    dtype: str
    max_model_len: int  # tokens of prompt and answer together


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
