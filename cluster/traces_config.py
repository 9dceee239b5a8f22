"""The section `traces` of the config file."""

from urllib.parse import urlsplit

from pydantic import Field, field_validator

from experts.config import Settings


class TracesConfig(Settings):
    endpoint: str | None = None  # of a collector, OTLP over HTTP; None: nothing is traced
    sample_share: float = Field(default=0.01, ge=0, le=1)  # of requests whose client does not say it
    step_share: float = Field(default=0.001, ge=0, le=1)  # of an engine's steps, with the trip of each layer

    @field_validator("endpoint")
    @classmethod
    def _is_whole(cls, endpoint: str | None) -> str | None:
        if endpoint is not None:
            url = urlsplit(endpoint)
            if url.scheme not in ("http", "https") or not url.hostname or url.path in ("", "/"):
                raise ValueError("must be a whole URL of OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces")
        return endpoint
