"""What a client is told when a request fails: one table from our errors to HTTP statuses and gRPC codes.

Whatever is not on the table is our own fault: the client gets an id and nothing else, the log gets the traceback.
"""

import json
import logging
import uuid
from dataclasses import dataclass

import grpc

from cluster.keys import Unauthenticated
from cluster.validate import ContextLengthExceeded, UnknownModel
from experts.errors import DeadlineExceeded, RequestError, ServingError

log = logging.getLogger(__name__)

INTERNAL_PREFIX = "internal error; its id in the log is "


class BodyTooLarge(RequestError):
    """The HTTP body has more bytes than are allowed (RESOURCE_EXHAUSTED, 413)."""


class HeadersTooLarge(RequestError):
    """The HTTP headers have more bytes than are allowed (RESOURCE_EXHAUSTED, 431)."""


class SlowBody(RequestError):
    """The HTTP body takes too long to arrive (DEADLINE_EXCEEDED, 408)."""


class NoSuchRoute(RequestError):
    """Nothing is served under this path, or not with this method (UNIMPLEMENTED, 404)."""


class WrongMethod(NoSuchRoute):
    """The path is served, but not with this method (UNIMPLEMENTED, 405)."""


class Overloaded(ServingError):
    """The cluster's queue is full; come back later (RESOURCE_EXHAUSTED, 429)."""


class NoSuchService(RequestError):
    """Health is asked for of a service that is not served (NOT_FOUND)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """One failed request, as both surfaces tell it."""

    message: str  # safe to show
    http_status: int
    grpc_code: grpc.StatusCode
    kind: str  # "type" in an OpenAI error body
    code: str | None = None  # "code" in an OpenAI error body
    field: str | None = None  # "param" in an OpenAI error body
    retry_after_s: int | None = None

    @property
    def outcome(self) -> str:
        """Under which the request is counted; one of a few."""
        return self.code or "refused"  # by a rule of vLLM's server that is not on our table

    @property
    def sentence(self) -> str:
        """The message with the seconds to wait, for where an answer has no header that could carry them."""
        return self.message if self.retry_after_s is None else f"{self.message} (retry after {self.retry_after_s} s)"

    @property
    def http_answer(self) -> tuple[dict[str, object], dict[str, object]]:
        """The whole HTTP answer, as the two messages of ASGI."""
        body = json.dumps(self.body).encode()
        headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(self.retry_after_s).encode()))
        if self.http_status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        start: dict[str, object] = {"type": "http.response.start", "status": self.http_status, "headers": headers}
        return start, {"type": "http.response.body", "body": body}

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The OpenAI error body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.field, "code": self.code}}


@dataclass(frozen=True, slots=True)
class _Answer:
    http_status: int
    grpc_code: grpc.StatusCode
    kind: str
    code: str | None
    retry_after_s: int | None = None


_CODES = grpc.StatusCode
_BAD_REQUEST = "invalid_request_error"
# The first row whose class fits counts: special ones before general ones.
_TABLE: tuple[tuple[type[Exception], _Answer], ...] = (
    (Unauthenticated, _Answer(401, _CODES.UNAUTHENTICATED, "authentication_error", "invalid_api_key")),
    (NoSuchService, _Answer(404, _CODES.NOT_FOUND, _BAD_REQUEST, "not_found")),
    (UnknownModel, _Answer(404, _CODES.NOT_FOUND, _BAD_REQUEST, "model_not_found")),
    (ContextLengthExceeded, _Answer(400, _CODES.INVALID_ARGUMENT, _BAD_REQUEST, "context_length_exceeded")),
    (BodyTooLarge, _Answer(413, _CODES.RESOURCE_EXHAUSTED, _BAD_REQUEST, "body_too_large")),
    (HeadersTooLarge, _Answer(431, _CODES.RESOURCE_EXHAUSTED, _BAD_REQUEST, "headers_too_large")),
    (SlowBody, _Answer(408, _CODES.DEADLINE_EXCEEDED, _BAD_REQUEST, "slow_body")),
    (WrongMethod, _Answer(405, _CODES.UNIMPLEMENTED, _BAD_REQUEST, "method_not_allowed")),
    (NoSuchRoute, _Answer(404, _CODES.UNIMPLEMENTED, _BAD_REQUEST, "not_found")),
    (RequestError, _Answer(400, _CODES.INVALID_ARGUMENT, _BAD_REQUEST, "invalid_value")),
    (DeadlineExceeded, _Answer(504, _CODES.DEADLINE_EXCEEDED, "server_error", "deadline_exceeded")),
    (Overloaded, _Answer(429, _CODES.RESOURCE_EXHAUSTED, "overloaded_error", "overloaded", 1)),
    (ServingError, _Answer(503, _CODES.UNAVAILABLE, "server_error", "unavailable", 1)),
)
_OUR_FAULT = _Answer(500, _CODES.INTERNAL, "server_error", "internal_error")


def refusal_of(exc: BaseException) -> Refusal:
    """What to tell the client about `exc`; an error that is not on the table is logged under a fresh id."""
    for kind, answer in _TABLE:
        if isinstance(exc, kind):
            return _refusal(answer, str(exc), exc.field if isinstance(exc, RequestError) else None)
    return internal_error("a request failed for a reason of our own", exc)


def refusal_of_status(status: int, message: str, field: str | None) -> Refusal:
    """The same for an error that vLLM's server has already turned into an HTTP status and a sentence."""
    if status >= 500 and status not in (503, 504) and not message.startswith(INTERNAL_PREFIX):
        return internal_error(f"the OpenAI server answered {status}: {message}")
    for _, answer in _TABLE:
        if answer.http_status == status and not (status == 400 and answer.code == "context_length_exceeded"):
            return _refusal(answer, message, field)
    if status < 500:
        return _refusal(_Answer(status, _CODES.INVALID_ARGUMENT, _BAD_REQUEST, None), message, field)
    return _refusal(_OUR_FAULT, message, field)


def internal_error(what: str, exc: BaseException | None = None) -> Refusal:
    """Logs what happened under a fresh id, and tells the client that id only."""
    error_id = uuid.uuid4().hex[:12]
    log.error("%s (id %s)", what, error_id, exc_info=exc, extra={"error_id": error_id})
    return _refusal(_OUR_FAULT, f"{INTERNAL_PREFIX}{error_id}", None)


def _refusal(answer: _Answer, message: str, field: str | None) -> Refusal:
    return Refusal(
        message=message,
        http_status=answer.http_status,
        grpc_code=answer.grpc_code,
        kind=answer.kind,
        code=answer.code,
        field=field,
        retry_after_s=answer.retry_after_s,
    )
