"""The deadline of clients that cannot set one otherwise: the same words on every surface."""

from experts.errors import RequestError

TIMEOUT_HEADER = "x-request-timeout-ms"  # over HTTP and in gRPC's metadata


def seconds_of(value: str) -> float:
    """Of the header's value. Raises RequestError, which names it."""
    if not value.isascii() or not value.isdigit() or len(value) > 12:
        raise RequestError(f"{TIMEOUT_HEADER} must be a whole number", field=TIMEOUT_HEADER)
    return int(value) / 1000
